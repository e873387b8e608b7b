"""`featcl blame`: which experiences moved a feature, or changed an answer, most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation.scoring import heldout_nll, weighted_nll
from featcl.html import card, note, table
from featcl.learning.blame import Blame, blame_feature, blame_measure
from featcl.learning.history import History
from featcl.studies.ledger import aligned, digits, history_of
from featcl.studies.replay import rebuilt

AGREEMENT = {
    "feature": "Retraining without an experience ranks them alike: correlation 0.75 to 0.86 in the laboratory",
    "measure": "Retraining without an experience agrees weakly: rank correlation 0.04 to 0.30 in the laboratory",
}
"""What `scripts/ledger/blame.py` found: 24 facts, three seeds; with shuffled provenance 95 % lie within ±0.4 for
features and ±0.17 for answers."""


@dataclass(frozen=True)
class RunBlame:
    """Which experiences of a run moved something, largest share first."""

    run: Path
    blame: Blame

    def to_json(self, top: int | None = None) -> dict[str, Any]:
        """Plain data."""
        blame = self.blame
        return {"run": str(self.run), "of": blame.of, "unit": blame.unit, "before": blame.before, "after": blame.after,
                "total": blame.total, "agreement": AGREEMENT[blame.kind],
                "experiences": [share.to_dict() for share in blame.shares[:top]]}  # fmt: skip

    def cells(self, top: int = 20) -> tuple[tuple[str, ...], list[list[Any]]]:
        """Titles and cells, as text and HTML show them."""
        total = self.blame.total
        return ("share", "amount", "moved", "from", "task", "versions"), [
            [f"{share.amount / total:+.1%}" if total else "–", digits(share.amount), digits(share.moved),
             share.trajectory, share.task, ", ".join(f"v{version}" for version in share.versions)]
            for share in self.blame.shares[:top]
        ]  # fmt: skip

    def _head(self) -> tuple[str, str]:
        """What changed by how much, and what a share means."""
        blame = self.blame
        head = f"{self.run}: {blame.of}, {blame.unit}: {blame.before:.4g} at the start, {blame.after:.4g} at the head"
        shares = f"shares of what happened when each was learned; they sum to the whole change. {AGREEMENT[blame.kind]}"
        return head, shares

    def text(self, top: int = 20) -> str:
        """A table with its head line."""
        return "\n".join([*self._head(), *aligned(*self.cells(top))])

    def _repr_html_(self) -> str:
        return card("Blame", *map(note, self._head()), table(*self.cells(10)))


def blame_run(
    run_dir: str | Path, *, feature: str | None = None, item: str | None = None, role: str | None = None
) -> RunBlame:
    """Which experiences moved a feature, or changed an answer, most.

    Args:
        run_dir: Folder of a run.
        feature: Its id, or `layer/id` where several layers have it.
        item: Id of an item of R.json; the model is loaded, and read at every version.
        role: Of a feature, only its `write` or `read` side.

    Raises:
        FeatclError: If not exactly one of the two is given, or there is no such feature or item.
    """
    if (feature is None) == (item is None):
        raise FeatclError("blame: give either --feature ID or --item ID")
    if item is not None and role is not None:
        raise FeatclError("blame: --role belongs to a feature, not to an item")
    history = history_of(run_dir)
    if feature is not None:
        layer, number = _feature(feature)
        return RunBlame(Path(run_dir), blame_feature(history, number, layer=layer, role=role))
    assert item is not None
    return RunBlame(Path(run_dir), _blame_item(run_dir, history, item))


def _feature(text: str) -> tuple[int | None, int]:
    layer, slash, number = text.rpartition("/")
    if not number.isdecimal() or (slash and not layer.isdecimal()):
        raise FeatclError(f"feature {text!r}: give its number, such as 1203, or layer and number, such as 3/1203")
    return (int(layer) if slash else None), int(number)


def _blame_item(run_dir: str | Path, history: History, item: str) -> Blame:
    experiment = rebuilt(run_dir)
    windows = experiment.material.board.targets(item)

    def measure(coordinates: Mapping[str, Any]) -> float:
        experiment.adapter.load_coordinates_(coordinates)
        return weighted_nll(heldout_nll(experiment.adapter.model, windows), windows)

    graded = experiment.material.board.measure == "accuracy"
    unit = f"nats per token of the {'right answer' if graded else 'held-out text'}"
    return blame_measure(history, measure, of=f"item {item}", unit=unit)
