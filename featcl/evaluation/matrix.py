"""The score matrix R with the score of every item behind it, and its file `R.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcl.errors import FeatclError
from featcl.evaluation.itemscores import ItemScores
from featcl.evaluation.metrics import StreamMetrics, column_forgetting, stream_metrics
from featcl.evaluation.paired import chance_adjusted
from featcl.files import write_text
from featcl.html import Shade, table_card

Measure = Literal["accuracy", "nll"]
HEAD = ("measure", "columns", "n_tasks", "rows", "chance")  # keys of R.json before the values


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
        items: For each column, item id -> one score per row (NaN where it was not measured); kept as arrays.
        chance: Column -> the score of guessing, for columns where that is known.
    """

    columns: tuple[str, ...]
    n_tasks: int
    measure: Measure = "accuracy"
    rows: tuple[str, ...] = ()
    items: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.columns)) != len(self.columns):
            raise FeatclError(f"the columns of R must have different names, not {list(self.columns)}")
        if not 0 <= self.n_tasks <= len(self.columns):
            raise FeatclError(f"R cannot have {self.n_tasks} task columns out of {len(self.columns)}")
        unknown = [name for name in (*self.items, *self.chance) if name not in self.columns]
        if unknown:
            raise FeatclError(f"{unknown[0]!r} is no column of R; columns: {', '.join(self.columns)}")
        object.__setattr__(self, "items", {column: self._as_scores(column) for column in self.columns})

    def _as_scores(self, column: str) -> ItemScores:
        try:
            return ItemScores.of(self.items.get(column, {}), rows=len(self.rows))
        except FeatclError as error:
            raise FeatclError(f"column {column!r} of R: {error}") from error

    @property
    def values(self) -> np.ndarray:
        """[rows, columns] mean item scores; NaN where a column was not measured in a row."""
        return self._values.copy()

    @cached_property
    def _values(self) -> np.ndarray:
        means = [self.scores(column).means for column in self.columns]
        return np.stack(means, axis=1) if means else np.empty((len(self.rows), 0))

    def scores(self, column: str) -> ItemScores:
        """The items of a column with their scores as one `.array` [rows, items]."""
        scores = self.items[column]
        assert isinstance(scores, ItemScores)
        return scores

    @property
    def chance_adjusted(self) -> np.ndarray:
        """[rows, columns] values with guessing at 0 and all right at 1; NaN where the chance is not known.

        Raises:
            FeatclError: If the scores are not right or wrong.
        """
        self._require_accuracy("chance")
        return chance_adjusted(self._values, [self.chance.get(column, math.nan) for column in self.columns])

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

    def _extended(self, column: str, row: str, scores: Mapping[str, float] | None) -> ItemScores:
        try:
            return self.scores(column).with_row(scores)
        except FeatclError as error:
            raise FeatclError(f"row {row!r} of R, column {column!r}: {error}") from error

    def metrics(self, *, reference: Sequence[float] | None = None) -> StreamMetrics:
        """`stream_metrics` of the rows so far; of the negative values for `nll`, so that higher is better.

        Raises:
            FeatclError: If no task was trained yet, or there are more rows than the base and one per task.
        """
        trained = len(self.rows) - 1
        if trained > self.n_tasks:
            raise FeatclError(f"R has {trained} rows after the base's for {self.n_tasks} tasks; each task has one")
        kept = [*range(trained), *range(self.n_tasks, len(self.columns))]
        return stream_metrics(self.higher_is_better[:, kept], reference=reference)

    def forgetting(self, row: int = -1) -> dict[str, float]:
        """Column -> max over all earlier rows minus this one (positive = forgotten), tasks and probes alike."""
        lost = column_forgetting(self.higher_is_better, row % len(self.rows))
        return {column: float(lost[j]) for j, column in enumerate(self.columns)}

    def flips(self, before: int = 0, after: int = -1) -> tuple[Flips, ...]:
        """Per column, which items went from right to wrong and from wrong to right between two rows.

        Raises:
            FeatclError: If the scores are not right or wrong.
        """
        self._require_accuracy("flips")
        return tuple(self._column_flips(column, before, after) for column in self.columns if self.items[column])

    def _column_flips(self, column: str, before: int, after: int) -> Flips:
        scores = self.scores(column)
        was, now = scores.array[before], scores.array[after]

        def named(which: np.ndarray) -> tuple[str, ...]:
            return tuple(scores.ids[place] for place in np.flatnonzero(which))

        return Flips(column, named(was > now), named(was < now), int((was == now).sum()))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN is null."""
        return {
            "measure": self.measure,
            "columns": list(self.columns),
            "n_tasks": self.n_tasks,
            "rows": list(self.rows),
            "values": [[_plain(value) for value in row] for row in self.values.tolist()],
            **({"chance": dict(self.chance)} if self.chance else {}),
            "items": {column: _plain_items(self.scores(column)) for column in self.columns},
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
            parts = (tuple(data["columns"]), data["n_tasks"], data["measure"], tuple(data["rows"]), data["items"])
            stored = np.array(data["values"], dtype=float).reshape(len(data["rows"]), len(data["columns"]))
            matrix = cls(*parts, data.get("chance", {}))
        except FeatclError as error:
            raise FeatclError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FeatclError(f"{path}: not a score matrix ({type(error).__name__}: {error})") from error
        if not np.allclose(stored, matrix.values, rtol=0, atol=1e-9, equal_nan=True):
            raise FeatclError(f"{path}: the values are not the means of the items' scores; one of the two was edited")
        return matrix

    def shaded(self) -> list[list[Any]]:
        """Rows to show: the name, then scores on colours; what was just learned is framed."""
        shares = self._shares()
        return [
            [name, *(Shade(float(value), float(shares[i, j]), framed=0 < i == j + 1 <= self.n_tasks)
                     for j, value in enumerate(self._values[i]))]
            for i, name in enumerate(self.rows)
        ]  # fmt: skip

    def _shares(self) -> np.ndarray:
        """From 0 for wrong to 1 for right; for `nll` from the worst of a column to its best."""
        if self.measure == "accuracy" or not self.rows:
            return self._values
        good = self.higher_is_better
        worst, spread = np.fmin.reduce(good, axis=0), np.fmax.reduce(good, axis=0) - np.fmin.reduce(good, axis=0)
        return (good - worst) / np.where(spread > 0, spread, 1.0)

    def _repr_html_(self) -> str:
        unit = "share right" if self.measure == "accuracy" else "nats per token, lower is better"
        about = f"{unit}; a row per training, a column per task, then what is never trained; framed: just learned"
        return table_card(
            f"R: {len(self.rows)} rows, {self.n_tasks} tasks", about, ("after", *self.columns), self.shaded()
        )

    def _require_accuracy(self, what: str) -> None:
        if self.measure != "accuracy":
            raise FeatclError(f"{what}: items that are right or wrong are needed; this matrix holds {self.measure}")

    @property
    def higher_is_better(self) -> np.ndarray:
        """The values, negative for `nll`."""
        return -self.values if self.measure == "nll" else self.values


def _plain_items(scores: ItemScores) -> dict[str, list[float | int | None]]:
    rows = ([_plain(value) for value in values] for values in scores.to_lists())
    return dict(zip(scores.ids, rows, strict=True))


def _plain(value: float) -> float | int | None:
    """JSON for a score: null for NaN, 0 and 1 without a decimal point."""
    if math.isnan(value):
        return None
    return int(value) if value in (0.0, 1.0) else value


def _layout(data: dict[str, Any]) -> str:
    """JSON with one line per matrix row and per item, so that a diff of two R.json files can be read."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    head = [f"  {line(key)}: {line(data[key])}," for key in HEAD if key in data]
    values = ",\n".join(f"    {line(row)}" for row in data["values"])
    columns = []
    for column, items in data["items"].items():
        lines = ",\n".join(f"      {line(item)}: {line(scores)}" for item, scores in items.items())
        columns.append(f"    {line(column)}: {{\n{lines}\n    }}" if items else f"    {line(column)}: {{}}")
    body = ",\n".join(columns)
    return "{\n" + "\n".join(head) + f'\n  "values": [\n{values}\n  ],\n  "items": {{\n{body}\n  }}\n}}\n'
