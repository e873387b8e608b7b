"""Which linear layers a constraint touches, and with which directions: pure decisions, no module is changed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featcl.adapters.fold import Fold, fold
from featcl.adapters.sets import DirectionSet, Role, bounding, feature_ids, independent_sets
from featcl.errors import FeatclError
from featcl.features.hooks import resolve
from featcl.models import ResidualMap, Site, inner_model, residual_map, resolve_hook
from featcl.subspace import Subspace

KINDS: dict[str, tuple[Role, ...]] = {
    "none": ("write", "read"),
    "write": ("write",),
    "read": ("read",),
    "both": ("write", "read"),
}


@dataclass(frozen=True, eq=False)
class SitePlan:
    """One linear layer to adapt.

    Attributes:
        site: The linear and the norm beside it.
        role: Whether its output is bounded (`write`) or its input (`read`).
        directions: The set that bounds it.
        hook_layer: Block at whose output these directions live.
        fold: Its frozen basis.
    """

    site: Site
    role: Role
    directions: DirectionSet
    hook_layer: int
    fold: Fold

    @property
    def name(self) -> str:
        """Full module path."""
        return self.site.name


def plan_sites(
    model: nn.Module,
    directions: DirectionSet | Mapping[int, DirectionSet],
    *,
    kind: str,
    layers: Sequence[int] | None = None,
    modules: Sequence[str] | None = None,
    protect: Any = None,
    fold_norms: bool = True,
    near_dependent: Literal["refuse", "drop"] = "refuse",
) -> tuple[SitePlan, ...]:
    """Every linear layer that `kind` adapts, with its basis, block by block; arguments as for `featcl.constrain`.

    Raises:
        FeatclError: As `featcl.constrain`.
    """
    residual = residual_map(model)
    check_directions(model, directions)
    sets = _sets_by_layer(model, residual, directions, layers)
    for layer, chosen in sets.items():
        check_vectors(chosen, residual.d_model, layer)
    hook_layers = {layer: _hook_layer(model, chosen) for layer, chosen in sets.items()}
    sites = _chosen_sites(residual, kind, sets, modules)
    _check_protected_roles(protect, {role for _, role in sites}, kind)
    if near_dependent == "drop":
        sets = independent_sets(sets, sites, fold_norms)
    folds: dict[tuple[Any, ...], Fold] = {}
    plans = []
    for site, role in sites:
        chosen = sets[site.layer]
        device = _device(model, site)
        key = (id(chosen), role, site.norm_name, device)  # readers behind one norm share a basis
        if key not in folds:
            folds[key] = fold(
                bounding(chosen, role).to(device),
                site,
                protected=protected_columns(protect, role, residual.d_model, device),
                fold_norms=fold_norms,
                names=[f"feature {feature}" for feature in feature_ids(chosen)],
            )
        plans.append(SitePlan(site, role, chosen, hook_layers[site.layer], folds[key]))
    return tuple(plans)


def _sets_by_layer(
    model: nn.Module, residual: ResidualMap, directions: Any, layers: Sequence[int] | None
) -> dict[int, DirectionSet]:
    """The set that bounds each adapted block: the one given for it, else the nearest above."""
    if isinstance(directions, Mapping):
        if not directions:
            raise FeatclError("no directions: the mapping from layer to directions is empty")
        given = {int(layer): directions[layer] for layer in sorted(directions)}
    else:
        given = {_hook_layer(model, directions): directions}
    for layer, chosen in given.items():
        _check_layer(layer, residual)
        if layer > (hook := _hook_layer(model, chosen)):
            raise FeatclError(f"layer {layer} lies above the hook of its directions, at the output of block {hook}")
    if layers is None:
        top = max(given)
        wanted = list(given) if isinstance(directions, Mapping) else default_layers(top, residual.n_layers)
    else:
        wanted = sorted({int(layer) for layer in layers})
    if not wanted:
        raise FeatclError("no layers to adapt: the list is empty")
    found = {}
    for layer in wanted:
        _check_layer(layer, residual)
        above = [top for top in given if top >= layer]
        if not above:
            raise FeatclError(f"layer {layer} lies above the hook, at the output of block {max(given)}")
        found[layer] = given[min(above)]
    return found


def default_layers(top: int, n_layers: int) -> list[int]:
    """Block L of the SAE and the ⌊n_layers/3⌋ before it."""
    return list(range(max(0, top - n_layers // 3), top + 1))


def _hook_layer(model: nn.Module, directions: DirectionSet) -> int:
    """The block of the hook; name and layer must agree, whichever spelling the name has."""
    name, layer = directions.hook_name, int(directions.layer)
    if name is None:
        return layer
    if not isinstance(name, str):
        raise FeatclError(f"directions: hook_name must be a name such as blocks.{{L}}.hook_resid_post, not {name!r}")
    try:
        found = resolve_hook(model, name)[1]  # knows the layers' path of any model, but only residual-stream hooks
    except FeatclError:
        found = resolve(model, name).layer
    if found != layer:
        raise FeatclError(f"directions: hook {name!r} lies at block {found}, but their layer is {layer}")
    return found


def _check_layer(layer: int, residual: ResidualMap) -> None:
    if not 0 <= layer < residual.n_layers:
        raise FeatclError(f"layer {layer} is out of range: the model has blocks 0 to {residual.n_layers - 1}")


def check_directions(model: nn.Module, directions: Any) -> None:
    """Refuse what is neither a set of directions nor a mapping from layers to sets, and a hook that is not its layer's.

    Raises:
        FeatclError: Such a value.
    """
    if isinstance(directions, Mapping):
        for layer in directions:
            _check_index("the mapping from layer to directions: a layer", layer)
    for chosen in directions.values() if isinstance(directions, Mapping) else [directions]:
        if not isinstance(chosen, DirectionSet) or not isinstance(chosen.vectors, Tensor):
            raise FeatclError(f"directions must be featcl.Directions, or {{layer: Directions}}, not {_short(chosen)}")
        _check_index("directions: their layer", chosen.layer)
        _hook_layer(model, chosen)


def check_layers(layers: Any) -> None:
    """Refuse layers that are not a list of whole numbers.

    Raises:
        FeatclError: Such layers.
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise FeatclError(f"layers must be a list of blocks such as [2, 3], not {_short(layers)}")
    for layer in layers:
        _check_index("layers: a block", layer)


