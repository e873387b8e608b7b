"""From coordinates to features without the model: what a ledger needs to say which features an update moved.

| adapted place                    | X, with row i what feature i gets or sends                   |
|----------------------------------|--------------------------------------------------------------|
| writer, reader in coordinates    | L C, L = M_w (or M_r): C [k, d_in], or Cᵀ for a reader       |
| the same at a rank below k       | L C₂: the frozen frame is orthonormal and changes no norm    |
| `train_both_factors`             | L B A, both trained                                          |
| `none` and the free ablations    | P B A, P = M Q_Dᵀ (g ⊙ ·): the least-squares part in span(D) |
| hook kinds                       | L C R, written features in rows, what triggers in columns    |

X of an update is X(after) - X(before); where coordinates enter linearly that is X of their difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.adapters.fold import Fold
from featcl.adapters.hooked import HookedBlock
from featcl.adapters.lora import LoraSite
from featcl.adapters.peft_host import sides
from featcl.adapters.sets import feature_ids, feature_names
from featcl.errors import FeatclError
from featcl.files import digest_bytes, write_bytes

Coordinates = Mapping[str, Tensor]


@dataclass(frozen=True, order=True)
class FeatureKey:
    """One side of one feature: the block at whose output it lives, its id there, and `write` or `read`."""

    layer: int
    feature: int
    role: Literal["write", "read"]


@dataclass(frozen=True)
class Features:
    """The features of one set: the block at whose output they live, ids, and names where known."""

    layer: int
    ids: tuple[int, ...]
    names: Mapping[int, str]

    @classmethod
    def of(cls, directions: Any, layer: int) -> Features:
        return cls(layer, tuple(feature_ids(directions)), feature_names(directions))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Features:
        return cls(value["layer"], tuple(value["ids"]), {int(key): name for key, name in value["names"].items()})


@dataclass(frozen=True, eq=False)
class SiteMap:
    """How the coordinates of one adapted place become a table X of features.

    Attributes:
        site: Module path.
        form: `write`, `read` (rows are the features that are read) or `link` (rows written, columns read).
        rows: The features of the rows.
        columns: Of a link, the features of the columns, where there are any.
        bound: Name of the trained tensor in the span, if it is trained.
        free: Name of the other trained tensor, if it is trained.
        left: L.
        right: R of a link, or None.
    """

    site: str
    form: Literal["write", "read", "link"]
    rows: Features
    columns: Features | None
    bound: str | None
    free: str | None
    left: Float[Tensor, "k m"]
    right: Float[Tensor, "n k_r"] | None = None

    def table(self, coordinates: Coordinates, dtype: torch.dtype = torch.float64) -> Float[Tensor, "k n"]:
        """X."""
        table = self.left.to(dtype)
        for name in (self.bound, self.free):
            if name is None:
                continue
            value = coordinates[name].detach().to("cpu", dtype)
            if self.form == "read":
                value = value.T
            elif value.ndim == 1:
                value = torch.diag(value) if self.right is not None else value[:, None]
            table = table @ value
        return table if self.right is None else table @ self.right.to(dtype)


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """All adapted places of an adapter."""

    sites: tuple[SiteMap, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, adapter: Any) -> FeatureMap:
        """The map of an adapter's present directions; what it keeps frozen from earlier ones is left out."""
        if not adapter.spans():  # a rival that is bounded by no features
            return cls(())
        make = {LoraSite: _lora_site, HookedBlock: _hook_site}
        return cls(tuple(make[type(site)](site) for site in adapter.sites))

    def vectors(self, coordinates: Coordinates) -> dict[FeatureKey, Float[Tensor, " n"]]:
        """What an update does to each feature: its rows over all places, one after the other; norms are strengths."""
        parts: dict[FeatureKey, list[Tensor]] = {}
        for site in self.sites:
            table = site.table(coordinates)
            for keys, axis in _sides(site):
                for key, row in zip(keys, table if axis else table.T, strict=True):
                    parts.setdefault(key, []).append(row)
        return {key: torch.cat(rows) for key, rows in parts.items()}

    def strengths_of_change(
        self, before: Coordinates, after: Coordinates, *, linear: bool = False
    ) -> dict[FeatureKey, float]:
        """‖X(after) − X(before)‖ of each feature, in float32; with `linear`, X of their difference."""
        squares: dict[FeatureKey, float] = {}
        step = {name: after[name] - before[name] for name in self.inputs} if linear else {}
        for site in self.sites:
            if linear:
                table = site.table(step, torch.float32)
            else:
                table = site.table(after, torch.float32) - site.table(before, torch.float32)
            for keys, axis in _sides(site):
                for key, square in zip(keys, table.square().sum(axis).tolist(), strict=True):
                    squares[key] = squares.get(key, 0.0) + square
        return {key: square**0.5 for key, square in squares.items()}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the coordinates that it reads."""
        return tuple(name for site in self.sites for name in (site.bound, site.free) if name is not None)

    @property
    def names(self) -> dict[tuple[int, int], str]:
        """(layer, feature) -> what people call it; only those that have a name."""
        sets = [features for site in self.sites for features in (site.rows, site.columns) if features is not None]
        return {(s.layer, feature): name for s in sets for feature, name in s.names.items()}

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks at whose outputs features live."""
        return tuple(sorted({site.rows.layer for site in self.sites}))

    def to_bytes(self) -> bytes:
        """One safetensors file, the same for the same map."""
        from safetensors.torch import save

        head = [{**asdict(site), "left": None, "right": None} for site in self.sites]
        tensors = {f"{i}/left": site.left.float().contiguous() for i, site in enumerate(self.sites)}
        tensors |= {f"{i}/right": s.right.float().contiguous() for i, s in enumerate(self.sites) if s.right is not None}
        return save(tensors, metadata={"features": json.dumps(head, sort_keys=True, ensure_ascii=False)})

    def save(self, path: str | Path) -> str:
        """Write it atomically; returns its digest."""
        data = self.to_bytes()
        write_bytes(path, data)
        return digest_bytes(data)

    @classmethod
    def load(cls, path: str | Path) -> FeatureMap:
        """Read what `save` wrote.

        Raises:
            FeatclError: If there is none, or it is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                head = json.loads((file.metadata() or {})["features"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            return cls(tuple(_site(value, tensors, i) for i, value in enumerate(head)))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise FeatclError(f"{path}: not a map of features ({type(error).__name__}: {error})") from error


def _site(value: Mapping[str, Any], tensors: Mapping[str, Tensor], index: int) -> SiteMap:
    return SiteMap(
        value["site"],
        value["form"],
        Features.from_json(value["rows"]),
        None if value["columns"] is None else Features.from_json(value["columns"]),
        value["bound"],
        value["free"],
        tensors[f"{index}/left"],
        tensors.get(f"{index}/right"),
    )


def _sides(site: SiteMap) -> Iterator[tuple[list[FeatureKey], int]]:
    """The features of a table's rows, and of its columns where there are any; each with the axis to sum over."""
    role: Literal["write", "read"] = "read" if site.form == "read" else "write"
    yield [FeatureKey(site.rows.layer, feature, role) for feature in site.rows.ids], 1
    if site.columns is not None:
        yield [FeatureKey(site.columns.layer, feature, "read") for feature in site.columns.ids], 0


