"""Two models on the same items: which answers flipped, by how much the mean differs, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from featcl.errors import FeatclError
from featcl.evaluation.intervals import LEVEL, RESAMPLES, Interval, resampled_interval, resampled_mean


@dataclass(frozen=True)
class FlipCounts:
    """How many items changed between two models; arrays where many pairs were compared at once.

    Attributes:
        right_to_wrong: Items whose score fell.
        wrong_to_right: Items whose score rose.
        unchanged: Items with the same score.
        unknown: Items that one of the two was not asked.
    """

    right_to_wrong: np.ndarray
    wrong_to_right: np.ndarray
    unchanged: np.ndarray
    unknown: np.ndarray


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same items.

    Attributes:
        items: How many both were asked.
        difference: Mean of after - before, with a paired bootstrap interval.
        right_to_wrong, wrong_to_right: Items whose score fell, and rose.
        p_value: Exact two-sided McNemar test; NaN where items are not simply right or wrong.
    """

    items: int
    difference: Interval
    right_to_wrong: int
    wrong_to_right: int
    p_value: float


def count_flips(before: Float[np.ndarray, "*batch items"], after: Float[np.ndarray, "*batch items"]) -> FlipCounts:
    """Flips over the last axis.

    Args:
        before: Scores of items; NaN where one was not asked.
        after: Of the same items, in the same order.

    Raises:
        FeatclError: If the two differ in form.
    """
    if before.shape != after.shape:
        raise FeatclError(f"scores of the same items are compared: {before.shape} is not {after.shape}")
    worse, better, same = before > after, before < after, before == after  # all False where one is NaN
    counts = [which.sum(axis=-1) for which in (worse, better, same)]
    return FlipCounts(*counts, unknown=before.shape[-1] - sum(counts))


def compare_items(
    before: Float[np.ndarray, " items"],
    after: Float[np.ndarray, " items"],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> PairedComparison:
    """Two models on the same items: the paired difference, its interval, and the exact test of the flips.

    Args:
        before: Scores of items, higher is better; NaN where one was not asked: then the pair is left out.
        after: Of the same items, in the same order.
        resamples: Of the paired bootstrap.
        level: Its coverage.
        seed: Of its draws.

    Source: McNemar 1947, Psychometrika 12(2); Dietterich 1998, Neural Computation 10(7), section 3.1.
    """
    flips = count_flips(before, after)
    differences = after - before
    lost, won = int(flips.right_to_wrong), int(flips.wrong_to_right)
    samples = resampled_mean(differences, resamples=resamples, rng=np.random.default_rng(seed))
    known = differences[~np.isnan(differences)]
    value = float(known.mean()) if known.size else math.nan
    graded = np.isin(differences, (-1.0, 0.0, 1.0)) | np.isnan(differences)
    p_value = mcnemar_exact(lost, won) if graded.all() else math.nan
    return PairedComparison(known.size, resampled_interval(value, samples, level=level), lost, won, p_value)


def mcnemar_exact(right_to_wrong: int, wrong_to_right: int) -> float:
    """Exact two-sided McNemar test that an item is as likely to be lost as won.

        p = min(1, 2 Σ_{k ≤ min(b, c)} C(b + c, k) 2^-(b + c))

    Args:
        right_to_wrong: b, items that only the first model has right.
        wrong_to_right: c, items that only the second has right.

    Returns:
        The probability of flips at least this one-sided; 1 where nothing flipped.

    Source: McNemar 1947, Psychometrika 12(2), with the binomial distribution in the place of its normal limit.
    """
    if right_to_wrong < 0 or wrong_to_right < 0:
        raise FeatclError(f"{right_to_wrong} and {wrong_to_right} flips: counts are not negative")
    total, fewer = right_to_wrong + wrong_to_right, min(right_to_wrong, wrong_to_right)
    k = np.arange(1, fewer + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((total - k + 1) / k))])  # log C(n, k)
    highest = log_choose.max()
    log_tail = highest + math.log(np.exp(log_choose - highest).sum()) - total * math.log(2)
    return min(1.0, 2 * math.exp(log_tail))


def chance_adjusted(scores: ArrayLike, chance: ArrayLike) -> np.ndarray:
    """Scores with guessing at 0 and all right at 1: (score - chance) / (1 - chance); below chance is negative.

    Args:
        scores: Shares of right answers, or single items.
        chance: Probability of a right answer by guessing (1 / options for multiple choice), of a form that broadcasts;
            NaN where it is not known.

    Raises:
        FeatclError: If a chance is not in [0, 1).

    Source: correction for guessing, Frary 1988, Educ. Meas.: Issues and Practice 7(2), with all items answered.
    """
    guess = np.asarray(chance, dtype=float)
    bad = guess[(guess < 0) | (guess >= 1)]
    if bad.size:
        raise FeatclError(f"chance is {bad[0]:g}; it is a probability below 1, such as 1 / options")
    return (np.asarray(scores, dtype=float) - guess) / (1 - guess)
