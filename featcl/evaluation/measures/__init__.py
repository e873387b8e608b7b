"""What a run measures beside R and the canaries, as its config asks: at every row of R, before updates, and in all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from featcl.evaluation.cost import COSTS, stored_bytes
from featcl.evaluation.measures.ability import HarnessMeasure, PerplexityMeasure
from featcl.evaluation.measures.before import BeforeLearning
from featcl.evaluation.measures.drifting import DriftMeasure, WatchedSae
from featcl.evaluation.measures.measure import Measure, Place, Reading
from featcl.evaluation.measures.shifting import ShiftMeasure
from featcl.evaluation.measures.spending import ACTING, EVALUATION, LEARNING, MEMORY, Spending
from featcl.evaluation.measures.standing import LeakMeasure, SampleMeasure
from featcl.files import write_json
from featcl.streams import Trajectory

__all__ = [
    "ACTING", "EVALUATION", "LEARNING", "MEMORY", "BeforeLearning", "DriftMeasure", "HarnessMeasure", "LeakMeasure",
    "Measure", "Measures", "PerplexityMeasure", "Place", "Reading", "SampleMeasure", "ShiftMeasure", "Spending",
    "WatchedSae",
]  # fmt: skip


class Measures:
    """Everything that is measured, whether it is asked for or not; what is not asked for measures nothing.

    Args:
        leak: Of the update.
        rows: What else is measured with every row of R, in this order.
        before: Scores experiences before they are learned.
        spending: Counts what passes cost.
    """

    def __init__(
        self, leak: LeakMeasure, rows: Sequence[Measure] = (), *, before: BeforeLearning | None = None,
        spending: Spending | None = None,
    ) -> None:  # fmt: skip
        self.leak, self.rows = leak, (leak, *rows)
        self.before, self.spending = before, spending

    # --- at a row of R

    def at_row(self, place: Place) -> Reading:
        """What every measure finds now, and its seconds."""
        record: dict[str, float] = {}
        tables: dict[str, Any] = {}
        for measure in self.rows:
            start = time.perf_counter()
            found = measure.at_row(place)
            record |= found.record
            tables |= found.tables
            if found.record or found.tables:
                record[f"seconds/{measure.name}"] = time.perf_counter() - start
        return Reading(record, tables)

    def smoke(self) -> dict[str, float]:
        """The harness's few items between rows."""
        asked = [measure.ask("smoke") for measure in self.rows if isinstance(measure, HarnessMeasure)]
        return {name: value for found in asked for name, value in found.items()}

    # --- around an update

    def before_update(self, trajectory: Trajectory, task: str) -> dict[str, float]:
        """How well an experience is known before it is learned."""
        if self.before is None:
            return {}
        start = time.perf_counter()
        self.before.prepare(task)  # in no phase: a resumed run does it again, and counts what it would have counted
        with self.phase(EVALUATION):
            found = self.before.score(trajectory, task)
        return {**found, "seconds/online": time.perf_counter() - start}

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A block whose passes are counted under this name."""
        return nullcontext() if self.spending is None else self.spending.phase(name)

    def spent(self) -> dict[str, float]:
        """What learning has cost since this was last asked."""
        return {} if self.spending is None else self.spending.spent()

    # --- in all

    def totals(self) -> dict[str, float]:
        """Cost of each phase so far, as scalars."""
        return {} if self.spending is None else self.spending.totals()

    def summary(self) -> dict[str, Any]:
        """What summary.json holds of it; the same seed gives the same."""
        found: dict[str, Any] = {} if self.spending is None else {"cost": self.spending.summary()}
        for measure in self.rows:
            if isinstance(measure, ShiftMeasure):
                found["shift"] = {name.removeprefix("shift/"): value for name, value in measure.known.record().items()}
        return found

    # --- state

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from, beside the tables."""
        return {} if self.spending is None else {"costs": self.spending.to_dict()}

    def resume_(self, state: Mapping[str, Any], rows: Sequence[str], table: Callable[[str], list[list[Any]]]) -> None:
        """Go on from `state()` in a run of which these rows of R are done; `table` reads the rows of a table.

        Raises:
            FeatclError: If something that is needed is not there.
        """
        if self.spending is not None:
            self.spending.load_(state.get("costs", {}))
        for measure in self.rows:
            measure.resume_(rows, table)

    def write(self, folder: Path) -> None:
        """Keep what differs from run to run beside the records: `cost.json`, with times, peaks and stored bytes."""
        if self.spending is not None:
            write_json(folder / COSTS, {"phases": self.spending.to_dict(), "stored_bytes": stored_bytes(folder)})

    def close(self) -> None:
        """Take what counts off the model."""
        if self.spending is not None:
            self.spending.meter.detach()
