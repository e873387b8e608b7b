"""Blame: which experiences moved a feature, or changed an answer, most.

A feature's row X in the table of the update moves along a path X_0 → X_1 → … → X_T, one step per version. The share of
version t is the length of its step along the whole way:

    along_t = ⟨X_t − X_{t−1}, X_T − X_0⟩ / ‖X_T − X_0‖,     Σ_t along_t = ‖X_T − X_0‖

An answer's loss changes by ℓ_t − ℓ_{t−1}, and these sum to the whole change. Both say what happened when an experience
was learned, not what would be without it: later updates reacted to it. How well the two agree is measured by
retraining (`featcl.studies.leave_one_out`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from featcl.adapters.feature_map import FeatureKey
from featcl.errors import FeatclError
from featcl.learning.history import History


@dataclass(frozen=True)
class Share:
    """What one experience (or one revert) did.

    Attributes:
        trajectory: Its id, or `revert of v5`; ids joined by `+` where an update learned from several.
        source, task: Where it comes from.
        versions: The versions that learned from it.
        amount: Its part of the whole change; parts sum to the whole.
        moved: Length of its own steps, whatever their direction; for an answer the sum of absolute changes.
    """

    trajectory: str
    source: str
    task: str
    versions: tuple[int, ...]
    amount: float
    moved: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"versions": list(self.versions)}


@dataclass(frozen=True)
class Blame:
    """Shares of a change, largest first.

    Attributes:
        of: What changed, in words.
        unit: What `amount` and `total` are in.
        before, after: The measured value at the start and at the head.
        total: The whole change: the sum of all amounts.
        shares: One per experience.
        kind: `feature`, or `measure` for a number that depends on the coordinates.
    """

    of: str
    unit: str
    before: float
    after: float
    total: float
    shares: tuple[Share, ...]
    kind: Literal["feature", "measure"] = "feature"


def blame_feature(history: History, feature: int, *, layer: int | None = None, role: str | None = None) -> Blame:
    """Which experiences moved a feature.

    Args:
        history: Of the run.
        feature: Its id in the SAE.
        layer: The block whose SAE is meant; needed where there are several with this feature.
        role: `write` or `read`; None: both together.

    Raises:
        FeatclError: If it is not among the chosen features, or the directions were changed on the way.
    """
    meaning = history.bounding()
    keys = feature_keys(history, feature, layer=layer, role=role)
    if not history.line:
        raise FeatclError("nothing was learned yet, so there is nothing to blame")
    history.require_one_era(history.first)

    def row(coordinates: Mapping[str, Tensor]) -> Tensor:
        found = meaning.vectors(coordinates)
        return torch.cat([found[key] for key in keys])

    first, last = (row(history.coordinates(v)) for v in (history.first, max(history.line)))
    way = last - first
    length = float(way.norm())
    direction = way / length if length else way
    parts = []
    now = first
    for move in history.moves():
        then, now = now, row(move.after)
        step = now - then
        parts.append((move.record, float(step @ direction), float(step.norm())))
    name = next((meaning.names[k.layer, k.feature] for k in keys if (k.layer, k.feature) in meaning.names), "")
    label = f"feature {feature}" + (f" ({name})" if name else "") + (f", {role} side" if role else "")
    return Blame(
        label, "strength in features", float(first.norm()), float(last.norm()), length, shares_of(parts)
    )  # fmt: skip


def blame_measure(history: History, measure: Callable[[Mapping[str, Tensor]], float], *, of: str, unit: str) -> Blame:
    """Which experiences changed a number that depends on the coordinates, such as the loss of an answer.

    Args:
        history: Of the run.
        measure: Coordinates -> the number; called once per version.
        of: What it is, in words.
        unit: What it is in.

    Raises:
        FeatclError: If nothing was learned, or the directions were changed on the way.
    """
    if not history.line:
        raise FeatclError("nothing was learned yet, so there is nothing to blame")
    history.require_one_era(history.first)
    first = value = measure(history.coordinates(history.first))
    parts = []
    for move in history.moves():
        then, value = value, measure(move.after)
        parts.append((move.record, value - then, abs(value - then)))
    return Blame(of, unit, first, value, value - first, shares_of(parts), kind="measure")


def feature_keys(
    history: History, feature: int, *, layer: int | None = None, role: str | None = None
) -> list[FeatureKey]:
    """The sides of a feature that an update can move.

    Raises:
        FeatclError: If there is none, or several layers have a feature of this id.
    """
    if role not in (None, "write", "read"):
        raise FeatclError(f"role {role!r}: a feature has the sides write and read")
    known = _keys(history)
    found = [key for key in known if key.feature == feature and layer in (None, key.layer) and role in (None, key.role)]
    layers = sorted({key.layer for key in found})
    if not found:
        ids = sorted({key.feature for key in known})
        shown = ", ".join(map(str, ids[:12])) + (" …" if len(ids) > 12 else "")
        raise FeatclError(f"feature {feature} is not among the chosen ones, which are {shown}")
    if len(layers) > 1:
        raise FeatclError(f"feature {feature} was chosen at several layers: say {layers[0]}/{feature} or another")
    return found


def _keys(history: History) -> list[FeatureKey]:
    found: set[FeatureKey] = set()
    for site in history.bounding().sites:
        found |= {FeatureKey(site.rows.layer, i, "read" if site.form == "read" else "write") for i in site.rows.ids}
        if site.columns is not None:
            found |= {FeatureKey(site.columns.layer, i, "read") for i in site.columns.ids}
    return sorted(found)


def shares_of(parts: Iterable[tuple[Mapping[str, Any], float, float]]) -> tuple[Share, ...]:
    """(record, amount, moved) of every version as one share per experience, largest first."""
    grouped: dict[str, list[tuple[Mapping[str, Any], float, float]]] = {}
    for record, amount, moved in parts:
        grouped.setdefault(label_of(record), []).append((record, amount, moved))
    shares = [
        Share(
            label,
            members[0][0].get("source", ""),
            members[0][0].get("task", ""),
            tuple(record["version"] for record, _, _ in members),
            sum(amount for _, amount, _ in members),
            sum(moved for _, _, moved in members),
        )
        for label, members in grouped.items()
    ]
    return tuple(sorted(shares, key=lambda share: (-abs(share.amount), share.versions)))


def label_of(record: Mapping[str, Any]) -> str:
    """What a version learned from."""
    return f"revert of v{record['of']}" if record["kind"] == "revert" else "+".join(record["trajectories"])
