"""How each task of a stream ended: ideal, forgetting or failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from featcl.errors import FeatclError
from featcl.evaluation.metrics import known_mean

Label = Literal["ideal", "forgetting", "failed"]
LEARNED = 0.8  # of the way from the base model to the ceiling
TOLERATED = 0.05  # mean loss on everything else


@dataclass(frozen=True)
class TaskLabel:
    """How one task ended, as seen in the row of R just after it.

    Attributes:
        task: Its column.
        label: `ideal`: learned, and the rest kept; `forgetting`: learned at the cost of the rest; `failed`: not
            learned.
        learned: (R[j, j] - R[0, j]) / (ceiling_j - R[0, j]); 1 is all the way.
        cost: Mean over earlier tasks and general ability of R[j-1, k] - R[j, k]; NaN where there is nothing else.
        worst: The column that lost most, and `worst_cost` how much.
    """

    task: str
    label: Label
    learned: float
    cost: float
    worst: str
    worst_cost: float


def label_tasks(
    values: Float[np.ndarray, "rows columns"],
    *,
    columns: Sequence[str],
    n_tasks: int,
    ceiling: Sequence[float] | float,
    learned: float = LEARNED,
    tolerated: float = TOLERATED,
) -> tuple[TaskLabel, ...]:
    """Label every task that was trained; one whose row or base score is missing is left out.

    Args:
        values: R, higher is better, columns that may change left out.
        columns: Their names.
        n_tasks: How many of them are tasks; the rest should stay as they are.
        ceiling: What can be reached: the score of joint training for each task, or 1 for accuracy.
        learned: Share of the way from base to ceiling from which a task counts as learned.
        tolerated: Mean loss on the rest up to which it counts as kept.

    Raises:
        FeatclError: If the ceilings are not one, or one for each task.
    """
    if values.shape[1] != len(columns):
        raise FeatclError(f"R has {values.shape[1]} columns, and {len(columns)} names were given")
    ceilings = np.asarray(ceiling, dtype=float)
    if ceilings.shape not in ((), (n_tasks,)):
        raise FeatclError(f"{ceilings.size} ceilings for {n_tasks} tasks; give one, or one for each task")
    ceilings = np.broadcast_to(ceilings, (n_tasks,))
    found = (
        _label(values, columns, n_tasks, task, float(ceilings[task]), learned=learned, tolerated=tolerated)
        for task in range(min(n_tasks, len(values) - 1))
    )
    return tuple(label for label in found if label is not None)


def _label(
    values: np.ndarray, columns: Sequence[str], n_tasks: int, task: int, ceiling: float, *, learned: float,
    tolerated: float,
) -> TaskLabel | None:  # fmt: skip
    base, before, after = values[0], values[task], values[task + 1]
    way = ceiling - base[task]
    gained = after[task] - base[task]
    if np.isnan(way) or np.isnan(gained):
        return None
    share = float(gained / way) if way > 0 else 1.0 if gained >= way else 0.0
    others = [*range(task), *range(n_tasks, len(columns))]
    losses = before[others] - after[others]
    cost = float(known_mean(losses))
    worst = int(np.nanargmax(losses)) if not np.isnan(losses).all() else None
    kept = not cost > tolerated  # where there is nothing else, nothing is lost
    label: Label = "failed" if share < learned else "ideal" if kept else "forgetting"
    name = "" if worst is None else columns[others[worst]]
    return TaskLabel(columns[task], label, share, cost, name, float("nan") if worst is None else float(losses[worst]))
