"""What the final numbers of a run say of its score matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from featcl.evaluation.board import without_columns
from featcl.evaluation.matrix import ScoreMatrix

APART = ("learning_accuracy", "tasks", "probes", "missing")  # metrics that do not speak of what came before


def matrix_summary(matrix: ScoreMatrix, probes: Sequence[str], *, alone: bool) -> dict[str, Any]:
    """The metrics of a stream, and the final scores of probes that may change.

    Args:
        matrix: R.
        probes: Columns that leave the metrics.
        alone: Whether each task was learned from the base; then metrics that speak of what came before are NaN.
    """
    kept = without_columns(matrix, probes)
    last = {column: float(matrix.values[-1, matrix.columns.index(column)]) for column in probes}
    return {"measure": matrix.measure, "metrics": _metrics(kept, alone=alone), "probes": last}


def long_rows(matrix: ScoreMatrix) -> list[list[Any]]:
    """R as rows of (row, column, score)."""
    values = matrix.values.tolist()
    return [[row, column, values[i][j]] for i, row in enumerate(matrix.rows) for j, column in enumerate(matrix.columns)]


def _metrics(matrix: ScoreMatrix, *, alone: bool) -> dict[str, float]:
    found = matrix.metrics().to_dict()
    if not alone:
        return found
    general = matrix.values[:, matrix.n_tasks :] * (-1.0 if matrix.measure == "nll" else 1.0)
    change = float((general[1:] - general[:1]).mean()) if general.size else math.nan
    return {name: value if name in APART else math.nan for name, value in found.items()} | {"general_change": change}
