"""What the files of a run and of its reference runs hold, ready for the numbers of a report card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featcl.errors import FeatclError
from featcl.evaluation.cost import COSTS
from featcl.evaluation.matrix import ScoreMatrix
from featcl.evaluation.online import EXPERIENCES
from featcl.evaluation.relations import Relations
from featcl.evaluation.resampling import Resampled
from featcl.tracking.jsonl import read_metrics

FLOPS = ("cost/forward_flops", "cost/backward_flops")  # of one update, in its record
# kinds of records of learning -> what their seconds are called
LEARNING = {**dict.fromkeys(EXPERIENCES, "seconds/update"), "methods": "seconds/methods"}
JOINT = "joint"
NO_JOINT = "give the folder of a joint run: references={'joint': …}"


@dataclass(frozen=True)
class Spent:
    """What had been spent when each row of R was measured."""

    experiences: tuple[float, ...]
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    flops: tuple[float, ...]


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Attributes:
        path: Its folder.
        matrix: R.json.
        records: metrics.jsonl, as far as it can be read.
        summary: summary.json, empty where the run has not finished.
        notes: What was wrong with the files.
        costs: `phases` of cost.json; empty where costs were not measured.
    """

    path: Path
    matrix: ScoreMatrix
    records: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    costs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, *, summary: Mapping[str, Any] | None = None) -> RunFiles:
        """Read a run's folder; a metrics file that is cut off is read up to there, and that is noted.

        Args:
            path: The folder.
            summary: What summary.json will hold, where it is not written yet.

        Raises:
            FeatclError: If there is no R.json, or a file is damaged.
        """
        path = Path(path)
        if not (path / "R.json").is_file():
            raise FeatclError(f"{path}: no R.json; this is no run's folder, or nothing was evaluated yet")
        metrics = path / "metrics.jsonl"
        found = read_metrics(metrics) if metrics.is_file() else None
        notes = [found.torn] if found is not None and found.torn else []
        if found is None:
            notes.append(f"{metrics} is missing: nothing is known of the course of the run")
        summary = _read_object(path / "summary.json") if summary is None else summary
        if not summary:
            notes.append(f"{path}: no summary.json; this run has not finished")
        notes += [f"changed by hand after it was measured: {what}" for what in summary.get("changed_by_hand", ())]
        matrix = ScoreMatrix.load(path / "R.json")
        unknown = int(np.isnan(matrix.values).sum())
        if unknown:
            notes.append(f"R has {unknown} cells that were not measured; the columns concerned leave the means")
        costs = _read_object(path / COSTS).get("phases", {})
        return cls(path, matrix, () if found is None else found.records, summary, tuple(notes), costs)

    @property
    def name(self) -> str:
        """Study, arm and seed, as far as the summary says them; else the folder."""
        said = [str(self.summary[key]) for key in ("study", "arm") if self.summary.get(key) is not None]
        return f"{'/'.join(said)}, seed {self.summary.get('seed')}" if said else str(self.path)

    @property
    def spent(self) -> Spent | str:
        """What had been spent at each row of R; or why that is not known."""
        total = {"experiences": 0.0, "seconds": 0.0, "flops": 0.0}
        found: list[tuple[str, float, float, float, float]] = []
        for record in self.records:
            if record.get("kind") == "quarantined" or (record.get("kind") == "update" and "train/loss" in record):
                total["experiences"] += 1  # the step of experiences that waited is no new one and has no loss
            if (seconds := LEARNING.get(record.get("kind", ""))) is not None:
                total["seconds"] += number_of(record.get(seconds))
                total["flops"] += sum(number_of(record.get(name)) for name in FLOPS)
            if record.get("kind") == "evaluation":
                tokens = number_of(record.get("tokens_seen"))
                found.append((str(record.get("row")), total["experiences"], tokens, total["seconds"], total["flops"]))
        if tuple(row for row, *_ in found) != self.matrix.rows:
            return f"metrics.jsonl records {len(found)} evaluations, R.json has {len(self.matrix.rows)} rows"
        _, *columns = zip(*found, strict=True)
        return Spent(*(tuple(column) for column in columns))

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """(experiences seen, value) at every record that has this name."""
        seen, places, values = 0, [], []
        for record in self.records:
            seen += record.get("kind") == "quarantined" or (record.get("kind") == "update" and "train/loss" in record)
            if name in record:
                places.append(float(seen))
                values.append(number_of(record[name]))
        return places, values


@dataclass(frozen=True)
class Evidence:
    """A run beside its references.

    Attributes:
        run: The run.
        references: Name -> reference run.
        drawn: R and the references' rows, resampled by item.
        relations: How the columns belong together.
        target: Mean score over tasks that counts as learned; None where none was given.
        seed: Of draws.
    """

    run: RunFiles
    references: Mapping[str, RunFiles]
    drawn: Resampled
    relations: Relations
    target: float | None
    seed: int

    @property
    def tasks(self) -> list[int]:
        """Columns of the tasks that were trained."""
        return list(range(min(self.run.matrix.n_tasks, self.last)))

    @property
    def general(self) -> list[int]:
        """Columns that should stay as they are: neither tasks nor probes that may change."""
        matrix, probes = self.run.matrix, self.run.summary.get("probes", {})
        return [j for j in range(matrix.n_tasks, len(matrix.columns)) if matrix.columns[j] not in probes]

    @property
    def last(self) -> int:
        """The run's own last row."""
        return len(self.run.matrix.rows) - 1

    @property
    def graded(self) -> bool:
        """Whether items are right or wrong."""
        return self.run.matrix.measure == "accuracy"

    def column(self, name: str) -> int:
        """Where a column of R stands."""
        return self.run.matrix.columns.index(name)

    def row(self, reference: str) -> int:
        """Where the row of a reference stands in `drawn`."""
        return len(self.run.matrix.rows) + list(self.references).index(reference)

    def rows_of_references(self) -> dict[str, int]:
        """The base and every reference -> the row with its scores."""
        return {"base": 0, **{name: self.row(name) for name in self.references}}


def number_of(value: Any) -> float:
    """What a record holds under a name; NaN where that is nothing."""
    return float(value) if isinstance(value, int | float) else math.nan


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatclError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FeatclError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value
