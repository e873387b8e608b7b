"""The finished arms of a study side by side: what is measured, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation import FORMULAS, Interval
from featcl.files import write_json, write_text
from featcl.studies.arms import Arm, seed_folders, study_arms
from featcl.studies.comparison import FEWEST, SHOWN, comparisons_note, write_comparison
from featcl.studies.points import FinishedRun, Setting, difference
from featcl.studies.tuning import Tuning


@dataclass(frozen=True)
class StudyTable:
    """One row per arm.

    Attributes:
        study: Name of the study.
        rows: For each arm: `arm`, `family` (of its grid), `status`, `seeds`, whether they are a `screening` (too few
            for a claim), seeds `left_out` (of another config), and the mean and
            standard deviation of each metric over seeds; `intervals` of the means at 95 % over seeds and items, and
            `differences` from the first finished arm, paired by seed and item, where R gives them.
        runs: The finished runs behind them.
        base: The arm that the others are compared with.
        tuning: How its arms were tuned; each row then has `trials`. None where the folder does not say.
    """

    study: str
    rows: tuple[dict[str, Any], ...]
    runs: tuple[FinishedRun, ...] = ()
    base: str = ""
    tuning: Tuning | None = None

    @property
    def comparisons(self) -> int:
        """How many paired differences there are."""
        return sum(len(row["differences"]) for row in self.rows)

    def write_page(self, path: str | Path) -> Path:
        """The same as a page with the frontier and the other pictures that compare runs."""
        notes = [f"{row['arm']}: {row['status']}" for row in self.rows if row["status"] != "finished"]
        return write_comparison(path, self.runs, title=self.study, notes=notes)

    def print(self) -> None:
        """To standard output, with intervals, the formulas of the columns, and how many comparisons were made."""
        from rich.console import Console
        from rich.table import Table

        headings, *rows = self._cells()
        table = Table(title=self.study)
        for name in headings:
            table.add_column(name, justify="left" if name in ("arm", "kind") else "right")
        for row in rows:
            table.add_row(*row, style="dim" if row[0].startswith(" ") else None)
        console = Console(width=150, markup=False, highlight=False)
        console.print(table)
        for name in self._shown():
            console.print(f"{name}: {FORMULAS[name]}", style="dim")
        for line in self._notes():
            console.print(line)

    def markdown(self) -> str:
        """The same as it goes into a README."""
        headings, *rows = self._cells()
        lines = [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]
        notes = [*(f"{name}: {FORMULAS[name]}" for name in self._shown()), *self._notes()]
        return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"

    def write(self, folder: str | Path) -> None:
        """`table.json`, with every metric, and `table.md`: the same bytes whenever the runs are the same."""
        write_json(Path(folder) / "table.json", list(self.rows))
        write_text(Path(folder) / "table.md", self.markdown())

    def _shown(self) -> list[str]:
        return [name for name in SHOWN if any(name in row["metrics"] for row in self.rows)]

    def _cells(self) -> list[list[str]]:
        """Headings, then a row per arm, and one for its differences."""
        names = (*self._shown(), "delta_norm")
        tuned = () if self.tuning is None else ("trials",)
        lines = [["arm", "kind", "k", "seeds", *tuned, *self._shown(), "‖ΔW‖"]]
        for row in self.rows:
            seeds = ", ".join(str(seed) for seed in row["seeds"])
            cells = [_cell(row["metrics"].get(name), row["intervals"].get(name)) for name in names]
            trials = [str(row["trials"] or "–") for _ in tuned]
            lines.append([row["arm"], row["kind"], str(row["k"]), seeds or "not run", *trials, *cells])
            if row["differences"]:
                less = [_difference(row["differences"].get(name)) for name in names]
                lines.append([f"  − {self.base}", "", "", "", *("" for _ in tuned), *less])
        return lines

    def _notes(self) -> list[str]:
        """What the numbers do not say themselves."""
        lines = [f"{row['arm']}: {row['status']}" for row in self.rows if row["status"] != "finished"]
        if any(row["intervals"] for row in self.rows):
            lines.append("± standard deviation over seeds; in brackets 95 % intervals over seeds and items.")
        if self.comparisons:
            lines.append(comparisons_note(self.comparisons, self.base))
        few = [row["arm"] for row in self.rows if 0 < len(row["seeds"]) < FEWEST]
        if few:
            lines.append(f"screening only, with fewer than {FEWEST} seeds: {', '.join(few)}")
        if self.tuning is not None:
            edge = [f"{name} ({', '.join(arm.at_edge)})" for name, arm in self.tuning.arms.items() if arm.at_edge]
            lines += [self.tuning.note(), *([f"best at the edge of its grid: {', '.join(edge)}"] if edge else [])]
        return lines


def study_table(study: str | Path, *, output: str | Path = "results", overrides: Sequence[str] = ()) -> StudyTable:
    """Read the summaries of a study's finished runs.

    Args:
        study: Folder of configs, such as `experiments/quickstart`.
        output: Where the runs wrote, the config's `output`.
        overrides: `key=value` with which all of its arms were run.

    Raises:
        FeatclError: If there is no such study, or none of its arms has finished.
    """
    arms = study_arms(study, overrides)
    found = {arm.name: _finished(arm, Path(output)) for arm in arms}
    base = next((name for name, (runs, _) in found.items() if runs), "")
    rows = tuple(_row(arm, *found[arm.name], base=found[base][0] if base not in ("", arm.name) else {}) for arm in arms)
    if not any(row["seeds"] for row in rows):
        place = Path(output) / arms[0].config.study
        stale = [f"{row['arm']} (seeds {', '.join(map(str, row['left_out']))})" for row in rows if row["left_out"]]
        if stale:
            raise FeatclError(
                f"{place}: no finished run of the configs in {study}; runs of another config (other KEY=VALUE, or the "
                f"file has changed) lie under {', '.join(stale)}; featcl run CONFIG --overwrite replaces them"
            )
        raise FeatclError(f"{place}: no finished run; start with: {_command(arms[0])}")
    runs = tuple(run for name in found for run in found[name][0].values())
    tuning = Tuning.load(study)
    if tuning is not None:
        rows = tuple({**row, "trials": tuning.trials(arm.path.stem, arm.config)}
                     for row, arm in zip(rows, arms, strict=True))  # fmt: skip
    return StudyTable(arms[0].config.study, rows, runs, base, tuning)


def _finished(arm: Arm, output: Path) -> tuple[dict[int, FinishedRun], list[int]]:
    """The finished runs of an arm by seed, and the seeds that hold another config's results."""
    finished, stale = {}, []
    for seed, folder in seed_folders(output / arm.config.study / arm.name).items():
        if (folder / "summary.json").is_file():
            run = FinishedRun.read(folder)
            if run.files.summary.get("config_digest") == arm.with_seed(seed).digest:
                finished[seed] = run
            else:
                stale.append(seed)
    return finished, stale


