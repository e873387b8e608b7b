"""Continual-learning metrics as pure functions of the score matrix R; every name carries one formula.

R is (T+1, T+probes): row 0 is the base model, row i the model after task i; columns 1..T are the tasks in the order
in which they were trained, the rest are probes that are never trained (the general suite). Scores are "higher is
better": pass the negative of a log-likelihood loss. A missing cell is NaN: the task concerned leaves that mean.

`metric_arrays` computes the same for many matrices at once, as a bootstrap needs it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from featcl.errors import FeatclError
from featcl.tracking.names import FORMULAS

__all__ = ["FORMULAS", "StreamMetrics", "column_forgetting", "known_mean", "metric_arrays", "stream_metrics"]


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
        first_task_survival: R[T, 1] / R[1, 1]; NaN where R[1, 1] is not positive, since only then is it a share.
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
        The metrics; formulas and sources in the fields' documentation, formulas also in `FORMULAS`.

    Raises:
        FeatclError: If R is not two-dimensional, has no trained task or fewer columns than tasks, or the reference
            is too short.
    """
    scores = _matrix(R)
    n_tasks = scores.shape[0] - 1
    found = metric_arrays(scores, reference=reference)
    counts = {"tasks": n_tasks, "probes": scores.shape[1] - n_tasks, "missing": int(np.isnan(scores).sum())}
    return StreamMetrics(**{name: float(value) for name, value in found.items()}, **counts)


def metric_arrays(
    scores: Float[np.ndarray, "*batch rows columns"], *, reference: ArrayLike | None = None
) -> dict[str, Float[np.ndarray, "*batch"]]:
    """The metrics of `StreamMetrics`, without its counts, for one matrix or many of the same form.

    Args:
        scores: As R in `stream_metrics`, after any leading axes.
        reference: As in `stream_metrics`.

    Returns:
        Name -> one number per matrix.

    Raises:
        FeatclError: As `stream_metrics`.
    """
    n_tasks = scores.shape[-2] - 1
    if n_tasks < 1:
        raise FeatclError(f"R has shape {scores.shape}; it needs the base model's row and a row for each trained task")
    if scores.shape[-1] < n_tasks:
        raise FeatclError(f"R has {n_tasks} trained tasks but {scores.shape[-1]} columns; each needs its own")
    tasks, probes = scores[..., :n_tasks], scores[..., n_tasks:]
    order = np.arange(n_tasks)
    base, final = tasks[..., 0, :], tasks[..., -1, :]
    before, learned = tasks[..., order, order], tasks[..., order + 1, order]  # R[j-1, j] and R[j, j]
    past = tasks[..., :-1, :]  # rows 0..T-1
    since = np.where(np.arange(n_tasks)[:, None] > order, past, np.nan)  # only rows j..T-1 of column j
    bwt = known_mean((final - learned)[..., :-1])

    def forgetting(rows: np.ndarray) -> np.ndarray:
        return known_mean((_column_max(rows) - final)[..., :-1])

    found = {
        "acc": known_mean(final),
        "bwt": bwt,
        "fwt": known_mean((before - base)[..., 1:]),
        "forgetting_max_past": forgetting(past),
        "forgetting_chaudhry": forgetting(past[..., 1:, :]),
        "forgetting_since_learned": forgetting(since),
        "forgetting_mammoth": forgetting(tasks[..., 1:, :]),
        "forgetting_avalanche": -bwt,
        "learning_accuracy": known_mean(learned),
        "intransigence": known_mean(_reference(reference, n_tasks) - learned),
        "general_change": known_mean(probes[..., -1, :] - probes[..., 0, :]),
        "first_task_survival": _share(final[..., 0], learned[..., 0]),
    }
    assert set(found) == {field.name for field in fields(StreamMetrics)} - {"tasks", "probes", "missing"}
    return found


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


def known_mean(values: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch"]:
    """Mean over the last axis of what is not NaN; NaN where nothing is known."""
    unknown = np.isnan(values)
    count = values.shape[-1] - unknown.sum(axis=-1)
    total = np.where(unknown, 0.0, values).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


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


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    positive = whole > 0
    return np.where(positive, part / np.where(positive, whole, 1.0), np.nan)


def _column_max(values: np.ndarray) -> np.ndarray:
    """Maximum of each column over the cells that are known; NaN where none is."""
    filled = np.where(np.isnan(values), -np.inf, values)
    highest = filled.max(axis=-2, initial=-np.inf)
    return np.where(np.isneginf(highest), np.nan, highest)
