"""A learner's side of its methods: tasks that begin and end, what methods see of it, how it answers with them.

Where a task begins or ends a method may move the coordinates (a fresh LoRA, a merge). The optimizer's moments belong to
the old ones and are dropped, and the coordinates become a version of their own. A rollback beyond a task's beginning
takes back what methods did there; the task is still the present one, so that it begins anew with the next experience.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from featcl.learning.deltas import same
from featcl.learning.live import acting_alone
from featcl.learning.methods import Methods, mean_gradient
from featcl.learning.microbatch import halving
from featcl.learning.randomness import derived_generator
from featcl.learning.stats import UpdateStats
from featcl.learning.timings import Timings
from featcl.learning.update import learn_lesson_
from featcl.methods.answering import Answering
from featcl.methods.method import Cost, View
from featcl.streams.trajectory import Trajectory

if TYPE_CHECKING:
    from featcl.learning.learner import Learner


class Told:
    """Which task the learner was told to be in, whatever its methods were taken back to; saved, and in no version.

    Attributes:
        task: Its name; None: nobody said.
        upcoming: Its trajectories, as they were given; not saved.
    """

    def __init__(self) -> None:
        self.task: str | None = None
        self.upcoming: Sequence[Trajectory] = ()

    def state(self) -> dict[str, Any]:
        """As JSON data."""
        return {"task": self.task}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self.task, self.upcoming = state["task"], ()


class Tasks:
    """A learner that is told where tasks begin and end.

    for task, trajectories in stream:
        learner.begin_task(task)
        for trajectory in trajectories:
            learner.observe(trajectory)
        learner.end_task(task, trajectories)

    Without methods there is nothing to do at either end.
    """

    methods: Methods
    told: Told

    def begin_task(self, task: str, *, upcoming: Sequence[Trajectory] = ()) -> None:
        """A task begins, the first one too; where nobody says so, the first experience begins its own.

        Args:
            task: Its name.
            upcoming: Its trajectories, as far as they are known by now; some methods need them.

        Raises:
            FeatclError: From a method; learner and methods are as before.
        """
        if self.methods:
            begin_task_(self, task, upcoming)  # type: ignore[arg-type]

    def end_task(self, task: str, trajectories: Sequence[Trajectory]) -> tuple[UpdateStats, ...]:
        """A task ends: what waits is learned, then methods take stock of it.

        Args:
            task: Its name.
            trajectories: All that was observed of it, or what should stand for that.

        Returns:
            The updates of what waited (`accumulate`, or a method that collects).

        Raises:
            FeatclError: From a method; learner and methods are as they were after those updates.
            Stopped: If the guard stops at one of them; methods have not taken stock then.
        """
        return end_task_(self, task, trajectories) if self.methods else ()  # type: ignore[arg-type]

    def view(self) -> View:
        """What methods see of the learner now."""
        return view_of(self)  # type: ignore[arg-type]

    def answering(self) -> Answering:
        """How the present version answers questions with its methods."""
        return Answering(self.methods, self.view())

    def cost(self) -> dict[str, Cost]:
        """What each method has needed beside the updates themselves, by name."""
        return self.methods.costs()


def view_of(learner: Learner) -> View:
    """As `Tasks.view`."""
    return View(
        student=learner.student,
        parameters=learner.adapter.named_parameters(),
        terms=tuple(learner.terms),
        encode=lambda trajectory: learner._experience(trajectory)[0],
        gradient=lambda experience: mean_gradient(learner.terms, experience, learner.student),
        generator=partial(derived_generator, learner.seed, f"version {learner.version}"),
    )


def begin_task_(learner: Learner, task: str, upcoming: Sequence[Trajectory]) -> None:
    """As `Tasks.begin_task`."""
    learner.flush()
    _at_task_(learner, partial(learner.methods.begin_task_, task, upcoming))
    learner.told.task, learner.told.upcoming = task, upcoming


def begun_(learner: Learner, task: str) -> None:
    """Begin a task that was not begun: because nobody said so, or because that was taken back.

    Args:
        learner: Nothing is done without methods.
        task: Its name where nobody said another.
    """
    told = learner.told
    wanted = told.task or learner.methods.task or task
    if learner.methods and learner.methods.task != wanted:
        begin_task_(learner, wanted, told.upcoming)


def end_task_(learner: Learner, task: str, trajectories: Sequence[Trajectory]) -> tuple[UpdateStats, ...]:
    """As `Tasks.end_task`."""
    begun_(learner, task)
    made = [stats for stats in (_collected_(learner), learner.flush()) if stats is not None]
    _at_task_(learner, partial(learner.methods.end_task_, task, trajectories))
    return tuple(made)


@acting_alone
@halving
def _collected_(learner: Learner) -> UpdateStats | None:
    """One update from what a method has collected; None where none has."""
    timings = Timings()
    with learner._whole() as before:
        if (lesson := learner.methods.flush_()) is None:
            return None
        own = lesson.own.trajectory
        stats = replace(learner._unlearned(own.id, own.source, own.task), weight=lesson.own.weight)
        with learner.student.scorer.trunks_kept():
            stats = learn_lesson_(learner, lesson, stats, before=before, timings=timings)
        return learner._accepted_(stats, lesson.own, before=before, timings=timings)


@acting_alone
@halving
def _at_task_(learner: Learner, act: Callable[[], None]) -> None:
    """Methods act; where that moves the coordinates, it makes a version. A failure leaves all as it was."""
    with learner._whole() as before:
        act()
        learner.optimizer.zero_grad()
        if same(before.coordinates, learner.adapter.coordinates()):
            learner._versions.add_(replace(before, **learner._changing()))
        else:
            _moved_(learner)


def _moved_(learner: Learner) -> None:
    """The coordinates were set to others: a version, from which the optimizer starts anew."""
    learner.version += 1
    learner.optimizer = learner._new_optimizer()
    learner.student.teachers.moved_(learner.version)
    learner.methods.moved_(learner.version)
    learner._versions.add_(learner._snapshot())
