"""The bounded update itself: gradient, step, trust region, each on a learner whose settings say how.

g = (1/n) Σ weight_i ∇L_i     over the experiences of one step (`accumulate`), each in micro-batches
C ← step(C, g)                as often as `steps` says, with a new gradient each time
C ← C₀ + s (C - C₀)           s ≤ 1 so that KL(before ‖ after) on all their tokens is at most `max_kl_per_update`

Methods add to L, change g before the step and C after it; `featcl.methods.method` has the order.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from featcl.errors import FeatclError
from featcl.learning.gradient import Pass, accumulate_gradient_
from featcl.learning.methods import Lesson, Parameters
from featcl.learning.stats import UpdateStats
from featcl.learning.timings import Timings
from featcl.learning.trust import Reference, limit_step_
from featcl.learning.versions import Snapshot
from featcl.objectives.experience import Experience

if TYPE_CHECKING:
    from featcl.learning.learner import Learner


def learn_(
    learner: Learner, experience: Experience, stats: UpdateStats, *, before: Snapshot, timings: Timings
) -> UpdateStats:
    """Learn from an experience: gradient and step; or gradient alone, where the step waits for more experiences.

    Args:
        learner: Its adapter, optimizer and pending gradients are changed.
        experience: With its weight.
        stats: What is known of it so far.
        before: The version that is learned on from.
        timings: Where the seconds of each part go.

    Returns:
        What was measured; with the next version's number if there was a step.

    Raises:
        FeatclError: If loss, gradient or the updated model is not finite.
    """
    with _methods(learner, timings):
        lesson = learner.methods.lesson(experience)
    return learn_lesson_(learner, lesson, stats, before=before, timings=timings)


def learn_lesson_(
    learner: Learner, lesson: Lesson, stats: UpdateStats, *, before: Snapshot, timings: Timings
) -> UpdateStats:
    """As `learn_`, of what methods made of an experience."""
    first = gradient_(learner, lesson, timings)
    stats = replace(stats, loss=first.loss, losses=first.losses, grad_norm=first.grad_norm, tokens=first.tokens)
    stats = stats.with_measures(first.measures)
    if len(learner.pending) < learner.settings.accumulate:
        return stats.with_measures({"update/waiting": float(len(learner.pending))})
    trajectories = learner.pending.ids
    reference = learner.pending.reference(learner.student.scorer, first.reference)
    start = learner.methods.before_update()
    gradients = step_(learner, timings)
    for number in range(1, learner.settings.steps):
        again = gradient_(learner, _anew(lesson, number), timings)
        stats = replace(stats, tokens=stats.tokens + again.tokens)
        gradients = step_(learner, timings)
    stats = limited_(learner, stats, trajectories, reference, before=before, timings=timings)
    _taken_(learner, start, gradients, timings)
    return stats


def learn_from_pending_(learner: Learner, stats: UpdateStats, *, before: Snapshot, timings: Timings) -> UpdateStats:
    """The step of the experiences that wait; arguments as for `learn_`."""
    trajectories = learner.pending.ids
    reference = learner.pending.reference(learner.student.scorer)
    start = learner.methods.before_update()
    gradients = step_(learner, timings)
    stats = limited_(learner, stats, trajectories, reference, before=before, timings=timings)
    _taken_(learner, start, gradients, timings)
    return stats


def gradient_(learner: Learner, lesson: Lesson, timings: Timings) -> Pass:
    """Add the gradient of what is learned from to those that wait."""
    experience = lesson.own
    learner.optimizer.zero_grad()
    more: dict[str, Any] = {"added": learner.methods.terms(), "beside": lesson.beside} if learner.methods else {}
    with timings.part("gradient"):
        done = accumulate_gradient_(learner.terms, experience, learner.student, **more)
    for name, value in {**done.losses, **done.measures, "gradient norm": done.grad_norm}.items():
        check_finite(name, value, experience.trajectory.id, experience.trajectory.task)
    learner.pending.add_(experience, done, learner.adapter.parameters())
    return done


def step_(learner: Learner, timings: Timings) -> Parameters | None:
    """One step of the optimizer along the mean of the gradients that wait; those gradients, if a method wants them."""
    with timings.part("step"):
        learner.pending.spend_(learner.adapter.parameters())
        learner.methods.project_()
        before, gradients = learner.methods.before_step(), learner.methods.gradients()
        learner.optimizer.step()
        learner.adapter.after_step_()
        learner.optimizer.zero_grad()
        learner.methods.project_step_(before)
    return gradients


def _taken_(learner: Learner, start: Parameters | None, gradients: Parameters | None, timings: Timings) -> None:
    """Methods hear of the update."""
    with _methods(learner, timings):
        learner.methods.after_step_(start, gradients)


def _methods(learner: Learner, timings: Timings) -> AbstractContextManager[None]:
    return timings.part("methods") if learner.methods else nullcontext()


def limited_(
    learner: Learner,
    stats: UpdateStats,
    trajectories: tuple[str, ...],
    reference: Reference,
    *,
    before: Snapshot,
    timings: Timings,
) -> UpdateStats:
    """Scale the step back into the trust region; what it then is."""
    with timings.part("trust"):
        accepted = limit_step_(
            learner.adapter,
            before.coordinates,
            partial(reference.kl, learner.student.scorer),
            max_kl=learner.max_kl(),
        )
    what = f"the updated model's predictions (lr {learner.settings.lr})"
    check_finite(what, accepted.kl, stats.trajectory, stats.task)
    return replace(
        stats, version=stats.version + 1, kl=accepted.kl, step_scale=accepted.scale, trajectories=trajectories
    )


def check_finite(name: str, value: float, trajectory: str, task: str) -> None:
    """Raise FeatclError for a NaN or an infinity, naming what it is and which trajectory gave it."""
    if not math.isfinite(value):
        raise FeatclError(
            f"trajectory {trajectory!r} ({task}): {name} is {value}; the weights were not changed. "
            "Lower the learning rate, or look at this trajectory"
        )


def _anew(lesson: Lesson, step: int) -> Lesson:
    """The same, with randomness of its own for a further step."""

    def again(experience: Experience) -> Experience:
        derive = experience.generator
        return replace(experience, generator=lambda purpose: derive(f"{purpose}/{step}"))

    return Lesson(again(lesson.own), [again(each) for each in lesson.beside])
