"""What a finished run measured, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation.matrix import ScoreMatrix
from featcl.evaluation.metrics import FORMULAS
from featcl.html import card, note, table


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        path: Its folder.
        matrix: R, with the score of every item.
        summary: The final numbers, as in summary.json.
    """

    path: Path
    matrix: ScoreMatrix
    summary: Mapping[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> RunResult:
        """Read a finished run's folder.

        Raises:
            FeatclError: If the run has not finished, or a file is damaged.
        """
        path = Path(path)
        if not (path / "summary.json").is_file():
            raise FeatclError(f"{path}: no summary.json; this run has not finished")
        try:
            summary = json.loads((path / "summary.json").read_text("utf-8"))
        except ValueError as error:
            raise FeatclError(f"{path / 'summary.json'}: not JSON ({error})") from error
        return cls(path, ScoreMatrix.load(path / "R.json"), summary)

    def _repr_html_(self) -> str:
        summary, found = self.summary, self.summary["metrics"]
        unit = "share right" if self.matrix.measure == "accuracy" else "nats per token, lower is better"
        metrics = [
            (name, float(found[name]), formula) for name, formula in FORMULAS.items() if found.get(name) is not None
        ]
        names = ("updates", "tokens", "trained_parameters", "delta_norm", "quarantined", "alarms")
        facts = {name: summary[name] for name in names if summary.get(name) is not None}
        facts |= {f"leak: {name}": value for name, value in (summary.get("leak") or {}).items()}
        return card(
            f"{summary['study']}/{summary['arm']}, seed {summary['seed']}",
            note(f"R, {unit}; framed: just learned"),
            table(("after", *self.matrix.columns), self.matrix.shaded()),
            table(("metric", "", "formula"), metrics),
            table((), facts.items()),
            note(str(self.path / "report.html")),
        )

    def print(self) -> None:
        """Scores before and after, the metrics with their formulas, and where the report lies; to standard output."""
        from rich.console import Console
        from rich.table import Table

        unit = "share right" if self.matrix.measure == "accuracy" else "nats per token, lower is better"
        table = Table(title=f"{self.summary['study']}/{self.summary['arm']}, seed {self.summary['seed']}: {unit}")
        for heading in ("", "base", "just learned", "final"):
            table.add_column(heading, justify="right" if heading else "left")
        values = self.matrix.values
        for j, column in enumerate(self.matrix.columns):
            learned = f"{values[j + 1, j]:.3f}" if j < self.matrix.n_tasks else ""
            table.add_row(column, f"{values[0, j]:.3f}", learned, f"{values[-1, j]:.3f}")
        console = Console(width=120, highlight=False, markup=False)
        console.print(table)
        for name, formula in FORMULAS.items():
            value = self.summary["metrics"].get(name)
            if value is not None:
                console.print(f"{name:26}{value:+.3f}   {formula}")
        if self.summary.get("alarms"):
            console.print(f"alarms of the guard: {self.summary['alarms']}; featcl log {self.path} --all")
        console.print(f"report: {self.path / 'report.html'}")
