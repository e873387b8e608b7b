"""The order of things in a run: a memory's training, evaluations, tasks' beginnings and ends, updates, canaries."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from featcl.build import Experiment
from featcl.config import RunConfig
from featcl.evaluation.material import Task
from featcl.lab.acting import NAME as ACTING
from featcl.streams import Trajectory
from featcl.streams.environments import Planned


@dataclass(frozen=True)
class Update:
    """Learn from one trajectory, in one phase of one task; `new` where it was not learned from before."""

    task: str
    phase: int
    trajectory: Trajectory | Planned
    new: bool = True


@dataclass(frozen=True)
class StartAgain:
    """Back to the base: the next task is learned as if it were the only one."""


@dataclass(frozen=True)
class BeginTask:
    """Methods hear that a task begins, and which experiences are to come, if they are known by now."""

    task: str
    upcoming: tuple[Trajectory, ...]


@dataclass(frozen=True)
class EndTask:
    """Methods hear that a task ends, and which experiences it had, by the phase that learned from them."""

    task: str
    learned: tuple[tuple[int, Trajectory | Planned], ...]


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
class Smoke:
    """Ask lm-evaluation-harness a few items between evaluations."""


@dataclass(frozen=True)
class Evaluate:
    """Score every column of R, and measure what else is asked for; `row` is "base" or the task just trained."""

    row: str


Step = Memorize | MeasureMemory | StartAgain | BeginTask | Update | CheckCanaries | Smoke | EndTask | Evaluate


def plan(experiment: Experiment) -> Iterator[Step]:
    """Every step of a run in order; a resumed run skips those that are done."""
    updates = 0
    seen: set[str | Planned] = set()
    if experiment.memorizing is not None:
        yield MeasureMemory("untrained")
        yield from (Memorize() for _ in range(experiment.memorizing.steps))
        yield MeasureMemory("trained")
    yield Evaluate("base")
    for number, task in enumerate(experiment.material.tasks):
        if number and experiment.config.stream.setting == "alone":
            yield StartAgain()
        known = experiment.material.segments.get(task.name, task.name)  # a task that comes again is known already
        if experiment.learner.methods:
            yield BeginTask(known, tuple(t for _, t in learned(experiment, task) if isinstance(t, Trajectory)))
        for phase, limit in enumerate(experiment.experiences):
            for trajectory in order(experiment.config, task.trajectories[:limit], task=task.name, phase=phase):
                yield Update(task.name, phase, trajectory, _key(trajectory) not in seen)
                seen.add(_key(trajectory))
                updates += 1
                yield from _between(experiment, updates)
        if experiment.learner.methods:
            yield EndTask(known, learned(experiment, task))
        yield Evaluate(task.name)


def _between(experiment: Experiment, updates: int) -> Iterator[Step]:
    """What is looked at after so many updates."""
    wanted = experiment.config.evaluation
    if wanted.canaries is not None and experiment.canaries is not None and updates % wanted.canaries.every == 0:
        yield CheckCanaries()
    smoke = None if wanted.harness is None else wanted.harness.smoke
    if smoke is not None and updates % smoke.every == 0:
        yield Smoke()


def _key(trajectory: Trajectory | Planned) -> str | Planned:
    return trajectory.id if isinstance(trajectory, Trajectory) else trajectory


def order(
    config: RunConfig, trajectories: Sequence[Trajectory | Planned], *, task: str, phase: int
) -> Iterator[Trajectory | Planned]:
    """A task's experiences as they come in one phase: as the stream has them, or in shuffled passes."""
    stream = config.stream
    if stream.name == ACTING or stream.setting == "streaming" or (stream.setting == "alone" and stream.passes == 1):
        yield from trajectories
        return
    for number in range(stream.passes):
        generator = random.Random(f"{config.seed}/{task}/{phase}/{number}")
        yield from generator.sample(trajectories, len(trajectories))


def learned(experiment: Experiment, task: Task) -> tuple[tuple[int, Trajectory | Planned], ...]:
    """Every experience of a task once, with the first phase that learns from it."""
    found: dict[str | Planned, tuple[int, Trajectory | Planned]] = {}
    for phase, limit in enumerate(experiment.experiences):
        for each in task.trajectories[:limit]:
            found.setdefault(_key(each), (phase, each))
    return tuple(found.values())
