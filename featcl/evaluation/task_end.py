"""What a row of R is called in the log: scores, forgetting and general ability under the names of the canaries."""

from __future__ import annotations

import math
from collections.abc import Sequence

from featcl.evaluation.matrix import ScoreMatrix


def task_end_record(matrix: ScoreMatrix, *, general: Sequence[str] = ()) -> dict[str, float]:
    """Flat scalars of the last row of R.

    Args:
        matrix: R up to the task that just ended.
        general: Its columns of general ability.

    Returns:
        `R/<column>` as measured; `forgetting/<task>`, best of all earlier rows minus this one (positive = forgotten),
        and `general/<column>`, both with higher as better: held-out text counts as minus its nats per token. What was
        not measured is left out. Over all items, where the canaries' curves of the same names are over a few.
    """
    last = dict(zip(matrix.columns, matrix.higher_is_better[-1].tolist(), strict=True))
    raw = dict(zip(matrix.columns, matrix.values[-1].tolist(), strict=True))
    lost = matrix.forgetting()
    record = {
        **{f"R/{column}": value for column, value in raw.items()},
        **{f"forgetting/{task}": lost[task] for task in matrix.columns[: matrix.n_tasks]},
        **{f"general/{column.removeprefix('general/')}": last[column] for column in general},
    }
    return {name: value for name, value in record.items() if math.isfinite(value)}