def _lora_site(site: LoraSite) -> SiteMap:
    plan = site.plan
    bound, free = sides(plan.role)
    held = site.frozen.get(bound, site.frozen.get(f"{bound}.basis"))
    columns = torch.eye(plan.fold.vectors.shape[1]) if held is None else held
    if bound in site.frozen and plan.role == "read":
        columns = columns.T  # lora_A = Q_rᵀ; a basis is stored as columns
    trained = {which: f"{site.name}.{which}" for which in site.trained}
    return SiteMap(
        site.name,
        plan.role,
        Features.of(plan.directions, plan.hook_layer),
        None,
        trained.get(bound),
        trained.get(free),
        (site.scale * _in_features(plan.fold, columns)).float(),
    )


def _hook_site(site: HookedBlock) -> SiteMap:
    plan = site.plan
    right = None if site.frame is None else site.frame.cpu().double()
    if site.read_basis is not None and plan.read is not None:
        read = _in_features(plan.read, site.read_basis).T
        right = read if right is None else right @ read
    source = None if plan.kind == "shift" else plan.directions if plan.gate is None else plan.gate
    return SiteMap(
        site.name,
        "link",
        Features.of(plan.directions, plan.layer),
        None if source is None else Features.of(source, plan.layer),
        f"{site.name}.{next(iter(site.trained))}",
        None,
        _in_features(plan.write, site.write_basis).float(),
        None if right is None else right.float(),
    )


def _in_features(fold: Fold, columns: Tensor) -> Tensor:
    return fold.in_features(columns.to(fold.vectors.device)).cpu()
