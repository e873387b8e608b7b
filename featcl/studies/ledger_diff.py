"""`featcl diff`: what changed between two versions of a run, feature by feature."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcl.adapters.feature_map import FeatureKey
from featcl.html import card, long_table, note
from featcl.learning.blame import label_of
from featcl.learning.revert import distance
from featcl.studies.ledger import aligned, digits, history_of, version_number


@dataclass(frozen=True)
class FeatureChange:
    """One side of a feature at two versions.

    Attributes:
        layer, feature, role, name: Which.
        before, after: How strongly the update writes (or reads) it.
        change: Norm of the difference of the two; above |after − before| where it also turned.
    """

    layer: int
    feature: int
    role: str
    name: str
    before: float
    after: float
    change: float


@dataclass(frozen=True)
class RunDiff:
    """What changed between two versions, feature by feature, largest change first.

    Attributes:
        run: Its folder.
        old, new: The versions.
        distance: ‖difference of the coordinates‖.
        rows: One per side of a feature.
        learned: What was learned in between: (version, trajectories) pairs, oldest first.
    """

    run: Path
    old: int
    new: int
    distance: float
    rows: tuple[FeatureChange, ...]
    learned: tuple[tuple[int, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        learned = [{"version": version, "from": what} for version, what in self.learned]
        return {"run": str(self.run), "old": self.old, "new": self.new, "distance": self.distance,
                "features": [asdict(row) for row in self.rows], "learned": learned}  # fmt: skip

    def cells(self) -> tuple[tuple[str, ...], list[list[Any]]]:
        """Titles and cells, as text and HTML show them."""
        titles = ("role", "feature", "name", f"v{self.old}", f"v{self.new}", "change")
        several = len({row.layer for row in self.rows}) > 1
        return titles, [
            [r.role, f"{r.layer}/{r.feature}" if several else str(r.feature), r.name, digits(r.before),
             digits(r.after), digits(r.change)] for r in self.rows
        ]  # fmt: skip

    @property
    def head(self) -> str:
        """What is compared, in a line."""
        between = ", ".join(dict.fromkeys(what for _, what in self.learned)) or "nothing"
        return f"{self.run}: v{self.old} to v{self.new}, coordinates moved by {self.distance:.4g}; learned: {between}"

    def __str__(self) -> str:
        return "\n".join([self.head, *aligned(*self.cells())])

    def _repr_html_(self) -> str:
        return card("Diff", note(self.head), long_table(*self.cells()))


def diff_runs(run_dir: str | Path, old: str, new: str, *, top: int = 20) -> RunDiff:
    """What changed between two versions of a run, per feature.

    Args:
        run_dir: Folder of a run.
        old, new: Versions, such as v3 and v7; `base` and `head` are understood.
        top: How many sides of features are shown.

    Raises:
        FeatclError: If there is no such version, the directions were changed between the two, or no features bound
            what was trained.
    """
    history = history_of(run_dir)
    first, second = (version_number(text, history) for text in (old, new))
    was, now = (history.coordinates(version) for version in (first, second))
    history.require_one_era(*sorted((first, second)))
    meaning = history.bounding(second)
    before, after = meaning.vectors(was), meaning.vectors(now)
    names = meaning.names

    def row(key: FeatureKey) -> FeatureChange:
        name = names.get((key.layer, key.feature), "")
        sizes = (before[key].norm(), after[key].norm(), (after[key] - before[key]).norm())
        return FeatureChange(key.layer, key.feature, key.role, name, *map(float, sizes))

    rows = sorted((row(key) for key in after), key=lambda r: (-r.change, r.layer, r.feature, r.role))
    low, high = sorted((first, second))
    learned = tuple((r["version"], label_of(r)) for r in history.versions if low < r["version"] <= high)
    return RunDiff(Path(run_dir), first, second, distance(was, now), tuple(rows[:top]), learned)
