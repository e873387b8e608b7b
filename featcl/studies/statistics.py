"""Two arms compared where they acquire, or move, equally much; paired by seed and by item.

A sweep over learning rates gives an arm, for every seed, points (x, y). On a **frontier** x is acquisition and y is
retention, both better when higher: points that another one beats in both are left out, between the others it is
straight, and to the left of the first it is flat, since that point acquires at least as much. At **matched ‖ΔW‖**,
x = log ‖ΔW‖, nothing is better or worse, and nothing is said outside of what was measured. Two arms are compared on
what both cover:

    gap = mean over x in [max of the two lowest, min of the two highest] of y_one(x) - y_other(x)

or at one x. The mean gap over seeds has a 95 % interval from drawing seeds and, the same for all runs, items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from featcl.errors import FeatclError
from featcl.evaluation import Interval
from featcl.evaluation.intervals import RESAMPLES, resampled_interval
from featcl.studies.comparison import FEWEST, comparisons_note
from featcl.studies.points import FinishedRun, over_seeds, settings

ACQUIRED = "learning_accuracy"
KEPT = {"forgetting_max_past": -1.0, "general_change": 1.0}  # with the sign that makes higher better
SHARE = 0.95  # of the rival's best acquisition, at which retention is read as one number
NORM = "delta_norm"


@dataclass(frozen=True, eq=False)
class Sweep:
    """What an arm reached at each of its settings, seed by seed; row 0 as measured, the others on resampled items.

    Attributes:
        arm: Its name.
        x: What is matched.
        y: What is compared.
    """

    arm: str
    x: Mapping[int, Float[np.ndarray, "samples points"]]
    y: Mapping[int, Float[np.ndarray, "samples points"]]


@dataclass(frozen=True)
class Matched:
    """One comparison of an arm with its rival.

    Attributes:
        arm, rival: Their names.
        measure: What is compared; higher is better.
        matched: On what: "acquisition" or "‖ΔW‖".
        at: The x at which, or None for the mean over what both cover.
        gap: Arm minus rival, with its interval; NaN where they have no x in common.
        seeds: That both have, with some x in common.
        undetermined: Share of the resamples that gave no gap, and are not in the interval.
    """

    arm: str
    rival: str
    measure: str
    matched: str
    at: float | None
    gap: Interval
    seeds: tuple[int, ...]
    undetermined: float

    @property
    def screening(self) -> bool:
        """Whether there are too few seeds for a claim."""
        return len(self.seeds) < FEWEST

    def __str__(self) -> str:
        where = "" if self.at is None else f" at {self.at:.3f}"
        found = f"{self.gap.value:+.3f} [{self.gap.low:+.3f}, {self.gap.high:+.3f}]"
        found = found if math.isfinite(self.gap.value) else "nothing in common"
        few = f"; screening, {len(self.seeds)} seeds" if self.screening else f"; {len(self.seeds)} seeds"
        return f"{self.arm} − {self.rival}, {self.measure} at matched {self.matched}{where}: {found}{few}"


@dataclass(frozen=True)
class StudyStatistics:
    """Every arm against one rival.

    Attributes:
        rival: Its name.
        comparisons: All that were made.
    """

    rival: str
    comparisons: tuple[Matched, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is null."""
        found = [asdict(each) | {"gap": _plain(each.gap), "screening": each.screening} for each in self.comparisons]
        return {"rival": self.rival, "count": len(self.comparisons), "comparisons": found}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.comparisons), comparisons_note(len(self.comparisons), self.rival)])


def study_statistics(runs: Sequence[FinishedRun], *, rival: str) -> StudyStatistics:
    """Compare every arm of a study with one, over their sweeps of learning rates.

    Per measure of retention (forgetting, change of the general suite): the frontier over what both cover, the frontier
    at 95 % of the rival's best acquisition, and retention at matched ‖ΔW‖; besides, acquisition at matched ‖ΔW‖.

    Args:
        runs: All finished runs of the study.
        rival: An arm's name, without its learning rate.

    Raises:
        FeatclError: If no run belongs to the rival, or the runs measure different things.
    """
    lines: dict[str, list[FinishedRun]] = {}
    for setting in settings(runs):
        lines.setdefault(setting.line, []).extend(setting.runs)
    if rival not in lines:
        raise FeatclError(f"no finished run of the arm {rival!r}; there are {', '.join(lines)}")
    best = SHARE * _best(lines[rival])
    found = []
    for arm in (name for name in lines if name != rival):
        pairs = {measure: [_sweep(name, lines[name], ACQUIRED, measure) for name in (arm, rival)] for measure in KEPT}
        norms = {measure: [_sweep(name, lines[name], NORM, measure) for name in (arm, rival)]
                 for measure in (ACQUIRED, *KEPT)}  # fmt: skip
        found += [compare_frontiers(*pair, measure=name) for name, pair in pairs.items()]
        found += [compare_frontiers(*pair, measure=name, at=best) for name, pair in pairs.items()]
        found += [compare_at_norm(*pair, measure=name) for name, pair in norms.items()]
    return StudyStatistics(rival, tuple(found))


