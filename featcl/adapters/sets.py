"""What a constraint needs of a set of directions, and the independent ones among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from featcl.adapters.fold import invertible
from featcl.models import Site
from featcl.subspace import independent_rows

Role = Literal["write", "read"]


@runtime_checkable
class DirectionSet(Protocol):
    """What a constraint needs of `featcl.Directions`."""

    @property
    def vectors(self) -> Tensor: ...  # [k, d_model]
    @property
    def readers(self) -> Tensor | None: ...  # [k, d_model]
    @property
    def feature_ids(self) -> Sequence[int] | None: ...
    @property
    def hook_name(self) -> str | None: ...
    @property
    def layer(self) -> int: ...


def feature_ids(directions: DirectionSet) -> list[int]:
    """The features' indices in their SAE, or positions where there is no SAE."""
    if directions.feature_ids is None:
        return list(range(len(directions.vectors)))
    return [int(feature) for feature in directions.feature_ids]


def feature_names(directions: DirectionSet) -> dict[int, str]:
    """What people call the features, by their ids; only those that have a name."""
    names = getattr(directions, "names", None)
    if not names:
        return {}
    ids = feature_ids(directions)
    if isinstance(names, dict):
        return {feature: str(names[feature]) for feature in ids if names.get(feature)}
    return {feature: str(name) for feature, name in zip(ids, names, strict=True) if name}


def bounding(directions: DirectionSet, role: Role) -> Float[Tensor, "k d_model"]:
    """The rows that bound what a linear of this role may do: decoder rows, or encoder columns where there are any."""
    return directions.vectors if role == "write" or directions.readers is None else directions.readers


@dataclass(frozen=True, eq=False)
class Subset:
    """Some features of a set."""

    vectors: Tensor
    readers: Tensor | None
    feature_ids: Sequence[int]
    hook_name: str | None
    layer: int
    names: dict[int, str]


def independent_sets(
    sets: Mapping[int, DirectionSet], sites: Sequence[tuple[Site, Role]], fold_norms: bool
) -> dict[int, DirectionSet]:
    """Each set without the features that are near-dependent at any of its sites, once folded."""
    kept: dict[int, set[int]] = {}
    for site, role in sites:
        chosen = sets[site.layer]
        vectors = bounding(chosen, role).double().cpu()
        gain = site.gain if fold_norms else None
        rows = independent_rows(vectors if gain is None else vectors / invertible(gain.double().cpu(), site)[0])
        kept[id(chosen)] = kept.get(id(chosen), set(rows)) & set(rows)
    found: dict[int, DirectionSet] = {}
    for chosen in {id(chosen): chosen for chosen in sets.values()}.values():
        rows = sorted(kept[id(chosen)])
        ids, names = feature_ids(chosen), feature_names(chosen)
        found[id(chosen)] = chosen if len(rows) == len(ids) else Subset(
            chosen.vectors[rows],
            None if chosen.readers is None else chosen.readers[rows],
            [ids[row] for row in rows],
            chosen.hook_name,
            chosen.layer,
            names,
        )  # fmt: skip
    return {layer: found[id(chosen)] for layer, chosen in sets.items()}
