"""Numbers with an interval: of a share, of a mean over items, of a mean over a stream, of anything resampled.

A bootstrap draws as many items as there are, with replacement, and looks at the number again. Its limits are the
bias-corrected percentiles: for a mean they are the plain ones. A maximum over noisy rows (as in forgetting) lies above
the maximum without noise, and resampling adds noise a second time: the correction takes part of that out, not all.
Where six rows differ by independent noise alone, a 95 % interval of `forgetting_max_past` holds the true 0 in about
60 % of cases (24 % without the correction), that of `bwt` in 95 %: read a small forgetting beside bwt.

Source: Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapters 13 and 14 (there "BC", with a = 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Num

from featcl.errors import FeatclError
from featcl.evaluation.metrics import known_mean

LEVEL = 0.95
RESAMPLES = 2000
AT_ONCE = 1 << 17  # draws that are held together: about what a processor's cache takes
MANY = 5000  # items from which on resampled means are taken as normal


@dataclass(frozen=True)
class Interval:
    """A number with the limits of its interval; NaN limits where it has none."""

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


def wilson(right: int, total: int, *, level: float = LEVEL) -> Interval:
    """A share with its score interval, which is good for small numbers and at 0 and 1.

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Args:
        right: How many have the property.
        total: Of how many; the share of nothing is NaN.
        level: Coverage.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22(158).
    """
    _check_level(level)
    if not 0 <= right <= total:
        raise FeatclError(f"{right} of {total} is not a share")
    if total == 0:
        return Interval(math.nan, math.nan, math.nan)
    z, share = NormalDist().inv_cdf((1 + level) / 2), right / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return Interval(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def resampled_interval(value: float, samples: Float[np.ndarray, " resamples"], *, level: float = LEVEL) -> Interval:
    """The bias-corrected percentile interval of a number.

        limits: samples at Φ(2 z₀ ± z), z₀ = Φ⁻¹(share of samples below the value, ties half)

    Args:
        value: As measured.
        samples: The same of resampled data; NaN where a resample does not determine it, infinite values are kept.
        level: Coverage.

    Returns:
        The value with its limits, which are samples themselves (no interpolation, so infinity may be one).
    """
    _check_level(level)
    known = samples[~np.isnan(samples)]
    if math.isnan(value) or not known.size:
        return Interval(value, math.nan, math.nan)
    below = ((known < value).mean() + (known <= value).mean()) / 2
    normal, edge = NormalDist(), 1 / (2 * known.size)
    bias, z = normal.inv_cdf(min(max(below, edge), 1 - edge)), normal.inv_cdf((1 + level) / 2)
    shares = [normal.cdf(2 * bias - z), normal.cdf(2 * bias + z)]
    low, high = np.quantile(known, shares, method="inverted_cdf")
    return Interval(float(value), float(low), float(high))


def bootstrap_mean(
    values: Float[np.ndarray, "*seeds items"], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean of items, or of items under several seeds, with its bootstrap interval.

    Under several seeds both are drawn: seeds and, the same for all of them, items. For two arms that are compared on
    the same items, pass the differences.

    Args:
        values: Scores of items, or differences; NaN where one was not measured.
        resamples: Of the bootstrap.
        level: Coverage.
        seed: Of the draws.

    Source: paired by item as in Koehn 2004, "Statistical significance tests for machine translation evaluation".
    """
    if values.ndim not in (1, 2):
        raise FeatclError(f"values of items, or of seeds and items, are needed, not of {values.ndim} axes")
    rng = np.random.default_rng(seed)
    if values.ndim == 1:
        samples = resampled_mean(values, resamples=resamples, rng=rng)
    else:
        means = resampled_means(values, resamples=resamples, rng=rng)  # [resamples, seeds]
        drawn = rng.integers(0, len(values), size=(resamples, len(values)))
        samples = known_mean(np.take_along_axis(means, drawn, axis=1))
    return resampled_interval(float(known_mean(values.reshape(-1))), samples, level=level)


def resampled_mean(
    values: Float[np.ndarray, " items"], *, resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    """Means of resampled items.

    How often each distinct value is drawn is multinomial; for right and wrong, and their differences, that is a few
    numbers however many items there are.
    """
    known = values[~np.isnan(values)]
    distinct, counts = np.unique(known, return_counts=True)
    if not known.size:
        return np.full(resamples, np.nan)
    if len(distinct) > 64:
        return resampled_means(known[None], resamples=resamples, rng=rng)[:, 0]
    return rng.multinomial(known.size, counts / known.size, size=resamples) @ distinct / known.size


def resampled_means(
    values: Float[np.ndarray, "rows items"], *, resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "resamples rows"]:
    """Means of every row when its items are resampled, the same items for all rows; NaN where none is known.

    Of very many items the means are drawn from their limit, N(means, Σ/n) with the items' covariance Σ, within the
    least and the greatest item.
    """
    known = ~np.isnan(values)
    if values.shape[1] >= MANY and known.all():
        return _normal_means(values, resamples=resamples, rng=rng)
    exact = np.float32 if np.isin(values, (0.0, 1.0)).all() else np.float64  # sums of zeros and ones stay whole
    filled, whole = np.where(known, values, 0.0).astype(exact), bool(known.all())
    parts: list[np.ndarray] = []
    for weights in _weights(values.shape[1], resamples=resamples, rng=rng):
        weights = weights.astype(exact)
        count = values.shape[1] if whole else weights @ known.T.astype(exact)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((weights @ filled.T).astype(np.float64) / count)
    return np.concatenate(parts) if parts else np.empty((0, len(values)))


def block_bootstrap_mean(
    values: Float[np.ndarray, " time"], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean of a series whose neighbours are alike, with an interval from resampled blocks of it.

    Blocks are ⌈n^(1/3)⌉ long and wrap around the end.

    Args:
        values: In order of time; NaN where one was not measured.
        resamples: Of the bootstrap.
        level: Coverage.
        seed: Of the draws.

    Source: Künsch 1989, Ann. Statist. 17(3); circular as in Politis & Romano 1992.
    """
    known = values[~np.isnan(values)]
    if not known.size:
        return Interval(math.nan, math.nan, math.nan)
    length = math.ceil(known.size ** (1 / 3))
    rounds = math.ceil(known.size / length)
    sums = np.cumsum(np.concatenate([[0.0], known, known[:length]]))
    blocks = (sums[length:] - sums[:-length])[: known.size] / length  # mean of the block that starts at each place
    starts = np.random.default_rng(seed).integers(0, known.size, size=(resamples, rounds))
    return resampled_interval(float(known.mean()), blocks[starts].mean(axis=1), level=level)


def _normal_means(values: np.ndarray, *, resamples: int, rng: np.random.Generator) -> np.ndarray:
    variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(values, bias=True)) / values.shape[1])
    noise = rng.standard_normal((resamples, len(values))) * np.sqrt(np.maximum(variances, 0.0))
    return np.clip(values.mean(axis=1) + noise @ axes.T, values.min(axis=1), values.max(axis=1))


def _weights(items: int, *, resamples: int, rng: np.random.Generator) -> Iterator[Num[np.ndarray, "part items"]]:
    """How often each item is drawn, for some resamples at a time."""
    if not items:
        yield np.zeros((resamples, 0))
        return
    step = max(1, AT_ONCE // items)
    for start in range(0, resamples, step):
        part = min(step, resamples - start)
        drawn = rng.integers(0, items, size=(part, items)) + items * np.arange(part)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=part * items).reshape(part, items)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise FeatclError(f"level is {level}; a coverage lies between 0 and 1, such as 0.95")
