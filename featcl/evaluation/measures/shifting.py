"""How far apart consecutive segments of the stream are, measured before the first update; beside R row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation.forward import Targeted
from featcl.evaluation.measures.measure import Measure, Place, Reading
from featcl.evaluation.shift import Shift, ShiftSeries, check_segments, shift_series

COLUMNS = ("before", "after", "gradient", "gradient_floor", "kl", "js", "js_floor")


class ShiftMeasure(Measure):
    """The distance from every segment to the next for the base model, in the table `shift`.

    Where segments are the stream's tasks, the row of a task has its own distance from the task before.

    Args:
        model: The model, adapted, before anything was learned.
        segments: Name -> sequences with their targets, in the order of the stream.
        layers: Blocks whose writers' weights the gradient is taken of; None: all.

    Raises:
        FeatclError: If there are fewer than two segments, one has fewer than two sequences, or a layer does not exist.
    """

    name = "shift"

    def __init__(
        self, model: Any, segments: Mapping[str, Sequence[Targeted]], *, layers: Sequence[int] | None = None
    ) -> None:
        check_segments(model, segments, layers)
        self.model, self.segments, self.layers = model, segments, layers
        self.series: ShiftSeries | None = None

    def at_row(self, place: Place) -> Reading:
        if place.first:
            self.series = shift_series(self.model, self.segments, layers=self.layers)
            rows = [[row[column] for column in COLUMNS] for row in self.series.to_dicts()]
            return Reading({}, {"shift": (COLUMNS, rows)})
        own = [step for step in self.known.steps if step.after == place.row]
        return Reading(ShiftSeries(tuple(own)).record() if own else {})

    @property
    def known(self) -> ShiftSeries:
        """What was measured at the start."""
        assert self.series is not None, "the base model's row comes first"
        return self.series

    def resume_(self, rows: Sequence[str], table: Callable[[str], list[list[Any]]]) -> None:
        found = table("shift")
        if rows and len(found) != len(self.segments) - 1:
            raise FeatclError("tables/shift.json of this run is missing or damaged: start anew with --overwrite")
        steps = tuple(Shift(**dict(zip(COLUMNS, row, strict=True))) for row in found)
        self.series = ShiftSeries(steps) if rows else None
