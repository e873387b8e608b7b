"""A run's updates once more, without its measurements: to return to a version, or to leave an experience out."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from featcl.build import Experiment, acting_rounds, build
from featcl.errors import FeatclError
from featcl.learning.blame import label_of
from featcl.learning.deltas import same
from featcl.learning.guard import Stopped
from featcl.learning.history import History
from featcl.learning.versions import Snapshot
from featcl.plan import BeginTask, EndTask, Evaluate, Memorize, StartAgain, Update, plan
from featcl.session import MEMORIZED
from featcl.streams import Trajectory
from featcl.streams.environments import Planned
from featcl.studies.ledger import config_of
from featcl.tracking.folder import RunFolder

BY_HAND = "by hand"  # the note in a ledger that a command has changed the head


def rebuilt(run_dir: str | Path) -> Experiment:
    """A run's objects at their start, from its config; a memory has the slow weights that the run trained.

    Raises:
        FeatclError: If model, stream or features are not those that the run had.
    """
    config = config_of(run_dir)
    experiment = build(config)
    if experiment.memorizing is not None:
        state = RunFolder(Path(run_dir), config.to_dict(), digest=config.digest).state
        if state is not None:
            experiment.memorizing.restore_(state / MEMORIZED)
    try:
        before = json.loads((Path(run_dir) / "env.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    for key in (key for key in experiment.facts if key.endswith("_digest")):
        if key in before and before[key] != experiment.facts[key]:
            raise FeatclError(
                f"{run_dir}: the {key.removesuffix('_digest')} is not the one that this run had; restore it"
            )
    return experiment


def replay(
    experiment: Experiment,
    *,
    without: Collection[str] = (),
    updates: int | None = None,
    steps: int | None = None,
    episodes: Path | None = None,
    each: Callable[[Any], None] | None = None,
) -> None:
    """Learn what the run's plan says, on its learner as it is.

    Args:
        experiment: At its start.
        without: Ids of trajectories that are left out.
        updates: Stop after so many accepted updates; None learns from all.
        steps: Stop after so many steps of the plan, as an interrupted run has.
        episodes: Where the run kept its episodes, for a stream that the model acts in.
        each: Called with the measurements of each update.
    """
    learner, phase, done = experiment.learner, 0, 0
    learner.reconfigure(**experiment.phases[0])
    start = learner.present
    rounds = acting_rounds(experiment.config, learner, episodes) if episodes is not None else None
    for step in islice(plan(experiment), steps):
        if done == updates:
            return
        if isinstance(step, Memorize) and experiment.memorizing is not None and not experiment.memorizing.finished:
            experiment.memorizing.step_()
        if isinstance(step, Evaluate | BeginTask | EndTask) and learner.pending:
            learner.flush()
            done += 1
        if isinstance(step, BeginTask):
            learner.begin_task(step.task, upcoming=step.upcoming)
        if isinstance(step, EndTask):
            done += len(learner.end_task(step.task, [_played(rounds, *each) for each in step.learned]))
        if isinstance(step, StartAgain):
            learner.rollback(start)
        if not isinstance(step, Update):
            continue
        if step.phase != phase:
            phase = step.phase
            learner.reconfigure(**experiment.phases[phase])
        trajectory = _played(rounds, phase, step.trajectory)
        if trajectory.id in without:
            continue
        before = learner.version
        try:
            stats = learner.observe(trajectory)
        except Stopped as stopped:  # the run was started again after it, and went on
            if stopped.stats is None:
                raise
            stats = stopped.stats
        done += stats.version > before
        if each is not None:
            each(stats)


def _played(rounds: Any, phase: int, trajectory: Trajectory | Planned) -> Trajectory:
    """The experience, of a stream that the model acts in as it was played."""
    if isinstance(trajectory, Trajectory):
        return trajectory
    if rounds is None:
        raise FeatclError("a stream that the model acts in can only be replayed with the episodes it kept")
    return rounds.trajectory(trajectory, phase=phase)


def require_stream(experiment: Experiment, history: History) -> None:
    """Refuse a ledger whose experiences are not of the stream, such as that of a chat: it cannot be learned again.

    Raises:
        FeatclError: Naming the first one.
    """
    updates = [step for step in plan(experiment) if isinstance(step, Update)]
    if any(not isinstance(step.trajectory, Trajectory) for step in updates):
        return  # episodes get their names when they are played
    known = {step.trajectory.id for step in updates if isinstance(step.trajectory, Trajectory)}
    for record in history.records:
        if gone := [found for found in record.get("trajectories", ()) if found not in known]:
            raise FeatclError(
                f"v{record['version']} was learned from {gone[0]!r}, which is not in the config's stream (a chat's "
                "experiences are not): it cannot be learned again, so only what the state keeps can be returned to"
            )


def _by_hand(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a change that no learning of the stream makes again."""
    return record["kind"] == "revert" or (record["kind"] == "note" and record["what"] == BY_HAND)


def snapshot_of(experiment: Experiment, history: History, version: int, *, episodes: Path) -> Snapshot:
    """A version of a run with its optimizer, made again from the start and compared with the ledger, bit for bit.

    Args:
        experiment: The run's, at its start; its learner is at that version afterwards.
        history: The run's ledger.
        version: On the way to the head.
        episodes: Where the run kept its episodes.

    Raises:
        FeatclError: If there is no such version, it came after a change by hand, or what is made is not bit-equal.
    """
    require_stream(experiment, history)
    place = history.line.get(version, -1)
    if version != history.first:
        history.record(version)
    hand = [at for at, record in enumerate(history.records[: place + 1]) if _by_hand(record)]
    if hand:
        last = history.records[hand[-1]]
        what = label_of(last) if last["kind"] == "revert" else last["value"]
        made = max((v for v, at in history.line.items() if at < hand[0]), default=history.first)
        raise FeatclError(
            f"v{version} came after {what!r} (or is it), so it cannot be made again from the stream; versions up to "
            f"v{made} can"
        )
    updates = sum(record["kind"] == "update" for record in history.records[: place + 1])
    replay(experiment, updates=updates, episodes=episodes)
    learner = experiment.learner
    if learner.version != version or not same(learner.adapter.coordinates(), history.coordinates(version)):
        raise FeatclError(
            f"v{version} was made again from the stream, but not bit for bit: versions of libraries, threads or device "
            "are not those of the run (env.json says which), so its optimizer cannot be restored exactly"
        )
    return learner.present
