"""Taking one experience back: coordinates are linear, so its update can be subtracted from all that came since.

C ← C − (C_v − C_{v−1}). That is exact in the weights where coordinates enter linearly. It is not what a learner that
never saw the experience would be: the updates after it were made by a model that had it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from featcl.errors import FeatclError


@dataclass(frozen=True)
class Reverted:
    """An update that was subtracted.

    Attributes:
        of: The version whose update it was.
        version: The version that this made.
        how: `exact`, or `approximate: …` with the reason.
        removed: ‖C_v − C_{v−1}‖, what was subtracted.
        delta_norm: ‖ΔW‖ of the whole update now.
        later: How many updates were made since, by a model that had it.
    """

    of: int
    version: int
    how: str
    removed: float
    delta_norm: float
    later: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Distances:
    """How far two ways of not having an experience lie from a run that never saw it.

    Attributes:
        kept: ‖with it − never seen‖.
        reverted: ‖with it subtracted − never seen‖.
    """

    kept: float
    reverted: float

    @property
    def ratio(self) -> float:
        """`reverted` / `kept`: 0 where subtracting is as good as never seeing it, 1 where it changes nothing."""
        return self.reverted / self.kept if self.kept else 0.0


class Reverts:
    """Which versions took back which; a revert is a version too, and taking it back puts in again what it took.

    Args:
        of: Version -> the version whose update it subtracted.
    """

    def __init__(self, of: Mapping[int, int] | None = None) -> None:
        self._of = dict(of or {})

    @classmethod
    def recorded(cls, records: Iterable[Mapping[str, Any]]) -> Reverts:
        """Those among the versions of a ledger."""
        return cls({record["version"]: record["of"] for record in records if record["kind"] == "revert"})

    def taken_back_by(self, version: int) -> int | None:
        """The revert because of which a version's update is not in the head any more; None where it is."""
        taken: dict[int, int] = {}
        for revert in sorted(self._of, reverse=True):  # whatever took back a revert came after it
            if revert not in taken:
                taken[self._of[revert]] = revert
        return taken.get(version)

    def refuse(self, version: int) -> None:
        """Raise where the update of a version was taken back already: it would be subtracted twice.

        Raises:
            FeatclError: Naming the version that did it.
        """
        by = self.taken_back_by(version)
        if by is not None:
            raise FeatclError(f"v{version} was already taken back, by v{by}; to put it in again, revert v{by}")

    def add_(self, version: int, *, of: int) -> None:
        """`version` was made by subtracting the update of version `of`."""
        self._of[version] = of

    def state(self) -> dict[str, Any]:
        """As JSON data."""
        return {"of": sorted(self._of.items())}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._of = {int(version): int(of) for version, of in state["of"]}


def subtract_(adapter: Any, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[str, float]:
    """C ← C − (after − before); how exact that is, and how long what was subtracted."""
    how = adapter.add_(before, after, scale=-1.0)
    return how, distance(before, after)


def distances(
    head: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    never: Mapping[str, Tensor],
) -> Distances:
    """How far the head, with and without the step from `before` to `after`, lies from a run that never saw it."""
    reverted = {name: head[name] - (after[name] - before[name]) for name in head}
    return Distances(distance(head, never), distance(reverted, never))


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Euclidean distance of two sets of coordinates."""
    squares = [(one[name].double() - other[name].double().to(one[name].device)).square().sum() for name in one]
    return float(torch.stack([square.cpu() for square in squares]).sum().sqrt())
