"""Numbers of a score over a stream: survival of what was learned first, and experiences needed to reach a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from featcl.errors import FeatclError
from featcl.evaluation.intervals import LEVEL, wilson


@dataclass(frozen=True)
class SurvivalCurve:
    """What is left of a task, at each row from the one after it was learned.

    Attributes:
        at: Where the rows lie: experiences seen, if given, else row numbers.
        score: Mean score of all its items.
        still_right: Of the items right just after learning, the share that is right at this row.
        never_lost: Of these, the share that was right at every row up to this one: S(t), which never rises.
        low, high: Wilson limits of `never_lost`.
        items: How many items were right just after learning.
        half_life: First `at` where `never_lost` is at most one half; infinite if it stays above.
    """

    at: tuple[float, ...]
    score: tuple[float, ...]
    still_right: tuple[float, ...]
    never_lost: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    items: int
    half_life: float


def survival_curve(
    scores: Float[np.ndarray, "rows items"],
    *,
    learned: int = 1,
    at: Sequence[float] | None = None,
    level: float = LEVEL,
) -> SurvivalCurve:
    """How long what a task taught is kept.

    An item's life ends at the first row where it is wrong; no item leaves the study earlier, so the estimate of
    Kaplan & Meier is the plain share of those that live.

    Args:
        scores: The task's items at every row of R: right (1), wrong (0), not asked (NaN, such rows are left out).
        learned: The row just after the task was learned; 1 for the first task.
        at: Experiences seen at each row of R.
        level: Coverage of the limits.

    Raises:
        FeatclError: If there is no such row, places and rows differ in number, or items are not right or wrong.

    Source: Kaplan & Meier 1958, J. Am. Stat. Assoc. 53(282), without censoring.
    """
    if not 0 <= learned < len(scores):
        raise FeatclError(f"there is no row {learned} in {len(scores)} rows of scores")
    places = list(range(len(scores))) if at is None else [float(place) for place in at]
    if len(places) != len(scores):
        raise FeatclError(f"{len(places)} places for {len(scores)} rows of scores")
    asked = [row for row in range(learned, len(scores)) if not np.isnan(scores[row]).any()]
    if not asked or asked[0] != learned:
        raise FeatclError(f"row {learned} lacks items, so what was learned is not known")
    kept = scores[asked]
    if not np.isin(kept, (0.0, 1.0)).all():
        raise FeatclError("survival needs items that are right or wrong")
    right = kept[:, kept[0] == 1]
    living = np.logical_and.accumulate(right == 1, axis=0)
    shares = [wilson(int(row.sum()), right.shape[1], level=level) for row in living]
    dead = [places[row] for row, share in zip(asked, shares, strict=True) if share.value <= 0.5]
    return SurvivalCurve(
        at=tuple(float(places[row]) for row in asked),
        score=tuple(kept.mean(axis=1).tolist()) if kept.shape[1] else (math.nan,) * len(asked),
        still_right=tuple(right.mean(axis=1).tolist()) if right.shape[1] else (math.nan,) * len(asked),
        never_lost=tuple(share.value for share in shares),
        low=tuple(share.low for share in shares),
        high=tuple(share.high for share in shares),
        items=right.shape[1],
        half_life=dead[0] if dead else math.nan if not right.shape[1] else math.inf,
    )


def experiences_to(
    at: Sequence[float] | Float[np.ndarray, " points"], scores: Float[np.ndarray, "*batch points"], *, target: float
) -> Float[np.ndarray, "*batch"]:
    """min {at_i : score_i >= target}: what it takes to reach a score; infinite where it is never reached.

    Nothing is interpolated: between two measurements the later one counts, so the number is an upper bound.

    Args:
        at: Experiences (or tokens, seconds, FLOPs) before each measurement, rising.
        scores: Measured there; NaN where not. Higher is better.
        target: The score to reach.

    Raises:
        FeatclError: If the two differ in number, or `at` falls.
    """
    places = np.asarray(at, dtype=float)
    if places.shape != scores.shape[-1:]:
        raise FeatclError(f"{len(places)} places for {scores.shape[-1]} scores")
    if (np.diff(places) < 0).any():
        raise FeatclError("experiences seen cannot fall along a curve")
    reached = scores >= target
    first = places[reached.argmax(axis=-1)] if places.size else np.zeros(scores.shape[:-1])
    return np.where(reached.any(axis=-1), first, np.inf)


def data_efficiency(own: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """reference / own, both experiences to the same score: 2 needs half of what the reference needs.

    0 where only the run never reached it, infinite where only the reference did not or the run began there; NaN where
    that holds for both.

    Source: the ratio of two times to threshold; Taylor & Stone 2009, JMLR 10, name that measure of transfer.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(reference, dtype=float) / np.asarray(own, dtype=float)
