"""The finished arms of a study side by side: what is measured, nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation import FORMULAS
from featcl.studies.arms import Arm, seed_folders, study_arms

# The columns of the printed table; `--json` has every metric of summary.json.
SHOWN = ("acc", "learning_accuracy", "forgetting_max_past", "bwt", "general_change")


@dataclass(frozen=True)
class StudyTable:
    """One row per arm.

    Attributes:
        study: Name of the study.
        rows: For each arm: `arm`, `status`, `seeds`, seeds `left_out` (of another config), and the mean and
            standard deviation of each metric over seeds.
    """

    study: str
    rows: tuple[dict[str, Any], ...]

    def print(self) -> None:
        """To standard output, with the formulas of the columns."""
        from rich.console import Console
        from rich.table import Table

        shown = [name for name in SHOWN if any(name in row["metrics"] for row in self.rows)]
        table = Table(title=self.study)
        for name in ("arm", "kind", "k", "seeds", *shown, "|ΔW|"):
            table.add_column(name, justify="left" if name in ("arm", "kind") else "right")
        for row in self.rows:
            cells = [_cell(row["metrics"].get(name)) for name in (*shown, "delta_norm")]
            seeds = ", ".join(str(seed) for seed in row["seeds"])
            table.add_row(row["arm"], row["kind"], str(row["k"]), seeds or row["status"], *cells)
        console = Console(width=120, markup=False)
        console.print(table)
        for name in shown:
            console.print(f"{name}: {FORMULAS[name]}", style="dim")
        for row in self.rows:
            if row["status"] != "finished":
                console.print(f"{row['arm']}: {row['status']}")


def study_table(study: str | Path, *, output: str | Path = "results") -> StudyTable:
    """Read the summaries of a study's finished runs.

    Args:
        study: Folder of configs, such as `experiments/quickstart`.
        output: Where the runs wrote, the config's `output`.

    Raises:
        FeatclError: If there is no such study, or none of its arms has finished.
    """
    arms = study_arms(study)
    rows = tuple(_row(arm, Path(output)) for arm in arms)
    if not any(row["seeds"] for row in rows):
        place = Path(output) / arms[0].config.study
        stale = [f"{row['arm']} (seeds {', '.join(map(str, row['left_out']))})" for row in rows if row["left_out"]]
        if stale:
            raise FeatclError(
                f"{place}: no finished run of the configs in {study}; runs of another config (other KEY=VALUE, or the "
                f"file has changed) lie under {', '.join(stale)}; featcl run CONFIG --overwrite replaces them"
            )
        raise FeatclError(f"{place}: no finished run; start with: featcl run {arms[0].path}")
    return StudyTable(arms[0].config.study, rows)


def _row(arm: Arm, output: Path) -> dict[str, Any]:
    """The row of one arm; runs of another config under the arm's name are left out and named."""
    finished, stale = {}, []
    for seed, folder in seed_folders(output / arm.config.study / arm.name).items():
        if (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            if summary["config_digest"] == arm.with_seed(seed).digest:
                finished[seed] = summary
            else:
                stale.append(seed)
    status = "finished" if finished else f"not run; featcl run {arm.path}"
    if stale:
        status = f"{'' if finished else 'not run; '}seeds {stale} hold another config's results and are left out"
    return {
        "arm": arm.name,
        "kind": arm.config.adapter.kind,
        "k": arm.config.features.k,
        "status": status,
        "seeds": list(finished),
        "left_out": stale,
        "metrics": _over_seeds(list(finished.values())),
    }


def _over_seeds(summaries: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Metric -> mean and standard deviation over seeds (None with fewer than two)."""
    numbers = [{**summary["metrics"], "delta_norm": summary["delta_norm"]} for summary in summaries]
    table = {}
    for name in numbers[0] if numbers else ():
        values = [value[name] for value in numbers if value[name] is not None and math.isfinite(value[name])]
        if values:
            table[name] = {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}
    return table


def _cell(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    spread = "" if value["std"] is None else f" ± {value['std']:.3f}"
    return f"{value['mean']:.3f}{spread}"
