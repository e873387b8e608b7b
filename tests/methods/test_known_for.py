"""What each method is known for, on two of the laboratory's tasks with lab/olmo2: nats per token of their answers.

At this learning rate plain LoRA learns a task from 48 experiences, and forgets the first while it learns the second.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from featcl.adapters import constrain
from featcl.evaluation.scoring import encode_item, heldout_nll, weighted_nll
from featcl.features import Directions
from featcl.lab.streams import load_stream
from featcl.learning import Learner
from featcl.methods.ewc import EWC
from featcl.methods.lwf import LwF
from featcl.methods.method import Method
from featcl.methods.replay import Replay
from featcl.models import load_model
from featcl.streams import Trajectory

pytestmark = pytest.mark.slow

PASSES = 3  # of joint training: no sequential method here sees an experience more often
TASKS, EXPERIENCES, ITEMS = ("home_facts", "code_library"), 48, 32
METHODS: dict[str, Callable[[], tuple[Method, ...]]] = {
    "plain": lambda: (),
    "ewc": lambda: (EWC(strength=300.0, experiences=16),),
    "lwf": lambda: (LwF(strength=1.0),),
    "replay": lambda: (Replay(budget=16),),
    "replay_one": lambda: (Replay(budget=1),),
    "replay_all": lambda: (Replay(budget=1000, count=2),),
}


@dataclass(frozen=True)
class Outcome:
    """Nats per token on items of both tasks.

    Attributes:
        base: Of the base model.
        learned: Of the first task when it was learned, of the second at the end.
        end: At the end.
        moved: ‖ΔW‖ at the end.
    """

    base: tuple[float, ...]
    learned: tuple[float, ...]
    end: tuple[float, ...]
    moved: float

    @property
    def forgotten(self) -> float:
        """Of the first task, since it was learned."""
        return self.end[0] - self.learned[0]

    @property
    def mean(self) -> float:
        """Of both tasks, at the end."""
        return sum(self.end) / len(self.end)


@cache
def outcome(name: str) -> Outcome:
    """One run; `joint` has both tasks as one, in shuffled passes, and `frozen` a loss of weight 0."""
    learner, streams, score = rig(() if name in ("joint", "frozen") else METHODS[name](), frozen=name == "frozen")
    base, learned = score(), []
    if name == "joint":
        both, draw = [each for stream in streams for each in stream], random.Random(0)
        learn_(learner, "joint", [each for _ in range(PASSES) for each in draw.sample(both, len(both))])
        learned = list(score())
    else:
        for number, (task, stream) in enumerate(zip(TASKS, streams, strict=True)):
            learn_(learner, task, stream)
            learned.append(score()[number])
    return Outcome(tuple(base), tuple(learned), tuple(score()), learner.adapter.delta_norm())


def rig(
    methods: Sequence[Method], *, frozen: bool
) -> tuple[Learner, list[Sequence[Trajectory]], Callable[[], list[float]]]:
    """A learner with plain LoRA, what the two tasks teach, and what measures both."""
    torch.set_num_threads(1)
    model, tokenizer = load_model("lab/olmo2")
    directions = Directions.from_vectors(torch.eye(model.config.hidden_size)[:16], layer=3)
    adapter = constrain(model, directions, kind="none", seed=0)
    objective: Any = {"name": "sft", "weight": 0.0 if frozen else 1.0}
    learner = Learner(model, tokenizer, adapter, objective=objective, methods=methods, lr=5e-3)
    tasks = load_stream(world="development", tasks=TASKS).tasks
    items = [[encode_item(learner.student.chat, item) for item in task.items[:ITEMS]] for task in tasks]

    def score() -> list[float]:
        with torch.no_grad():
            return [weighted_nll(heldout_nll(adapter.model, own), own) for own in items]

    return learner, [task.trajectories[:EXPERIENCES] for task in tasks], score


def learn_(learner: Learner, task: str, stream: Sequence[Trajectory]) -> None:
    learner.begin_task(task, upcoming=stream)
    for trajectory in stream:
        learner.observe(trajectory)
    learner.end_task(task, stream)


def test_plain_lora_learns_and_forgets() -> None:
    """What the others are measured against; without this their tests would say nothing."""
    plain = outcome("plain")
    assert all(now < 0.5 * was for now, was in zip(plain.learned, plain.base, strict=True))
    assert plain.forgotten > 0.5


@pytest.mark.parametrize("name", ["ewc", "lwf", "replay"])
def test_it_forgets_less_than_plain_lora_and_still_learns(name: str) -> None:
    plain, found = outcome("plain"), outcome(name)
    assert found.learned[0] < 0.5 * found.base[0]
    assert found.forgotten < 0.7 * plain.forgotten
    assert found.end[1] < 0.7 * found.base[1], "the second task is learned too"
    assert found.mean < plain.mean


def test_joint_training_is_the_upper_bound() -> None:
    joint = outcome("joint")
    for name in METHODS:
        assert joint.mean < outcome(name).mean + 0.02, name
    assert joint.mean < outcome("plain").mean - 0.1


def test_frozen_does_not_move() -> None:
    frozen = outcome("frozen")
    assert frozen.moved == 0.0
    assert frozen.end == frozen.base
    assert outcome("plain").moved > 0.0, "negative control"


def test_replay_of_everything_approaches_joint_training() -> None:
    joint, plain, one, whole = (outcome(name).mean for name in ("joint", "plain", "replay_one", "replay_all"))
    assert whole - joint < 0.25 * (plain - joint)
    assert one - joint > 0.25 * (plain - joint), "negative control: replay of a single record does not"