def compare_frontiers(one: Sweep, other: Sweep, *, measure: str, at: float | None = None) -> Matched:
    """Retention at matched acquisition: the mean gap of two frontiers, or the gap at one acquisition."""

    def gap(x: list[np.ndarray], y: list[np.ndarray]) -> float:
        lines = [frontier(*points) for points in zip(x, y, strict=True)]
        low, high = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
        if at is not None:
            low = high = at if at <= high else math.nan
        return _mean_gap(lines[0], lines[1], min(low, high), high)  # one that always acquires more is flat to its left

    return _compare(one, other, gap, measure=measure, matched="acquisition", at=at)


def compare_at_norm(one: Sweep, other: Sweep, *, measure: str) -> Matched:
    """A measure at matched ‖ΔW‖: the mean gap over the log of the norms that both cover."""

    def gap(x: list[np.ndarray], y: list[np.ndarray]) -> float:
        lines = [curve(np.log(points), values) for points, values in zip(x, y, strict=True) if (points > 0).all()]
        if len(lines) < 2:  # one that never moved
            return math.nan
        low, high = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
        return _mean_gap(lines[0], lines[1], low, high) if low <= high else math.nan

    return _compare(one, other, gap, measure=measure, matched="‖ΔW‖", at=None)


def frontier(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> tuple[np.ndarray, np.ndarray]:
    """The points that no other one beats in both, from the lowest x to the highest: y falls."""
    kept: list[tuple[float, float]] = []
    for place, value in sorted(zip(x.tolist(), y.tolist(), strict=True), reverse=True):
        if not kept or value > kept[-1][1]:
            kept.append((place, value))
    return np.array([p for p, _ in reversed(kept)]), np.array([v for _, v in reversed(kept)])


def curve(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> tuple[np.ndarray, np.ndarray]:
    """The points by x; those with the same x are one, at their mean."""
    places = np.unique(x)
    return places, np.array([y[x == place].mean() for place in places])


def _mean_gap(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], low: float, high: float
) -> float:
    """Mean over [low, high] of the difference of two lines; straight between points, flat outside of them."""
    if math.isnan(low) or math.isnan(high):
        return math.nan
    knots = np.unique(np.clip(np.concatenate([one[0], other[0], [low, high]]), low, high))
    gaps = np.interp(knots, *one) - np.interp(knots, *other)
    if low == high:
        return float(gaps[0])
    return float(((gaps[1:] + gaps[:-1]) / 2) @ np.diff(knots) / (high - low))


def _compare(one: Sweep, other: Sweep, gap: Any, *, measure: str, matched: str, at: float | None) -> Matched:
    seeds = [seed for seed in one.x if seed in other.x]
    gaps: dict[int, np.ndarray] = {}
    for seed in seeds:
        parts = [(sweep.x[seed], sweep.y[seed]) for sweep in (one, other)]
        rows = min(len(values) for part in parts for values in part)
        found = [gap([x[row] for x, _ in parts], [y[row] for _, y in parts]) for row in range(rows)]
        if not math.isnan(found[0]):
            gaps[seed] = np.array(found)
    if not gaps:
        nothing = Interval(math.nan, math.nan, math.nan)
        return Matched(one.arm, other.arm, measure, matched, at, nothing, (), 1.0)
    value = float(np.mean([found[0] for found in gaps.values()]))
    rows = min(len(found) for found in gaps.values())
    items = np.stack([found[1:rows] if rows > 1 else np.repeat(found[:1], RESAMPLES) for found in gaps.values()])
    samples = over_seeds(items)
    interval = resampled_interval(value, samples)
    if rows == 1 and len(gaps) == 1:  # one seed, and no items: nothing says how sure it is
        interval = Interval(value, math.nan, math.nan)
    return Matched(one.arm, other.arm, measure, matched, at, interval, tuple(gaps), float(np.isnan(samples).mean()))


def _sweep(arm: str, runs: Sequence[FinishedRun], x: str, y: str) -> Sweep:
    """The points of an arm; of runs that lack a number, none."""
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run in runs:
        values = _values(run, x), _values(run, y)
        if not any(math.isnan(each[0]) for each in values):
            found.setdefault(int(run.files.config.get("seed", 0)), []).append(values)
    columns = [{seed: _columns([pair[side] for pair in pairs]) for seed, pairs in found.items()} for side in (0, 1)]
    return Sweep(arm, *columns)


def _values(run: FinishedRun, name: str) -> np.ndarray:
    """[samples] of a number, the measured one first; the norm does not depend on items."""
    if name == NORM:
        norm = run.files.summary.get(NORM)
        return np.full(1 + RESAMPLES, math.nan if norm is None else float(norm))
    sign = KEPT.get(name, 1.0)
    return sign * np.concatenate([[run.metric(name)], run.samples.get(name, ())])


def _columns(values: Sequence[np.ndarray]) -> np.ndarray:
    """[samples, points]; without resamples where one of them has none."""
    rows = min(map(len, values))
    return np.stack([each[:rows] for each in values], axis=-1)


def _best(runs: Sequence[FinishedRun]) -> float:
    """Mean over seeds of the highest acquisition."""
    best: dict[Any, float] = {}
    for run in runs:
        value, seed = run.metric(ACQUIRED), run.files.config.get("seed")
        if math.isfinite(value):
            best[seed] = max(value, best.get(seed, -math.inf))
    return float(np.mean(list(best.values()))) if best else math.nan


def _plain(found: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(found).items()}
