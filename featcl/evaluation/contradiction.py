"""When what was true changes, and when what is said is false: recovery and resistance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from featcl.errors import FeatclError
from featcl.evaluation.curves import experiences_to
from featcl.evaluation.intervals import LEVEL, RESAMPLES, Interval, resampled_interval, resampled_mean, wilson


@dataclass(frozen=True)
class Recovery:
    """How what holds now was learned after it contradicted what held before.

    Attributes:
        before: Score on what held before, when it was contradicted.
        lowest: Lowest score on what holds now, from then on.
        experiences: From the contradiction until the score is back at `level` of `before`; infinite if never.
        final: Last score on what holds now.
        recovered: (final - lowest) / (before - lowest); NaN where there was nothing to recover.
    """

    before: float
    lowest: float
    experiences: float
    final: float
    recovered: float


@dataclass(frozen=True)
class Resistance:
    """What false claims did to what was known.

    Attributes:
        claimed: Of items that were right and about which something false was then said, the share still right.
        others: The same of items about which nothing false was said.
        net: claimed - others: what the claims did beyond plain forgetting; 0 is perfect resistance.
        adopted: Share of the claimed items now answered as was falsely said; NaN where that was not measured.
    """

    claimed: Interval
    others: Interval
    net: Interval
    adopted: Interval


def recovery(
    at: Sequence[float] | Float[np.ndarray, " points"],
    scores: Sequence[float] | Float[np.ndarray, " points"],
    *,
    contradicted: float,
    before: float,
    level: float = 0.9,
) -> Recovery:
    """min {at_i : score_i >= level · before} - contradicted, over measurements from the contradiction on.

    Args:
        at: Experiences seen at each measurement, rising.
        scores: On what holds from the contradiction on; NaN where not measured. Not negative.
        contradicted: Experiences seen when the first contradicting one came.
        before: Score on what held until then.
        level: Share of `before` that counts as recovered.

    Raises:
        FeatclError: If nothing was measured from the contradiction on, or the level is no share.
    """
    if not 0 < level <= 1:
        raise FeatclError(f"level is {level}; it is a share of the score before, above 0 and at most 1")
    places, values = np.asarray(at, dtype=float), np.asarray(scores, dtype=float)
    later = (places >= contradicted) & ~np.isnan(values)
    if not later.any():
        raise FeatclError(f"no score was measured from experience {contradicted:g} on, where the contradiction came")
    places, values = places[later], values[later]
    lowest, final = float(values.min()), float(values[-1])
    needed = float(experiences_to(places, values, target=level * before)) - contradicted
    lost = before - lowest
    return Recovery(before, lowest, needed, final, (final - lowest) / lost if lost > 0 else math.nan)


def resistance(
    before: Float[np.ndarray, " items"],
    after: Float[np.ndarray, " items"],
    *,
    claimed: Bool[np.ndarray, " items"],
    adopted: Bool[np.ndarray, " items"] | None = None,
    level: float = LEVEL,
    seed: int = 0,
) -> Resistance:
    """P(right after | right before, claimed) against P(right after | right before, not claimed).

    Args:
        before: Items right (1) or wrong (0) before the claims.
        after: The same items after them.
        claimed: True where something false was said about the item.
        adopted: True where the answer is now what was falsely said.
        level: Coverage of the intervals.
        seed: Of the draws of `net`.

    Raises:
        FeatclError: If the arrays differ in form, or items are neither right nor wrong.
    """
    if not before.shape == after.shape == claimed.shape:
        raise FeatclError("before, after and claimed are about the same items and have one entry for each")
    known = ~(np.isnan(before) | np.isnan(after))
    if not np.isin(np.concatenate([before[known], after[known]]), (0.0, 1.0)).all():
        raise FeatclError("resistance needs items that are right or wrong")
    was_right = known & (before == 1)
    groups = [after[was_right & claimed], after[was_right & ~claimed]]
    shares = [wilson(int(group.sum()), group.size, level=level) for group in groups]
    rng = np.random.default_rng(seed)
    samples = [resampled_mean(group, resamples=RESAMPLES, rng=rng) for group in groups]
    nothing = Interval(math.nan, math.nan, math.nan)
    taken = nothing if adopted is None else wilson(int((adopted & claimed).sum()), int(claimed.sum()), level=level)
    net = resampled_interval(shares[0].value - shares[1].value, samples[0] - samples[1], level=level)
    return Resistance(shares[0], shares[1], net, taken)