def _row(
    arm: Arm, finished: dict[int, FinishedRun], stale: list[int], *, base: dict[int, FinishedRun]
) -> dict[str, Any]:
    """The row of one arm; runs of another config under the arm's name are left out and named."""
    status = "finished" if finished else f"not run; {_command(arm)}"
    if stale:
        status = f"{'' if finished else 'not run; '}seeds {stale} hold another config's results and are left out"
    runs = tuple(finished.values())
    metrics = _over_seeds([dict(run.files.summary) for run in runs])
    setting = Setting(arm.name, arm.name, arm.config.learner.lr, runs)
    intervals = {name: setting.interval(name) for name in metrics if runs and name in runs[0].samples}
    pairs = {name: difference(runs, tuple(base.values()), name) for name in SHOWN if base and name in metrics}
    return {
        "arm": arm.name,
        "family": arm.family,
        "kind": arm.config.adapter.kind,
        "k": arm.config.features.k,
        "status": status,
        "seeds": list(finished),
        "screening": 0 < len(finished) < FEWEST,
        "left_out": stale,
        "metrics": metrics,
        "intervals": {name: _plain(found) for name, found in intervals.items() if math.isfinite(found.low)},
        "differences": {name: _plain(found) for name, found in pairs.items() if found is not None},
    }


def _plain(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def _command(arm: Arm) -> str:
    """What runs an arm."""
    return f"featcl sweep {arm.path.parent} --arms {arm.name}" if arm.values else f"featcl run {arm.path}"


def _over_seeds(summaries: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Metric -> mean and standard deviation over seeds (None with fewer than two)."""
    numbers = [{**summary["metrics"], "delta_norm": summary["delta_norm"]} for summary in summaries]
    table = {}
    for name in numbers[0] if numbers else ():
        values = [value[name] for value in numbers if value[name] is not None and math.isfinite(value[name])]
        if values:
            table[name] = {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}
    return table


def _cell(value: dict[str, float | None] | None, limits: dict[str, float] | None) -> str:
    if value is None:
        return "–"
    spread = "" if value["std"] is None else f" ± {value['std']:.3f}"
    return f"{value['mean']:.3f}{spread}" + ("" if limits is None else f" [{limits['low']:.3f}, {limits['high']:.3f}]")


def _difference(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
