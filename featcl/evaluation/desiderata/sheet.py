"""Collects the numbers of one desideratum, and says of those that cannot be had what would have to be there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from featcl.evaluation.desiderata.card import Desideratum, Number
from featcl.evaluation.desiderata.evidence import Evidence, number_of
from featcl.evaluation.intervals import Interval
from featcl.evaluation.resampling import Formula

COUNTED = "counted, so without an interval"
RowNumber = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of a row's scores and the base's, both [..., columns]


class Sheet:
    """The numbers of one desideratum, one after the other.

    Args:
        name: The desideratum.
        evidence: What they are made from.
    """

    def __init__(self, name: str, evidence: Evidence) -> None:
        self.name, self.evidence = name, evidence
        self._numbers: list[Number] = []
        self._missing: dict[str, str] = {}

    def of_row(self, name: str, formula: str, number: RowNumber, **more: Any) -> None:
        """A number of the final model, with the same number of the base model and of every reference beside it.

        Args:
            name: What it is called.
            formula: How it is made, in words.
            number: Makes it from a row of scores and the base's row.
            more: As in `put`.
        """

        def at(row: int) -> Formula:
            return lambda cells: number(cells[..., row, :], cells[..., 0, :])

        references = {other: at(row) for other, row in self.evidence.rows_of_references().items()}
        self.of_cells(name, formula, at(self.evidence.last), references=references, **more)

    def of_cells(
        self, name: str, formula: str, number: Formula, *, references: Mapping[str, Formula | float] | None = None,
        why: str = "cells of R that it needs were not measured", **more: Any,
    ) -> None:  # fmt: skip
        """A number made from all rows; its interval is that over resampled items. Arguments as in `put`."""
        drawn = self.evidence.drawn
        others = {
            other: float(made(drawn.values)) if callable(made) else made for other, made in (references or {}).items()
        }
        self.put(name, formula, drawn.interval(number), references=others, why=why, **more)

    def put(
        self, name: str, formula: str, interval: Interval, *, references: Mapping[str, float] | None = None,
        why: str = "it was not recorded", unit: str = "", note: str = "",
    ) -> None:  # fmt: skip
        """A number that has its interval already.

        Args:
            name: What it is called.
            formula: How it is made, in words.
            interval: The number with its limits; if it is NaN, the number is missing.
            references: The same number elsewhere; NaN for unknown.
            why: What would have to be there, where it is missing.
            unit: Of the value, where it is not a share.
            note: What should be known beside it.
        """
        if math.isnan(interval.value):
            self.lacks([name], why)
            return
        others = {other: value for other, value in (references or {}).items() if not math.isnan(value)}
        self._numbers.append(Number(name, interval.value, interval.low, interval.high, formula, others, unit, note))

    def count(self, name: str, formula: str, value: Any, *, note: str = COUNTED, **more: Any) -> None:
        """A number without an interval; the other arguments as in `put`."""
        self.put(name, formula, Interval(number_of(value), math.nan, math.nan), note=note, **more)

    def lacks(self, names: Sequence[str], why: str) -> None:
        """Numbers that cannot be had, and what would have to be there."""
        self._missing.update(dict.fromkeys(names, why))

    def done(self) -> Desideratum:
        """What was collected."""
        return Desideratum(self.name, tuple(self._numbers), dict(self._missing))
