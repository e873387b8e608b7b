"""What a run's folder holds, read for its report; a damaged file is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.tracking.jsonl import MetricsFile, read_metrics
from featcl.tracking.plots_data import Scores, Table


@dataclass(frozen=True)
class RunFiles:
    """The files of a run as plain data; what is not there is empty.

    Attributes:
        folder: Where they lie.
        config, env, summary: The JSON objects.
        metrics, ledger, quarantine: The JSON lines.
        matrix: R.json.
        tables: Name -> what `tables/` holds.
    """

    folder: Path
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: MetricsFile
    ledger: MetricsFile
    quarantine: MetricsFile
    matrix: Mapping[str, Any]
    tables: Mapping[str, Table]

    @classmethod
    def read(cls, folder: str | Path, *, summary: Mapping[str, Any] | None = None) -> RunFiles:
        """Read a run's folder.

        Args:
            folder: With any of config.json, env.json, metrics.jsonl, R.json, summary.json, ledger/ledger.jsonl,
                quarantine.jsonl, tables/*.json; one of config.json and metrics.jsonl at least.
            summary: What summary.json will hold, where it is not written yet.

        Raises:
            FeatclError: If it is no run's folder, or one of the files is damaged.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file() and not (folder / "metrics.jsonl").is_file():
            where = "no such folder" if not folder.is_dir() else "config.json and metrics.jsonl are both missing"
            raise FeatclError(f"{folder}: not a run's folder; {where}")
        config, env, matrix = (_object(folder / f"{name}.json") for name in ("config", "env", "R"))
        stored = _object(folder / "summary.json") if summary is None else dict(summary)
        stored = json.loads(json.dumps(stored, sort_keys=True), parse_constant=lambda _: None)  # as it will be read
        metrics, ledger = _lines(folder / "metrics.jsonl"), _lines(folder / "ledger" / "ledger.jsonl")
        quarantine = _lines(folder / "quarantine.jsonl")
        _check_matrix(folder / "R.json", matrix)
        return cls(folder, config, env, stored, metrics, ledger, quarantine, matrix, _tables(folder / "tables"))

    @property
    def title(self) -> str:
        """Study, arm and seed; the folder's name where the config does not say."""
        name = "/".join(str(self.config[key]) for key in ("study", "arm") if self.config.get(key))
        seed = self.config.get("seed")
        return (name or self.folder.resolve().name) + ("" if seed is None else f", seed {seed}")

    @property
    def scores(self) -> Scores | None:
        """R without its items; None where nothing was evaluated."""
        if not self.matrix.get("rows"):
            return None
        values = tuple(tuple(row) for row in self.matrix["values"])
        rows, columns = tuple(map(str, self.matrix["rows"])), tuple(map(str, self.matrix["columns"]))
        return Scores(rows, columns, values, self.matrix["n_tasks"], self.matrix["measure"])


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatclError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise FeatclError(f"{path}: expected a JSON object, not {type(data).__name__}")
    return data


def _lines(path: Path) -> MetricsFile:
    return read_metrics(path) if path.exists() else MetricsFile((), None)


def _check_matrix(path: Path, matrix: Mapping[str, Any]) -> None:
    """Every row has a value per column, and every item a score per row."""
    if not matrix:
        return
    if missing := [key for key in ("rows", "columns", "values", "items", "n_tasks", "measure") if key not in matrix]:
        raise FeatclError(f"{path}: not a score matrix; {missing[0]!r} is missing")
    rows, columns, values = matrix["rows"], matrix["columns"], matrix["values"]
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise FeatclError(f"{path}: the values are not {len(rows)} rows of {len(columns)} columns each")
    for column, items in matrix["items"].items():
        for item, scores in items.items():
            if len(scores) != len(rows):
                raise FeatclError(f"{path}: item {item!r} of {column!r} has {len(scores)} scores for {len(rows)} rows")


def _tables(folder: Path) -> dict[str, Table]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        data = _object(path)
        columns, rows = data.get("columns"), data.get("rows")
        if not isinstance(columns, list) or not isinstance(rows, list):
            raise FeatclError(f"{path}: not a table; it needs columns and rows")
        if any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
            raise FeatclError(f"{path}: a row has not {len(columns)} cells, one per column")
        found[str(data.get("name", path.stem))] = Table(tuple(map(str, columns)), tuple(map(tuple, rows)))
    return found
