"""Episodes that open with what methods put in front of a prompt; what is recorded is the conversation without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from featcl.methods.answering import Answering
from featcl.streams.environments import Environment, Step
from featcl.streams.trajectory import Message, Trajectory

Openings = dict[int, tuple[tuple[Message, ...], int]]


class Asked:
    """An environment whose openings are asked as methods have them.

    Args:
        environment: Where the episode is played; all else is its own.
        answering: What is put in front.
        openings: Of each seed, its own opening and the number of messages that were asked in its place; shared.
    """

    def __init__(self, environment: Environment, answering: Answering, openings: Openings) -> None:
        self.environment, self.answering, self.openings = environment, answering, openings
        self.tools = environment.tools

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["environment"], name)

    def reset(self, seed: int) -> tuple[Message, ...]:
        """The opening as the model is asked it."""
        own = tuple(self.environment.reset(seed))
        asked = tuple(self.answering.asked(own, getattr(self.environment, "task", None)))
        self.openings[seed], self.tools = (own, len(asked)), self.environment.tools
        return asked

    def step(self, reply: str) -> Step:
        """As the environment does."""
        return self.environment.step(reply)


def asked_environments(
    environments: Sequence[Environment], answering: Answering
) -> tuple[Sequence[Environment], Openings]:
    """The environments as the model plays them, and what they will have opened with."""
    openings: Openings = {}
    if answering.same_prompts:
        return environments, openings
    return [Asked(environment, answering, openings) for environment in environments], openings


def as_said(trajectory: Trajectory, openings: Openings) -> Trajectory:
    """An episode with its own opening; its tokens are as they were read and sampled."""
    found = openings.get(trajectory.meta["seed"])
    if found is None:
        return trajectory
    own, asked = found
    return replace(trajectory, messages=(*own, *trajectory.messages[asked:]))
