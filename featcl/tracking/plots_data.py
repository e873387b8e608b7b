"""What pictures show, as plain values; `plots_read` takes them from the files of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Absent:
    """A picture that is not drawn.

    Attributes:
        reason: What is not there to draw it from.
    """

    reason: str


@dataclass(frozen=True)
class Curve:
    """Points in order."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """The score matrix as R.json has it.

    Attributes:
        rows: The base model, then the tasks in the order they were trained in.
        columns: The tasks, then what is never trained.
        values: [row, column]; None where nothing was measured.
        n_tasks: How many columns are tasks.
        measure: `accuracy`, or `nll` (lower is better).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    n_tasks: int
    measure: str = "accuracy"

    @property
    def kept(self) -> float:
        """Retention where nothing is forgotten: 1 of an accuracy, 0 of a log-likelihood."""
        return 1.0 if self.measure == "accuracy" else 0.0

    def forgetting(self, row: int, column: int) -> float | None:
        """Best of the rows before minus this row, higher is better; None where it is not known."""
        sign = 1.0 if self.measure == "accuracy" else -1.0
        now, past = self.values[row][column], [self.values[i][column] for i in range(row)]
        best = max((sign * value for value in past if is_number(value)), default=None)
        return None if best is None or not is_number(now) else best - sign * now

    def mean_forgetting(self, row: int) -> float | None:
        """Over the tasks that were trained before this row's own, and all that is never trained."""
        return mean(self.forgetting(row, j) for j in self._old(row))

    def mean_cost(self, row: int) -> float | None:
        """The row before minus this row, higher is better, over the same columns: what learning this task cost."""
        sign = 1.0 if self.measure == "accuracy" else -1.0
        pairs = [(self.values[row - 1][j], self.values[row][j]) for j in self._old(row)]
        return mean(sign * (was - now) for was, now in pairs if is_number(was) and is_number(now))

    def _old(self, row: int) -> list[int]:
        return [j for j in range(len(self.columns)) if j < min(row - 1, self.n_tasks) or j >= self.n_tasks]


@dataclass(frozen=True)
class Forgetting:
    """Forgetting while a stream is learned, over tokens seen.

    Attributes:
        canaries: Task -> its forgetting at the canaries.
        evaluations: Task -> the same at the full evaluations.
        general: Suite -> its score at the canaries.
        starts: Where a new task of the stream begins.
    """

    canaries: Mapping[str, Curve]
    evaluations: Mapping[str, Curve]
    general: Mapping[str, Curve]
    starts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Version:
    """One version of a ledger: `update` or `revert`; `on_line` is False where it was rolled back."""

    version: int
    kind: str
    task: str
    kl: float | None
    moved: float | None
    delta_norm: float | None
    on_line: bool
    learned: str = ""


@dataclass(frozen=True)
class Timeline:
    """A ledger in the order in which things happened.

    Attributes:
        versions: What was learned and what was taken back.
        marks: (number of versions before it, `rollback` or `alarm`, what it says).
    """

    versions: tuple[Version, ...]
    marks: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True)
class Bar:
    """A named number with the limits of its interval, which are the number itself where it has none."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TokenKL:
    """A text in pieces, each with the divergence of its prediction in nats."""

    pieces: tuple[str, ...]
    kl: tuple[float, ...]
    prompt: str = ""


@dataclass(frozen=True)
class Recall:
    """Recall by how much came after; `low` and `high` are the ends of intervals, or empty."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class RecallCurves:
    """Curves of several readers, and what their axes mean."""

    curves: Mapping[str, Recall]
    x_label: str
    y_label: str
    chance: float | None = None


@dataclass(frozen=True)
class Table:
    """A table as a tracker was given it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...] = field(default=())

    def column(self, name: str) -> list[Any]:
        """The cells of a column; empty where there is none."""
        place = self.columns.index(name) if name in self.columns else None
        return [] if place is None else [row[place] for row in self.rows]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Iterable[float | None]) -> float | None:
    """Of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
