"""Is blame right? Every experience is left out once and the learner retrained; the two are compared by rank.

    blamed_t = what happened when t was learned          (`learning/blame.py`)
    missed_t = value with all − value without t          (retrained from the start)

Agreement is Spearman's rank correlation of the two over experiences, averaged over features (or items), with a 95 %
bootstrap interval over experiences. The control is shuffled provenance: the same blame, of the wrong experiences.
The same retraining says how far subtracting an update (`revert`) is from never having seen its experience.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from featcl.adapters.feature_map import FeatureKey, FeatureMap
from featcl.build import Experiment, build
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.scoring import heldout_nll, weighted_nll
from featcl.learning.blame import blame_feature, blame_measure
from featcl.learning.history import History
from featcl.learning.ledger import RunLedger
from featcl.learning.revert import distances
from featcl.streams import Trajectory
from featcl.studies.replay import replay

RESAMPLES = 2000
Coordinates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """How well blame agrees with retraining.

    Attributes:
        correlation: Mean over features (or items) of Spearman's correlation over experiences.
        low, high: 95 % bootstrap interval, over experiences.
        shuffled_low, shuffled_high: Where 95 % of the correlations with shuffled provenance lie.
        measured: How many features or items.
    """

    correlation: float
    low: float
    high: float
    shuffled_low: float
    shuffled_high: float
    measured: int


@dataclass(frozen=True)
class LeaveOneOut:
    """What retraining without each experience showed.

    Attributes:
        experiences: How many there were.
        features: Blame of features.
        items: Blame of answers.
        ratios: Of each revert: distance to never seen, over that distance without the revert.
        later: Updates that came after each of these.
    """

    experiences: int
    features: Agreement
    items: Agreement
    ratios: tuple[float, ...]
    later: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the median and the quartiles of the ratios."""
        quartiles = np.quantile(self.ratios, (0.25, 0.5, 0.75)).tolist() if self.ratios else [None] * 3
        return asdict(self) | {"ratio_quartiles": quartiles}


