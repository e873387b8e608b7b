"""R resampled by item, so that any number that is made from it gets an interval.

Items are drawn within their column, the same draws for every row: rows stay paired, and so do the rows of reference
runs on the same items. The interval is over items of one run; over seeds, compare runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from featcl.errors import FeatclError
from featcl.evaluation.intervals import LEVEL, Interval, resampled_interval, resampled_means
from featcl.evaluation.itemscores import ItemScores
from featcl.evaluation.matrix import ScoreMatrix
from featcl.evaluation.metrics import metric_arrays

RESAMPLES = 1000
SINGLE = "single"  # the reference in which every task is learned alone, from the base
Cells = Float[np.ndarray, "*batch rows columns"]
Formula = Callable[[Cells], Float[np.ndarray, "*batch"]]


@dataclass(frozen=True)
class Resampled:
    """R and many resamples of it; higher is better.

    Attributes:
        columns: As in R.
        rows: As in R, then the names of the references.
        values: [rows, columns], as measured.
        samples: [resamples, rows, columns].
        level: Coverage of the intervals.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: Float[np.ndarray, "rows columns"]
    samples: Float[np.ndarray, "resamples rows columns"]
    level: float = LEVEL

    def interval(self, formula: Formula) -> Interval:
        """A number with its interval.

        Args:
            formula: Makes one number from the cells [..., rows, columns], for any leading axes.
        """
        return resampled_interval(float(formula(self.values)), formula(self.samples), level=self.level)


def resample(
    matrix: ScoreMatrix,
    *,
    references: Mapping[str, ScoreMatrix] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Resampled:
    """Draw the items of every column again and again.

    Args:
        matrix: R with its items.
        references: Name -> R of another run; its last row is added as a row, in the columns that both have. Of the
            one named `single`, in which every task is learned alone, a task's score is that just after learning it.
        resamples: How often.
        level: Coverage of the intervals.
        seed: Of the draws.

    Raises:
        FeatclError: If a reference measures something else, or has other items in a column that both have.
    """
    others = dict(references or {})
    sign = -1.0 if matrix.measure == "nll" else 1.0
    for name, other in others.items():
        if other.measure != matrix.measure:
            raise FeatclError(f"the reference {name!r} holds {other.measure}, this run {matrix.measure}")
    values, samples = [], []
    for place, column in enumerate(matrix.columns):
        own = matrix.scores(column)
        added = [_reference_row(own, other, column, name) for name, other in others.items()]
        stacked = sign * np.vstack([own.array, *added])
        values.append(ItemScores(own.ids, stacked).means)
        samples.append(resampled_means(stacked, resamples=resamples, rng=np.random.default_rng([seed, place])))
    rows = (*matrix.rows, *others)
    if not values:
        raise FeatclError("R has no columns; there is nothing to draw from")
    return Resampled(matrix.columns, rows, np.stack(values, axis=-1), np.stack(samples, axis=-1), level)


def metric_intervals(
    matrix: ScoreMatrix,
    *,
    reference: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """`ScoreMatrix.metrics` with an interval for each.

    Args:
        matrix: R with its items.
        reference: Scores of single-task or joint training, taken as given.
        resamples: Of the bootstrap.
        level: Coverage.
        seed: Of the draws.

    Raises:
        FeatclError: As `ScoreMatrix.metrics`.
    """
    measured = matrix.metrics(reference=reference)
    drawn = resample(matrix, resamples=resamples, level=level, seed=seed)
    kept = [*range(len(matrix.rows) - 1), *range(matrix.n_tasks, len(matrix.columns))]
    found = metric_arrays(drawn.samples[..., kept], reference=reference)
    return {name: resampled_interval(getattr(measured, name), samples, level=level) for name, samples in found.items()}


def _reference_row(own: ItemScores, other: ScoreMatrix, column: str, name: str) -> np.ndarray:
    """A reference's scores of a column's items, in their order; NaN where it does not have the column."""
    theirs = other.scores(column) if column in other.columns else None
    if not theirs or not other.rows:
        return np.full((1, len(own)), np.nan)
    odd = sorted(set(theirs.ids) ^ set(own.ids))
    if odd:
        where = "not in this run" if odd[0] in theirs else "only in this run"
        raise FeatclError(f"the reference {name!r} has other items in {column!r}: {odd[0]!r} is {where}")
    row = other.rows.index(column) if name == SINGLE and column in other.rows else len(other.rows) - 1
    place = {item: index for index, item in enumerate(theirs.ids)}
    return theirs.array[[row]][:, [place[item] for item in own.ids]]
