"""Held-out, calibration and training parts of a stream without graded tasks, decided by each trajectory's id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featcl.files import digest_bytes
from featcl.streams.trajectory import Trajectory


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of one source, each in the order of the stream.

    Attributes:
        train: What is learned from.
        heldout: What is only scored.
        calibration: What features are selected on.
    """

    train: tuple[Trajectory, ...]
    heldout: tuple[Trajectory, ...]
    calibration: tuple[Trajectory, ...]


def by_source(trajectories: Sequence[Trajectory]) -> dict[str, tuple[Trajectory, ...]]:
    """Source -> its trajectories, both in order of first appearance."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.source, []).append(trajectory)
    return {source: tuple(group) for source, group in groups.items()}


def split_source(trajectories: Sequence[Trajectory], *, holdout: float, calibration: float) -> Split:
    """Split one source by the digests of its ids.

    A trajectory's part does not depend on the others or on their order, except that a source of two or more has at
    least one to train on and one held out, and a source of three or more one for calibration.

    Args:
        trajectories: Of one source.
        holdout: Expected share that is held out.
        calibration: Expected share that features are selected on.
    """
    n = len(trajectories)
    ranked = sorted(trajectories, key=lambda trajectory: id_share(trajectory.id))
    shares = [id_share(trajectory.id) for trajectory in ranked]
    n_heldout = sum(share < holdout for share in shares)
    n_heldout = min(max(n_heldout, 1), n - 1) if n > 1 else 0
    n_calibration = sum(share < holdout + calibration for share in shares) - n_heldout
    n_calibration = min(max(n_calibration, 1), n - n_heldout - 1) if n > 2 else 0
    parts = [ranked[:n_heldout], ranked[n_heldout : n_heldout + n_calibration]]
    heldout, calibrating = ({trajectory.id for trajectory in part} for part in parts)
    return Split(
        train=tuple(t for t in trajectories if t.id not in heldout | calibrating),
        heldout=tuple(t for t in trajectories if t.id in heldout),
        calibration=tuple(t for t in trajectories if t.id in calibrating),
    )


def id_share(id: str) -> float:
    """A number in [0, 1) that depends on the id alone and is uniform over ids."""
    return int(digest_bytes(id.encode("utf-8"))[:13], 16) / 16**13