def leave_one_out(
    config: RunConfig, *, features: int = 8, items: int = 8, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> LeaveOneOut:
    """Learn a run's stream, then once more without each of its experiences.

    Args:
        config: The run's; without a guard, whose alarms would make runs incomparable.
        features: How many of those that moved most.
        items: How many of those whose loss changed most.
        seed: Of resampling and shuffling.
        say: Told about progress.

    Raises:
        FeatclError: If there is a guard, updates are made from several experiences, or there are fewer than four.
    """
    if config.learner.guard is not None:
        raise FeatclError("leave_one_out: a guard rolls back, so runs with and without an experience do not compare")
    if any(phase.accumulate > 1 for phase in config.phases or (config.learner,)):
        raise FeatclError(
            "leave_one_out: accumulate joins several experiences in one update, whose blame is not theirs"
        )
    experiment = build(config)
    learner = experiment.learner
    learner.hold(0)
    ids = [t.id for task in experiment.material.tasks for t in task.trajectories if isinstance(t, Trajectory)]
    if len(ids) < 4:
        raise FeatclError(f"leave_one_out needs at least four experiences, the stream has {len(ids)}")
    with tempfile.TemporaryDirectory() as folder:
        learner.ledger = RunLedger(folder, experiment.adapter)
        replay(experiment)
        learner.ledger = None
        history = History(folder)
        head = history.coordinates(history.head)
        measured = _Measured(experiment, history, features=features, items=items)
        without = []
        for number, left_out in enumerate(ids):
            _start_again(experiment)
            replay(experiment, without={left_out})
            without.append(experiment.adapter.coordinates())
            say(f"{number + 1} of {len(ids)} experiences left out")
        found = {name: _agreement(*measured.compare(name, ids, head, without), seed) for name in ("features", "items")}
        reverts = _reverts(history, ids, head, without)
    return LeaveOneOut(len(ids), found["features"], found["items"], *reverts)


class _Measured:
    """The values that are blamed: lengths along features' ways, and losses of items."""

    def __init__(self, experiment: Experiment, history: History, *, features: int, items: int) -> None:
        self.experiment, self.history = experiment, history
        self.meaning: FeatureMap = history.bounding()
        first, last = (self.meaning.vectors(history.coordinates(v)) for v in (history.first, history.head))
        self.ways = {key: last[key] - first[key] for key in last}
        ranked = sorted(self.ways, key=lambda key: -float(self.ways[key].norm()))
        self.keys: list[FeatureKey] = ranked[:features]
        self.items = self._changed_items(items)

    def compare(
        self, what: str, ids: Sequence[str], head: Coordinates, without: Sequence[Coordinates]
    ) -> tuple[np.ndarray, np.ndarray]:
        """[measured, experiences] of what is blamed, and of what is missed."""
        if what == "features":
            blames = [blame_feature(self.history, k.feature, layer=k.layer, role=k.role) for k in self.keys]
            missed = [[self._along(key, head, other) for other in without] for key in self.keys]
        else:
            blames = [blame_measure(self.history, self._loss(item), of=item, unit="nats") for item in self.items]
            losses = [[self._loss(item)(other) for other in without] for item in self.items]
            missed = [[self._loss(item)(head) - value for value in row]
                      for item, row in zip(self.items, losses, strict=True)]  # fmt: skip
        amounts = [{share.trajectory: share.amount for share in blame.shares} for blame in blames]
        return np.array([[found.get(i, 0.0) for i in ids] for found in amounts]), np.array(missed)

    def _along(self, key: FeatureKey, head: Coordinates, other: Coordinates) -> float:
        way = self.ways[key]
        return float((self.meaning.vectors(head)[key] - self.meaning.vectors(other)[key]) @ way / way.norm())

    def _loss(self, item: str) -> Callable[[Coordinates], float]:
        windows = self.experiment.material.board.targets(item)

        def loss(coordinates: Coordinates) -> float:
            self.experiment.adapter.load_coordinates_(coordinates)
            return weighted_nll(heldout_nll(self.experiment.adapter.model, windows), windows)

        return loss

    def _changed_items(self, count: int) -> list[str]:
        """The items of the tasks whose loss changed most."""
        tasks = {task.name for task in self.experiment.material.tasks}
        scores = self.experiment.material.board.score(self.experiment.adapter.model)
        names = [f"{column}/{item}" for column, found in scores.items() if column in tasks for item in found]
        changes = {}
        for name in names[: 16 * count]:
            before, after = (self._loss(name)(self.history.coordinates(v)) for v in (0, self.history.head))
            changes[name] = abs(after - before)
        return sorted(changes, key=lambda name: -changes[name])[:count]


def _start_again(experiment: Experiment) -> None:
    experiment.learner.rollback(0)
    experiment.learner.hold(0)


def _reverts(
    history: History, ids: Sequence[str], head: Coordinates, without: Sequence[Coordinates]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The ratio of every experience that made one version, and how many updates came after it."""
    places = {found: place for place, found in enumerate(ids)}
    ratios, later = [], []
    for move in history.moves():
        learned = move.record["trajectories"]
        versions = [r for r in history.versions if r["trajectories"] == learned]
        if len(learned) == 1 and len(versions) == 1:
            found = distances(head, move.before, move.after, without[places[learned[0]]])
            ratios.append(found.ratio)
            later.append(history.head - move.record["version"])
    return tuple(ratios), tuple(later)


def _agreement(blamed: np.ndarray, missed: np.ndarray, seed: int) -> Agreement:
    draw = np.random.default_rng(seed)
    count = blamed.shape[1]
    again = [draw.integers(count, size=count) for _ in range(RESAMPLES)]
    low, high = np.quantile([correlation(blamed[:, rows], missed[:, rows]) for rows in again], (0.025, 0.975))
    mixed = [correlation(blamed[:, draw.permutation(count)], missed) for _ in range(RESAMPLES)]
    least, most = np.quantile(mixed, (0.025, 0.975))
    return Agreement(
        correlation(blamed, missed), float(low), float(high), float(least), float(most), measured=len(blamed)
    )


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over rows of Spearman's rank correlation."""
    return float(np.mean([_spearman(a, b) for a, b in zip(one, other, strict=True)]))


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    a, b = (_ranks(values) for values in (one, other))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties at their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