def _check_index(what: str, value: Any) -> None:
    if not is_whole(value):
        raise FeatclError(f"{what} must be a whole number, not {_short(value)}")


def is_whole(value: Any) -> bool:
    """Whether it is an integer of any library; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """What to call a wrong value in one line."""
    return repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def check_vectors(directions: DirectionSet, d_model: int, layer: int) -> None:
    for what, vectors in (("directions", directions.vectors), ("read directions", directions.readers)):
        if vectors is None:
            continue
        if vectors.ndim != 2 or len(vectors) == 0:
            raise FeatclError(f"layer {layer}: {what} must be rows [k, d_model] with k >= 1, not {list(vectors.shape)}")
        if vectors.shape[1] != d_model:
            raise FeatclError(f"layer {layer}: {what} have width {vectors.shape[1]}, the model has d_model = {d_model}")
        if len(vectors) > d_model:
            raise FeatclError(f"layer {layer}: k = {len(vectors)} {what} do not fit into d_model = {d_model}")


def _chosen_sites(
    residual: ResidualMap, kind: str, layers: Mapping[int, Any], modules: Sequence[str] | None
) -> list[tuple[Site, Role]]:
    by_role: dict[Role, tuple[Site, ...]] = {"write": residual.writers, "read": residual.readers}
    sites: list[tuple[Site, Role]] = [
        (site, role) for role in KINDS[kind] for site in by_role[role] if site.layer in layers
    ]
    if modules is not None:
        have = sorted({site.name.rsplit(".", 1)[1] for site, _ in sites})
        if unknown := sorted(set(modules) - set(have)):
            raise FeatclError(f"kind {kind!r} has no module {unknown[0]!r}: it adapts {', '.join(have)}")
        sites = [(site, role) for site, role in sites if site.name.rsplit(".", 1)[1] in set(modules)]
    if not sites:
        raise FeatclError("no modules to adapt: the list is empty")
    return sorted(sites, key=lambda chosen: chosen[0].layer)


def _check_protected_roles(protect: Any, roles: set[Role], kind: str) -> None:
    """A mapping must name at least one role that the chosen modules have; else it would protect nothing."""
    if isinstance(protect, Mapping) and set(protect) <= {"write", "read"}:
        given = sorted(role for role, what in protect.items() if what is not None)
        if not set(given) & set(roles):
            raise FeatclError(
                f"protect: it names {' and '.join(given) or 'no role'}, but kind {kind!r} adapts what "
                f"{' and '.join(sorted(roles))}s here: nothing would be protected"
            )


def protected_columns(protect: Any, role: Role, d_model: int, device: torch.device) -> Tensor | None:
    """Orthonormal columns N of what a role must leave alone, from a subspace, rows, directions, or one per role."""
    if isinstance(protect, Mapping):
        if unknown := sorted(set(protect) - {"write", "read"}, key=str):
            raise FeatclError(f"protect: unknown role {unknown[0]!r}, it takes write and read")
        if all(what is None for what in protect.values()):
            raise FeatclError("protect: the mapping is empty, so nothing would be protected; it takes write and read")
        protect = protect.get(role)
    if protect is None:
        return None
    if not isinstance(protect, Subspace):
        rows = protect if isinstance(protect, Tensor) else getattr(protect, "vectors", None)
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            raise FeatclError(f"protect must be a Subspace, rows [m, d_model], or directions, not {_short(protect)}")
        protect = Subspace.from_vectors(rows, near_dependent="drop")
    if protect.d_model != d_model:
        raise FeatclError(f"protect: directions of width {protect.d_model}, the model has d_model = {d_model}")
    return protect.basis.to(device)


def _device(model: nn.Module, site: Site) -> torch.device:
    """Where a linear lies: a model can be spread over devices."""
    return inner_model(model).get_submodule(site.name).weight.device  # type: ignore[return-value]
