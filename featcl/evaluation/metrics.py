"""Continual-learning metrics as pure functions of the score matrix R; every name carries one formula.

R is (T+1, T+probes): row 0 is the base model, row i the model after task i; columns 1..T are the tasks in the order
in which they were trained, the rest are probes that are never trained (the general suite). Scores are "higher is
better": pass the negative of a log-likelihood loss. A missing cell is NaN: the task concerned leaves that mean.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from featcl.errors import FeatclError
from featcl.tracking.names import FORMULAS

__all__ = ["FORMULAS", "StreamMetrics", "column_forgetting", "stream_metrics"]


@dataclass(frozen=True)
class StreamMetrics:
    """What `stream_metrics` returns; NaN where the matrix does not determine a number.

    Attributes:
        acc: mean_j R[T, j]. Lopez-Paz & Ranzato 2017, arXiv:1706.08840, section 2.
        bwt: mean_{j<T} R[T, j] - R[j, j]; negative = forgotten. Same source; divided by T-1 as in the paper (its
            code divides by T).
        fwt: mean_{j>1} R[j-1, j] - R[0, j]. Same source, with the base model in the place of a random one.
        forgetting_max_past: mean_{j<T} max_{0<=i<T} R[i, j] - R[T, j]; positive = forgotten. Chaudhry et al. 2018
            with the base model's row among the past, so that losing what the base could do counts.
        forgetting_chaudhry: mean_{j<T} max_{1<=i<T} R[i, j] - R[T, j]. Chaudhry et al. 2018, arXiv:1801.10112, eq. 3.
        forgetting_since_learned: the same with j <= i < T.
        forgetting_mammoth: the same with 1 <= i <= T: the last row is among its own past, so it is never negative.
            As in mammoth, `utils/metrics.py`; only to compare with numbers published that way.
        forgetting_avalanche: -bwt. As in Avalanche's `Forgetting`; only to compare with published numbers.
        learning_accuracy: mean_j R[j, j]. Riemer et al. 2019, arXiv:1810.11910.
        intransigence: mean_j reference[j] - R[j, j]; positive = harder to learn than for the reference. Chaudhry et
            al. 2018, eq. 4. NaN without a reference.
        general_change: mean over probes of R[T, p] - R[0, p]; negative = general ability lost.
        first_task_survival: R[T, 1] / R[1, 1].
        tasks: T.
        probes: Number of columns that are never trained.
        missing: Number of NaN cells in R.
    """

    acc: float
    bwt: float
    fwt: float
    forgetting_max_past: float
    forgetting_chaudhry: float
    forgetting_since_learned: float
    forgetting_mammoth: float
    forgetting_avalanche: float
    learning_accuracy: float
    intransigence: float
    general_change: float
    first_task_survival: float
    tasks: int
    probes: int
    missing: int

    def to_dict(self) -> dict[str, float]:
        """The fields by name, for `summary.json`."""
        return asdict(self)


def stream_metrics(R: ArrayLike, *, reference: ArrayLike | None = None) -> StreamMetrics:
    """Every metric of a stream from its score matrix.

    Args:
        R: (T+1, T+probes) scores, row 0 the base model; None or NaN where a cell was not measured. Not changed.
        reference: Scores of single-task or joint training, one per task (further entries are ignored).

    Returns:
        The metrics; formulas in the fields' documentation and in `FORMULAS`.

    Raises:
        FeatclError: If R is not two-dimensional, has no trained task or fewer columns than tasks, or the reference
            is too short.
    """
    scores = _matrix(R)
    n_tasks = scores.shape[0] - 1
    if n_tasks < 1:
        raise FeatclError(f"R has shape {scores.shape}; it needs the base model's row and a row for each trained task")
    if scores.shape[1] < n_tasks:
        raise FeatclError(f"R has {n_tasks} trained tasks but {scores.shape[1]} columns; each needs its own")
    tasks, probes = scores[:, :n_tasks], scores[:, n_tasks:]
    learned = np.array([tasks[j + 1, j] for j in range(n_tasks)])
    ahead = np.array([tasks[j, j] - tasks[0, j] for j in range(1, n_tasks)])
    since = np.array([_max(tasks[j + 1 : n_tasks, j]) for j in range(n_tasks - 1)])
    final = tasks[n_tasks]
    earlier = slice(0, n_tasks - 1)
    bwt = _mean(final[earlier] - learned[earlier])
    return StreamMetrics(
        acc=_mean(final),
        bwt=bwt,
        fwt=_mean(ahead),
        forgetting_max_past=_mean(_column_max(tasks[:n_tasks, earlier]) - final[earlier]),
        forgetting_chaudhry=_mean(_column_max(tasks[1:n_tasks, earlier]) - final[earlier]),
        forgetting_since_learned=_mean(since - final[earlier]),
        forgetting_mammoth=_mean(_column_max(tasks[1:, earlier]) - final[earlier]),
        forgetting_avalanche=-bwt,
        learning_accuracy=_mean(learned),
        intransigence=_mean(_reference(reference, n_tasks) - learned),
        general_change=_mean(probes[-1] - probes[0]),
        first_task_survival=float(final[0] / learned[0]) if learned[0] else float("nan"),
        tasks=n_tasks,
        probes=probes.shape[1],
        missing=int(np.isnan(scores).sum()),
    )


def column_forgetting(R: ArrayLike, row: int) -> np.ndarray:
    """Per column, max over all rows before `row` minus `row` (positive = forgotten); NaN in row 0.

    Args:
        R: Scores as in `stream_metrics`.
        row: Index of the row that is compared with its past.
    """
    scores = _matrix(R)
    if not 0 <= row < scores.shape[0]:
        raise FeatclError(f"R has rows 0 to {scores.shape[0] - 1}, there is no row {row}")
    return _column_max(scores[:row]) - scores[row]


def _matrix(R: ArrayLike) -> np.ndarray:
    try:
        scores = np.array(R, dtype=float)
    except (TypeError, ValueError) as error:
        raise FeatclError(
            "R must be a matrix of numbers with rows of equal length; use NaN for a missing cell"
        ) from error
    if scores.ndim != 2:
        raise FeatclError(f"R must have rows and columns, not the shape {scores.shape}")
    return scores


def _reference(reference: ArrayLike | None, n_tasks: int) -> np.ndarray:
    if reference is None:
        return np.full(n_tasks, np.nan)
    values = np.array(reference, dtype=float).reshape(-1)
    if len(values) < n_tasks:
        raise FeatclError(f"the reference has {len(values)} scores; it needs one for each of the {n_tasks} tasks")
    return values[:n_tasks]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _max(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else float("nan")


def _column_max(values: np.ndarray) -> np.ndarray:
    """Maximum of each column over the cells that are known; NaN where none is."""
    filled = np.where(np.isnan(values), -np.inf, values)
    highest = filled.max(axis=0, initial=-np.inf)
    return np.where(np.isneginf(highest), np.nan, highest)
