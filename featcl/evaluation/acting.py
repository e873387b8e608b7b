"""What a stream of environments gives a run: episodes to be played, and the reward of held-out ones as columns of R."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from featcl.evaluation.board import GradedBoard
from featcl.evaluation.forward import Targeted
from featcl.evaluation.material import Columns, Material, Task, lab_material
from featcl.evaluation.matrix import Measure
from featcl.features.provenance import text_digests
from featcl.lab.acting import ActingStream, ActingTask
from featcl.lab.streams import LabStream
from featcl.lab.tasks import LabTask
from featcl.streams import Chat
from featcl.streams.acting import ActingSettings, act
from featcl.streams.environments import Planned, Step
from featcl.streams.messages import Message

AT_ONCE = 48  # held-out episodes that are played together


class ActingBoard:
    """Columns of tasks: the reward of greedy episodes; other columns: graded items.

    Args:
        chat: The chat form of the model's tokenizer.
        tasks: The tasks with their held-out episodes.
        columns: Column -> items of general ability.
        settings: How episodes are played; greedily whatever the temperature says.
    """

    measure: Measure = "accuracy"

    def __init__(self, chat: Chat, tasks: Sequence[ActingTask], columns: Columns, *, settings: ActingSettings) -> None:
        self._chat, self._tasks, self._settings = chat, tuple(tasks), replace(settings, temperature=0.0)
        self._general = GradedBoard(chat, columns)

    def score(self, model: nn.Module, answering: Any = None) -> dict[str, dict[str, float]]:
        """Column -> episode or item -> reward or grade; by what an episode opens with, methods answer in all of it."""
        rewards = {task.name: self._rewards(model, task, answering) for task in self._tasks}
        return rewards | self._general.score(model, answering)

    def targets(self, item: str) -> tuple[Targeted, ...]:
        """Of graded items alone: an episode has no right answer whose likelihood could be asked for."""
        return self._general.targets(item)

    def _rewards(self, model: nn.Module, task: ActingTask, answering: Any) -> dict[str, float]:
        if answering is None:
            rewards = self._played(model, task, task.held_out)
        else:
            openings = task.openings(task.held_out)
            rewards = {}
            for places, state in answering.grouped(openings, [task.name] * len(openings)):
                with state:
                    rewards |= self._played(model, task, [task.held_out[place] for place in places], answering)
        return {f"{task.name}/{seed}": rewards[seed] for seed in task.held_out}

    def _played(
        self, model: nn.Module, task: ActingTask, seeds: Sequence[int], answering: Any = None
    ) -> dict[int, float]:
        """Seed -> reward of its episode."""
        environments: list[Any] = [task.make() for _ in seeds[:AT_ONCE]]
        if answering is not None:
            environments = [_Asked(environment, answering, task.name) for environment in environments]
        played = act(model, self._chat, environments, seeds, settings=self._settings)
        return {seed: float(t.reward or 0.0) for seed, t in zip(seeds, played, strict=True)}


class _Asked:
    """An environment that opens with what methods put in front."""

    def __init__(self, environment: Any, answering: Any, task: str) -> None:
        self.environment, self.answering, self.task = environment, answering, task
        self.tools = environment.tools

    def reset(self, seed: int) -> tuple[Message, ...]:
        """The opening as the model is asked it."""
        return tuple(self.answering.asked(self.environment.reset(seed), self.task))

    def step(self, reply: str) -> Step:
        """As the environment does."""
        return self.environment.step(reply)


def acting_material(
    stream: ActingStream,
    chat: Chat,
    *,
    suites: Columns,
    settings: ActingSettings,
    samples: int = 1,
    canary_items: int | None = None,
    limit: int | None = None,
) -> Material:
    """A stream that the model acts in, with the general suites beside it.

    Args:
        stream: The stream.
        chat: The chat form of the model's tokenizer.
        suites: Column -> items of general ability.
        settings: How episodes are played.
        samples: Episodes per opening, next to each other.
        canary_items: About how many items are looked at between evaluations; None for none.
        limit: Learn from at most this many episodes per task.
    """
    calibration = {"positive": stream.positive, "negative": stream.negative, "background": stream.background}
    empty = tuple(LabTask(task.name, "latent", "home-assistant", (), ()) for task in stream.tasks)
    plain = LabStream(stream.name, stream.world, "blocked", 0.0, empty, (), **calibration)
    material = lab_material(plain, chat, suites=suites, canary_items=canary_items if suites else None)
    return replace(
        material,
        tasks=tuple(Task(task.name, planned(task, samples)[:limit]) for task in stream.tasks),
        board=ActingBoard(chat, stream.tasks, suites, settings=settings),
        unseen=material.unseen | text_digests(_openings(stream, chat), chat.tokenizer),
        digest=stream.digest,
    )


def planned(task: ActingTask, samples: int) -> tuple[Planned, ...]:
    """A task's episodes before they are played: `samples` of each seed."""
    return tuple(Planned(task.name, index) for index in range(samples * len(task.seeds)))


def _openings(stream: ActingStream, chat: Chat) -> list[Any]:
    """What episodes open with, as the model reads it and as plain text."""
    openings = [opening for task in stream.tasks for opening in task.openings((*task.seeds, *task.held_out))]
    plain = ["\n".join(str(message["content"]) for message in opening) for opening in openings]
    return [*(chat.encode(opening, mask="none").input_ids for opening in openings), *plain]
