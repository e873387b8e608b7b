"""`featcl revert` and `featcl rollback`: take one experience of a run back, or return to a version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.build import Experiment
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.files import read_state, write_json
from featcl.learning.history import History
from featcl.learning.ledger import LINES, RunLedger
from featcl.learning.revert import Distances, Reverted, Reverts, distances
from featcl.studies.ledger import FOLDER, config_of, history_of, version_number
from featcl.studies.replay import BY_HAND, rebuilt, replay, require_stream, snapshot_of
from featcl.tracking.folder import RunFolder
from featcl.tracking.report import CHANGED, write_report

MEASURED = (
    "later updates were made by a model that had seen it, so this is not a run that never did: in the laboratory "
    "(scripts/ledger/blame.py, 24 facts, 3 seeds) subtracting left 0.95 of the distance to such a run, the median; 0.4 "
    "with one update since, 0 with none; --measure retrains this run without it and measures the distance"
)

STALE = (
    "R.json and summary.json still tell what was measured before, and report.html says so; adapter/ and state/ are of "
    "the new head"
)


@dataclass(frozen=True)
class RunRevert:
    """What `featcl revert` did.

    Attributes:
        run: Its folder.
        reverted: The subtraction.
        learned: What the version had learned from; nothing where it is a revert itself.
        also: Other versions that learned from the same, which are still in.
        distances: To a run that never saw it, where that was measured.
        stale: What of a finished run still tells of the old head, or None.
    """

    run: Path
    reverted: Reverted
    learned: tuple[str, ...]
    also: tuple[int, ...]
    distances: Distances | None
    stale: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = self.distances
        measured = None if found is None else {"kept": found.kept, "reverted": found.reverted, "ratio": found.ratio}
        return {"run": str(self.run), **self.reverted.to_json(), "trajectories": list(self.learned),
                "also": list(self.also), "distance_to_never_seen": measured, "note": MEASURED,
                "stale": self.stale}  # fmt: skip

    def __str__(self) -> str:
        done = self.reverted
        lines = [
            f"{self.run}: v{done.of} ({' + '.join(self.learned) or 'a revert'}) subtracted; the head is "
            f"v{done.version}, ‖ΔW‖ {done.delta_norm:.4g}, removed {done.removed:.4g}",
            f"in the weights: {done.how}; {done.later} later updates had seen it",
        ]
        if self.also:
            lines.append(f"still in, learned from the same: {', '.join(f'v{v}' for v in self.also)}")
        found = self.distances
        if found is None and self.learned:
            lines.append(MEASURED)
        elif found is not None:
            lines.append(
                f"distance to a run that never saw it: {found.reverted:.4g}; without this revert it was "
                f"{found.kept:.4g} (ratio {found.ratio:.2f}; 0: as if never seen, 1: no better than before)"
            )
        return "\n".join([*lines, *([self.stale] if self.stale else [])])


@dataclass(frozen=True)
class RunRollback:
    """What `featcl rollback` did: from one version to another, how many left the line, and what is stale now."""

    run: Path
    old: int
    new: int
    undone: int
    remade: bool
    stale: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"run": str(self.run), "from": self.old, "to": self.new, "undone": self.undone, "remade": self.remade,
                "stale": self.stale}  # fmt: skip

    def __str__(self) -> str:
        how = "made again from the stream, bit-equal to the ledger" if self.remade else "from the state on disk"
        line = (
            f"{self.run}: from v{self.old} back to v{self.new} ({self.undone} versions left the line), coordinates, "
            f"optimizer and what the learner remembers: {how}"
        )
        return "\n".join([line, *([self.stale] if self.stale else [])])


def revert_run(run_dir: str | Path, version: str, *, measure: bool = False) -> RunRevert:
    """Subtract the update of one version from a run's head; adapter and state are those of the new version then.

    Args:
        run_dir: Folder of a run that is not running.
        version: Such as v5; a revert can be taken back too.
        measure: Retrain the run without what that version learned from, and measure how far the two are apart.

    Raises:
        FeatclError: If there is no such version or no state, it was taken back already, or somebody is running it.
    """
    with opened(run_dir) as run:
        history = run.history
        number = version_number(version, history)
        record = history.record(number)
        Reverts.recorded(history.versions).refuse(number)
        learned = tuple(record.get("trajectories", ()))
        if measure and not learned:
            raise FeatclError(f"v{number} is itself a revert, of v{record['of']}: there is no experience to leave out")
        also = tuple(
            r["version"] for r in history.versions if r["version"] != number and r.get("trajectories") == list(learned)
        )
        found = _distances(run, number, learned) if measure else None
        with editing(run, f"revert v{number}") as experiment:
            reverted = experiment.learner.revert(number)
        return RunRevert(run.path, reverted, learned, also, found, run.stale)


def rollback_run(run_dir: str | Path, version: str) -> RunRollback:
    """Return to a version exactly, with the optimizer and all that the learner remembers.

    The stream is not turned back: a run that goes on learns from what it has not seen yet.

    Args:
        run_dir: Folder of a run that is not running.
        version: Such as v5.

    Raises:
        FeatclError: If there is no such version or no state, it cannot be made again, or somebody is running it.
    """
    with opened(run_dir) as run:
        history = run.history
        number = version_number(version, history)
        if number != history.first:
            history.record(number)
        with editing(run, f"rollback to v{number}") as experiment:
            learner = experiment.learner
            remade = number not in learner.versions
            made = snapshot_of(rebuilt(run.path), history, number, episodes=run.path / "episodes") if remade else number
            learner.rollback(made)
        undone = sum(v > number for v in history.line)
        return RunRollback(run.path, history.head, number, undone, remade, run.stale)


@dataclass(frozen=True)
class Opened:
    """A run's folder, locked, as its last checkpoint left it.

    Attributes:
        path: The folder.
        folder: With its lock.
        config: The run's.
        state: The checkpoint.
        session: What it says of the run.
        history: The ledger as far as the checkpoint knows it; a killed run may have written more, which is forgotten.
    """

    path: Path
    folder: RunFolder
    config: RunConfig
    state: Path
    session: Mapping[str, Any]
    history: History

    @property
    def stale(self) -> str | None:
        """Of a finished run: that its numbers are of the old head."""
        return STALE if (self.path / "summary.json").is_file() else None


@contextmanager
def opened(run_dir: str | Path) -> Iterator[Opened]:
    """A run that nobody is running; nothing is changed yet.

    Raises:
        FeatclError: If it is no run's folder, has no checkpoint or no ledger, or somebody is running it.
    """
    path = Path(run_dir)
    history_of(path)
    config = config_of(path)
    with RunFolder(path, config.to_dict(), digest=config.digest) as folder:
        state = folder.state
        if state is None:
            raise FeatclError(
                f"{path}: no checkpoint here; the run has to be started (featcl run) before it can be edited"
            )
        session = read_state(state / "session.json", "phase", "ledger")
        history = history_of(path, size=session["ledger"][LINES])
        yield Opened(path, folder, config, state, session, history)


@contextmanager
def editing(run: Opened, what: str) -> Iterator[Experiment]:
    """A run's learner as its last checkpoint left it; what is done to it becomes the run's new state.

    In order: ledger, what tells of the old head, adapter, checkpoint. Killed in between, the next command finds the old
    checkpoint, cuts the ledger back to it, and does the same again.

    Args:
        run: From `opened`.
        what: Said in the ledger.
    """
    path, state, session = run.path, run.state, run.session
    experiment = rebuilt(path)
    learner = experiment.learner
    learner.reconfigure(**experiment.phases[session["phase"]])
    learner.restore_(state / "learner")
    ledger = RunLedger(path / FOLDER, experiment.adapter, frames=run.config.tracking.ledger == "coordinates")
    ledger.cut_back_(session["ledger"])
    learner.ledger = ledger
    yield experiment
    ledger.note(BY_HAND, what)
    _say_stale(path, f"{what}; the head is v{learner.version} now")

    def write(target: Path) -> None:
        shutil.copytree(state, target, dirs_exist_ok=True)
        learner.save(target / "learner")
        write_json(target / "session.json", {**session, "ledger": ledger.position()})

    if (path / "adapter").is_dir():
        learner.save_adapter(path / "adapter")
    run.folder.save_state(write)
    ledger.close()


def _say_stale(path: Path, what: str) -> None:
    """Of a finished run: summary and report say that their numbers were measured before this was done."""
    place = path / "summary.json"
    if not place.is_file():
        return
    summary = json.loads(place.read_text(encoding="utf-8"))
    write_json(place, {**summary, CHANGED: [*summary.get(CHANGED, ()), what]})
    if (path / "report.html").is_file():
        write_report(path)


def _distances(run: Opened, version: int, learned: tuple[str, ...]) -> Distances:
    """Retrain without an experience, as far as the run has come; how far the head is from that, with and without it."""
    experiment, history = rebuilt(run.path), run.history
    require_stream(experiment, history)
    replay(experiment, without=learned, steps=run.session.get("position"), episodes=run.path / "episodes")
    move = history.move(version)
    head = history.coordinates(history.head)
    return distances(head, move.before, move.after, experiment.adapter.coordinates())
