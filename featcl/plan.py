"""The order of things in a run: a memory's training, evaluations, updates, looks at the canaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from featcl.build import Experiment
from featcl.streams import Trajectory
from featcl.streams.environments import Planned


@dataclass(frozen=True)
class Update:
    """Learn from one trajectory, in one phase of one task."""

    task: str
    phase: int
    trajectory: Trajectory | Planned


@dataclass(frozen=True)
class Memorize:
    """One step of the training of the memory's slow weights."""


@dataclass(frozen=True)
class MeasureMemory:
    """Read held-out long texts with the memory, without it, and whole; `when` is "untrained" or "trained"."""

    when: str


@dataclass(frozen=True)
class CheckCanaries:
    """Look at the small fixed set between evaluations."""


@dataclass(frozen=True)
class Evaluate:
    """Score every column of R; `row` is "base" or the task just trained."""

    row: str


Step = Memorize | MeasureMemory | Update | CheckCanaries | Evaluate


def plan(experiment: Experiment) -> Iterator[Step]:
    """Every step of a run in order; a resumed run skips those that are done."""
    canaries = experiment.config.evaluation.canaries
    updates = 0
    if experiment.memorizing is not None:
        yield MeasureMemory("untrained")
        yield from (Memorize() for _ in range(experiment.memorizing.steps))
        yield MeasureMemory("trained")
    yield Evaluate("base")
    for task in experiment.material.tasks:
        for phase, limit in enumerate(experiment.experiences):
            for trajectory in task.trajectories[:limit]:
                yield Update(task.name, phase, trajectory)
                updates += 1
                if canaries is not None and experiment.canaries is not None and updates % canaries.every == 0:
                    yield CheckCanaries()
        yield Evaluate(task.name)
