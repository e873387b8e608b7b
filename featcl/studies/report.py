"""`featcl report`: a run's report once more, from its files alone; of several runs, also a page that compares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation import ReportCard, report_card
from featcl.files import write_json
from featcl.studies.comparison import write_comparison
from featcl.studies.points import FinishedRun
from featcl.tracking.report import write_report
from featcl.tracking.report_card import NAME, card_table

COMPARISON = "comparison.html"


@dataclass(frozen=True)
class Reports:
    """What was written.

    Attributes:
        pages: `report.html` of every run.
        cards: Their report cards; None where nothing was trained yet.
        comparison: The page that compares them, of several runs.
    """

    pages: tuple[Path, ...]
    cards: tuple[ReportCard | None, ...]
    comparison: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        cards = [None if card is None else card.to_dict() for card in self.cards]
        runs = [{"page": str(path), "card": card} for path, card in zip(self.pages, cards, strict=True)]
        return {"runs": runs, "comparison": None if self.comparison is None else str(self.comparison)}

    def __str__(self) -> str:
        lines = [card.render() for card in self.cards if card is not None] if len(self.cards) == 1 else []
        lines += [f"report: {path}" for path in self.pages]
        return "\n".join([*lines, *([f"comparison: {self.comparison}"] if self.comparison else [])])


def report_runs(
    folders: Sequence[str | Path],
    *,
    references: Mapping[str, str | Path] | None = None,
    out: str | Path | None = None,
) -> Reports:
    """Rebuild reports from what lies on disk; models are not loaded.

    Args:
        folders: Of runs, finished or not.
        references: Name -> folder of a run that the report cards are compared with, as in `report_card`.
        out: Where the comparison of several runs goes; `comparison.html` here by default.

    Raises:
        FeatclError: If one is no run's folder, or a file is damaged; then nothing is written.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise FeatclError("a run is given twice; give each folder once")
    if out is not None and len(paths) == 1:
        raise FeatclError("--out is where a comparison goes; give several runs, or leave it out")
    runs = [FinishedRun.read(path) for path in paths]
    cards = tuple(_card(run, references or {}) for run in runs)
    pages = tuple(write_report(path) for path in paths)
    if len(paths) == 1:
        return Reports(pages, cards)
    runs = [FinishedRun.read(path) for path in paths]  # once more, with the cards
    studies = list(dict.fromkeys(str(run.files.config.get("study", "?")) for run in runs))
    title = f"{', '.join(studies)}: {len(runs)} runs"
    return Reports(pages, cards, write_comparison(out or COMPARISON, runs, title=title))


def _card(run: FinishedRun, references: Mapping[str, str | Path]) -> ReportCard | None:
    """The card, which is kept as a table of the run; None before a task was trained."""
    folder = run.files.folder
    file = folder / "tables" / f"{NAME}.json"
    if run.matrix is None or len(run.matrix.rows) < 2:
        if references:
            raise FeatclError(f"{folder}: no task was trained yet; there is nothing to compare with a reference")
        file.unlink(missing_ok=True)
        return None
    card = report_card(folder, references=references)
    table = card_table(card.to_dict())
    write_json(file, {"name": NAME, "columns": list(table.columns), "rows": [list(row) for row in table.rows]})
    return card
