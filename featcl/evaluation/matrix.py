"""The score matrix R with the score of every item behind it, and its file `R.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcl.errors import FeatclError
from featcl.evaluation.metrics import StreamMetrics, column_forgetting, stream_metrics
from featcl.files import write_text

Measure = Literal["accuracy", "nll"]


@dataclass(frozen=True)
class Flips:
    """Items of one column whose answer changed between two rows."""

    column: str
    right_to_wrong: tuple[str, ...]
    wrong_to_right: tuple[str, ...]
    unchanged: int


@dataclass(frozen=True)
class ScoreMatrix:
    """R[i, j] is the mean score of column j's items after training task i; row 0 is the base model.

    Attributes:
        columns: The tasks in the order in which they are trained, then the probes that never are.
        n_tasks: How many of the columns are tasks.
        measure: `accuracy` (items are right or wrong) or `nll` (nats per token, lower is better).
        rows: "base", then the name of each task trained so far.
        items: For each column, item id -> one score per row (NaN where it was not measured).
    """

    columns: tuple[str, ...]
    n_tasks: int
    measure: Measure = "accuracy"
    rows: tuple[str, ...] = ()
    items: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.columns)) != len(self.columns):
            raise FeatclError(f"the columns of R must have different names, not {list(self.columns)}")
        if not 0 <= self.n_tasks <= len(self.columns):
            raise FeatclError(f"R cannot have {self.n_tasks} task columns out of {len(self.columns)}")

    @property
    def values(self) -> np.ndarray:
        """[rows, columns] mean item scores; NaN where a column was not measured in a row."""
        return np.array([[self._mean(column, row) for column in self.columns] for row in range(len(self.rows))])

    def with_row(self, name: str, scores: Mapping[str, Mapping[str, float]]) -> ScoreMatrix:
        """A new matrix with one more row.

        Args:
            name: "base" or the task just trained.
            scores: Column -> item id -> score; a column left out is missing in this row.

        Raises:
            FeatclError: If a column is unknown, or its items are not those of the earlier rows.
        """
        unknown = sorted(set(scores) - set(self.columns))
        if unknown:
            raise FeatclError(
                f"row {name!r} of R has the unknown column {unknown[0]!r}; columns: {', '.join(self.columns)}"
            )
        items = {column: self._extended(column, name, scores.get(column)) for column in self.columns}
        return replace(self, rows=(*self.rows, name), items=items)

    def metrics(self, *, reference: Sequence[float] | None = None) -> StreamMetrics:
        """`stream_metrics` of the rows so far; of the negative values for `nll`, so that higher is better.

        Raises:
            FeatclError: If no task was trained yet, or there are more rows than the base and one per task.
        """
        trained = len(self.rows) - 1
        if trained > self.n_tasks:
            raise FeatclError(f"R has {trained} rows after the base's for {self.n_tasks} tasks; each task has one")
        kept = [*range(trained), *range(self.n_tasks, len(self.columns))]
        return stream_metrics(self._higher_is_better()[:, kept], reference=reference)

    def forgetting(self, row: int = -1) -> dict[str, float]:
        """Column -> max over all earlier rows minus this one (positive = forgotten), tasks and probes alike."""
        lost = column_forgetting(self._higher_is_better(), row % len(self.rows))
        return {column: float(lost[j]) for j, column in enumerate(self.columns)}

    def flips(self, before: int = 0, after: int = -1) -> tuple[Flips, ...]:
        """Per column, which items went from right to wrong and from wrong to right between two rows.

        Raises:
            FeatclError: If the scores are not right or wrong.
        """
        if self.measure != "accuracy":
            raise FeatclError(f"flips need items that are right or wrong; this matrix holds {self.measure}")
        return tuple(self._column_flips(column, before, after) for column in self.columns if self.items.get(column))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN is null."""
        return {
            "measure": self.measure,
            "columns": list(self.columns),
            "n_tasks": self.n_tasks,
            "rows": list(self.rows),
            "values": [[_plain(value) for value in row] for row in self.values.tolist()],
            "items": {
                column: {
                    item: [_plain(value) for value in scores] for item, scores in self.items.get(column, {}).items()
                }
                for column in self.columns
            },
        }

    def save(self, path: str | Path) -> None:
        """Write `R.json` atomically: readable, one line per matrix row and per item."""
        write_text(path, _layout(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> ScoreMatrix:
        """Read `R.json`.

        Raises:
            FeatclError: If the file is not JSON, a key is missing, an item has not one score per row, or a stored
                value is not the mean of its items.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            items = {
                column: {item: tuple(_number(value) for value in scores) for item, scores in rows.items()}
                for column, rows in data["items"].items()
            }
            matrix = cls(tuple(data["columns"]), data["n_tasks"], data["measure"], tuple(data["rows"]), items)
            stored = np.array([[_number(value) for value in row] for row in data["values"]])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise FeatclError(f"{path}: not a score matrix ({type(error).__name__}: {error})") from error
        matrix._check(path, stored)
        return matrix

    def _check(self, path: str | Path, stored: np.ndarray) -> None:
        for column, rows in self.items.items():
            for item, scores in rows.items():
                if len(scores) != len(self.rows):
                    raise FeatclError(
                        f"{path}: item {item!r} of {column!r} has {len(scores)} scores for {len(self.rows)} rows"
                    )
        if not np.allclose(stored.reshape(len(self.rows), -1), self.values, rtol=0, atol=1e-9, equal_nan=True):
            raise FeatclError(f"{path}: the values are not the means of the items' scores; one of the two was edited")

    def _higher_is_better(self) -> np.ndarray:
        return -self.values if self.measure == "nll" else self.values

    def _mean(self, column: str, row: int) -> float:
        known = [scores[row] for scores in self.items.get(column, {}).values() if not math.isnan(scores[row])]
        return sum(known) / len(known) if known else math.nan

    def _extended(self, column: str, row: str, scores: Mapping[str, float] | None) -> dict[str, tuple[float, ...]]:
        past = self.items.get(column, {})
        if scores is None:
            return {item: (*values, math.nan) for item, values in past.items()}
        if past and set(past) != set(scores):
            odd = sorted(set(past) ^ set(scores))[0]
            where = "new in" if odd in scores else "missing from"
            raise FeatclError(f"item {odd!r} of {column!r} is {where} row {row!r} of R; every row needs the same items")
        blank = (math.nan,) * len(self.rows)
        return {item: (*past.get(item, blank), float(scores[item])) for item in (past or scores)}

    def _column_flips(self, column: str, before: int, after: int) -> Flips:
        lost, won, unchanged = [], [], 0
        for item, scores in self.items[column].items():
            if scores[before] > scores[after]:
                lost.append(item)
            elif scores[before] < scores[after]:
                won.append(item)
            else:
                unchanged += not (math.isnan(scores[before]) or math.isnan(scores[after]))
        return Flips(column, tuple(lost), tuple(won), unchanged)


def _plain(value: float) -> float | int | None:
    """JSON for a score: null for NaN, 0 and 1 without a decimal point."""
    if math.isnan(value):
        return None
    return int(value) if value in (0.0, 1.0) else value


def _number(value: float | int | None) -> float:
    return math.nan if value is None else float(value)


def _layout(data: dict[str, Any]) -> str:
    """JSON with one line per matrix row and per item, so that a diff of two R.json files can be read."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    head = [f"  {line(key)}: {line(data[key])}," for key in ("measure", "columns", "n_tasks", "rows")]
    values = ",\n".join(f"    {line(row)}" for row in data["values"])
    columns = []
    for column, items in data["items"].items():
        lines = ",\n".join(f"      {line(item)}: {line(scores)}" for item, scores in items.items())
        columns.append(f"    {line(column)}: {{\n{lines}\n    }}" if items else f"    {line(column)}: {{}}")
    body = ",\n".join(columns)
    return "{\n" + "\n".join(head) + f'\n  "values": [\n{values}\n  ],\n  "items": {{\n{body}\n  }}\n}}\n'
