"""Does projecting onto the chosen directions denoise the update? Measured so that a random span cannot fake it.

With g the full gradient on the experience, g_i those on n held-out experiences, ḡ their mean, P the projection onto
what the update may be:

    energy_ratio     ‖P g‖² / ‖g‖²                 any span of k of d dimensions has about k/d of it by chance
    snr_in_span      (‖P ḡ‖² - s²/n) / s²,         s² = Σ ‖P (g_i - ḡ)‖² / (n - 1): signal over one experience's noise
    heldout_cosine   ⟨P g, ḡ⟩ / (‖P g‖ ‖ḡ‖)        how far the projected update is what all the others want too

Each is computed for the chosen span and, from the same gradients, for spans of as many random features of the same
SAE. A random choice of features has a rank (the share of those spans below it) that is uniform: only a choice that is
better than random is high again and again. Signal and noise are unbiased, so a ratio may be below 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor

from featcl.adapters.sets import DirectionSet
from featcl.errors import FeatclError
from featcl.learning.full_gradient import Gradient, GradientSpan, full_gradient, inner, span_of
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.streams.trajectory import Trajectory

Directions = DirectionSet | Mapping[int, DirectionSet]


@dataclass(frozen=True)
class SpanReading:
    """What the head of this module defines, for one span."""

    energy_ratio: float
    snr_in_span: float
    heldout_cosine: float


class Denoising:
    """Measures the projection every few updates, before the update; it costs a backward pass per held-out experience.

    Args:
        spans: Directions of as many random features each, `featcl.features.random_features` with other seeds.
        heldout: Trajectories that are never learned from, by task or in one list; an experience is compared with
            those of its own task where there are any.
        every: Updates between two measurements; the first update is measured.
        size: How many held-out trajectories, at most.

    Raises:
        FeatclError: Without spans, with fewer than two held-out trajectories, or a number out of range.
    """

    def __init__(
        self,
        spans: Sequence[Directions],
        heldout: Mapping[str, Sequence[Trajectory]] | Sequence[Trajectory],
        *,
        every: int = 25,
        size: int = 32,
    ) -> None:
        self.directions = tuple(spans)
        self.heldout = dict(heldout) if isinstance(heldout, Mapping) else {"": tuple(heldout)}
        self.every, self.size = every, size
        if not self.directions:
            raise FeatclError("denoising: no spans of random features to compare with")
        if sum(map(len, self.heldout.values())) < 2:
            raise FeatclError("denoising: at least two held-out trajectories are needed to tell signal from noise")
        if every < 1 or size < 2:
            raise FeatclError(f"denoising: every is at least 1 and size at least 2, got {every!r} and {size!r}")
        self._random: list[GradientSpan] = []
        self._changes: int | None = None  # of the adapter's directions, to which those spans belong
        self._previous: dict[str, Tensor] = {}  # the update before

    def refuse(self, adapter: Any) -> None:
        """Raise FeatclError for an adapter that no features bound; asked once, when a learner is made."""
        if not adapter.spans():
            raise FeatclError(
                f"denoising: kind {adapter.kind!r} is bounded by no features, so nothing is projected that could be "
                "measured; leave denoising out, or choose a kind such as both"
            )

    # --- before an update

    def due(self, version: int) -> bool:
        """Whether the update after this version is measured."""
        return version % self.every == 0

    def measure(
        self,
        experience: Experience,
        student: Student,
        terms: Sequence[Term],
        *,
        encode: Callable[[Trajectory], Experience],
    ) -> dict[str, float]:
        """All measurements at the student's present coordinates, under the names that are logged.

        Args:
            experience: What is about to be learned from.
            student: The learning model.
            terms: The objectives; penalties do not count.
            encode: From a held-out trajectory to an experience.
        """
        own, random = span_of(student.adapter), self._random_spans(student.adapter)
        gradient = full_gradient(terms, experience, student)
        others = (full_gradient(terms, encode(t), student) for t in self._chosen(experience.trajectory.task))
        readings = read_spans([own, *random], gradient, others)
        return {"projection/energy_chance": own.chance, **_relative(readings[0], readings[1:])}

    def _random_spans(self, adapter: Any) -> list[GradientSpan]:
        if self._changes != adapter.changes:
            self._random = [span_of(adapter, directions) for directions in self.directions]
            self._changes = adapter.changes
        return self._random

    def _chosen(self, task: str) -> list[Trajectory]:
        """Of the task, or else of all tasks in turn."""
        own = self.heldout.get(task, ())
        if len(own) >= 2:
            return list(own[: self.size])
        turns = zip_longest(*self.heldout.values())
        return list(islice((t for turn in turns for t in turn if t is not None), self.size))

    # --- after an update

    def successive_(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
        """Cosine of this update of the coordinates with the one before it; nothing at the first, or after none."""
        update = {name: after[name] - before[name] for name in after}
        previous, self._previous = self._previous, update
        if previous.keys() != update.keys() or any(update[n].shape != previous[n].shape for n in update):
            return {}
        value = cosine(list(update.values()), [previous[name] for name in update])
        return {"projection/successive_cosine": value} if value == value else {}

    def state(self) -> dict[str, Any]:
        """Nothing but tensors."""
        return {}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """`load_tensors_` has to follow."""

    def tensors(self) -> dict[str, Tensor]:
        """The update before, by coordinate."""
        return dict(self._previous)

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self._previous = dict(tensors)


def read_spans(
    spans: Sequence[GradientSpan], gradient: Gradient, heldout: Iterable[Gradient]
) -> tuple[SpanReading, ...]:
    """The three measures for each span, from the same gradients; two full gradients are in memory at a time.

    Args:
        spans: What an update may be.
        gradient: On the experience.
        heldout: On others, one each; at least two.
    """
    total: list[Tensor] = []
    squares, count = [0.0] * len(spans), 0
    for one in heldout:
        total = [a + b for a, b in zip(total, one, strict=True)] if total else one
        for index, span in enumerate(spans):
            inside = span.coordinates(one)
            squares[index] += inner(inside, inside)
        count += 1
    whole, mean = inner(gradient, gradient), [part / count for part in total]
    readings = []
    for span, square in zip(spans, squares, strict=True):
        own, common = span.coordinates(gradient), span.coordinates(mean)
        energy, signal = inner(own, own), inner(common, common)
        noise = (square - count * signal) / (count - 1)
        length = (energy * inner(mean, mean)) ** 0.5
        readings.append(
            SpanReading(
                energy_ratio=energy / whole if whole else 0.0,
                snr_in_span=(signal - noise / count) / noise if noise > 0 else 0.0,
                heldout_cosine=inner(own, common) / length if length else 0.0,
            )
        )
    return tuple(readings)


@torch.no_grad()
def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Of all tensors together; NaN where one of the two is zero."""
    length = (inner(a, a) * inner(b, b)) ** 0.5
    return inner(a, b) / length if length else float("nan")


def _relative(own: SpanReading, random: Sequence[SpanReading]) -> dict[str, float]:
    """Each measure, its mean over the random spans, the ratio of the two, and the share of them below it."""
    logged = {}
    for name in (field.name for field in fields(SpanReading)):
        value, others = getattr(own, name), [getattr(reading, name) for reading in random]
        mean = sum(others) / len(others)
        logged |= {f"projection/{name}": value, f"projection/{name}_random": mean}
        if mean > 0:
            logged[f"projection/{name}_relative"] = value / mean
        below = sum(1.0 if other < value else 0.5 if other == value else 0.0 for other in others)
        logged[f"projection/{name}_rank"] = below / len(others)
    return logged
