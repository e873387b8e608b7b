"""A hook adapter as a folder of its own: a JSON manifest and one safetensors file, byte-stable, read by featcl.

Such an update is no LoRA: it changes the residual stream itself, which no weight of the model holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from featcl import files
from featcl.adapters.adapter import DEFAULT_NAME
from featcl.adapters.fold import Fold
from featcl.adapters.hook_plan import HOOK_KINDS, HookPlan
from featcl.adapters.hooked import HookedBlock
from featcl.adapters.sets import DirectionSet, feature_ids, feature_names
from featcl.errors import FeatclError
from featcl.features.encoder import FeatureEncoder
from featcl.models import inner_model, residual_map, resolve_hook

if TYPE_CHECKING:
    from featcl.adapters.hook_adapter import HookAdapter

MANIFEST, TENSORS, FORMAT = "hook_adapter.json", "hook_adapter.safetensors", 1
_REASONS = {
    "residual": "it adds Q_w C Q_rᵀ h to the residual stream, which passes by every weight of the model",
    "gated": "it reads the SAE's activations, a non-linear function of the stream that no weight can hold",
    "shift": "it adds a constant to the residual stream, and these models' linears have no bias to hold it",
    "scale": "it rescales the residual stream, which passes by every weight of the model",
}


def refuse_peft(kind: str) -> FeatclError:
    """Why an adapter of this kind has neither a PEFT form nor a merged one."""
    return FeatclError(
        f"kind {kind!r} has no PEFT form and cannot be merged: {_REASONS[kind]}; "
        "keep the folder that `save` writes (featcl.load_adapter), or train kind write, read or both"
    )


def is_hook_folder(folder: str | Path) -> bool:
    """Whether `save_hooks` wrote this folder."""
    return (Path(folder) / MANIFEST).is_file()


def save_hooks(
    folder: str | Path, sites: Sequence[HookedBlock], *, kind: str, family: str, settings: Mapping[str, Any]
) -> None:
    """Write `hook_adapter.safetensors` and `hook_adapter.json`; the same adapter gives the same bytes.

    Args:
        folder: Made where it does not exist.
        sites: The blocks, with their directions, bases, encoders and coordinates.
        kind: The adapter's.
        family: The model's.
        settings: How it is to go on, for whoever loads it.
    """
    from safetensors.torch import save

    tensors = {f"{site.plan.layer}.{name}": t for site in sites for name, t in _tensors(site).items()}
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}  # what is kept shares tensors
    data = save(own, metadata={"format": "pt"})
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "settings": dict(settings),
        "family": family,
        "d_model": sites[0].write_basis.shape[0],
        "sites": [_facts(site) for site in sites],
        "digest": files.digest_bytes(data),
    }
    files.write_bytes(Path(folder) / TENSORS, data)
    files.write_json(Path(folder) / MANIFEST, manifest)


def load_adapter(folder: str | Path, model: Any, *, name: str = DEFAULT_NAME) -> HookAdapter:
    """Put a saved hook adapter on a model: logits are bit-equal to those of the adapter that was saved.

    Args:
        folder: What `HookAdapter.save` wrote.
        model: The model that it was trained on, or one of the same width and depth.
        name: Tells it apart from other adapters on the same model.

    Returns:
        The adapter, with its coordinates; it can go on being trained.

    Raises:
        FeatclError: If the folder holds something else, was changed, or does not fit the model.
    """
    from featcl.adapters.hook_adapter import HookAdapter

    folder = Path(folder)
    if not is_hook_folder(folder) and (folder / "adapter_config.json").is_file():
        raise FeatclError(f"{folder} is a plain PEFT adapter: load it with peft.PeftModel.from_pretrained(model, …)")
    manifest, tensors = _read(folder)
    here = residual_map(model)
    if (here.family, here.d_model) != (made_for := (manifest["family"], manifest["d_model"])):
        raise FeatclError(
            f"{folder} was learned on {made_for[0]} of width {made_for[1]}, "
            f"the model is {here.family} of {here.d_model}"
        )
    try:
        sites = [_loaded(model, manifest["kind"], facts, tensors) for facts in manifest["sites"]]
        settings = {key: manifest["settings"][key] for key in ("near_dependent", "remainder")}
        changes = int(manifest["settings"]["changes"])
    except (KeyError, TypeError, IndexError) as error:
        raise FeatclError(f"{folder / MANIFEST} lacks {error}, or holds what it cannot") from error
    adapter = HookAdapter(model, sites, kind=manifest["kind"], name=name, **settings)
    adapter.changes = changes
    return adapter


# --- one block ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SavedDirections:
    """A set of directions as it came back from an adapter's folder."""

    vectors: Float[Tensor, "k d_model"]
    readers: Float[Tensor, "k d_model"] | None
    feature_ids: tuple[int, ...]
    hook_name: str | None
    layer: int
    names: dict[int, str]
    encoder: FeatureEncoder | None = None


def _tensors(site: HookedBlock) -> dict[str, Tensor]:
    plan = site.plan
    found: dict[str, Tensor | None] = {"coordinates": site.coordinates, "write_basis": site.write_basis}
    found |= {"vectors": plan.directions.vectors, "readers": plan.directions.readers, "frame": site.frame}
    if plan.kind == "residual":
        found["read_basis"] = site.read_basis
    found |= {f"protected.{role}": columns for role, columns in plan.protected.items()}
    if plan.gate is not None and plan.gate is not plan.directions:
        found["gate.vectors"] = plan.gate.vectors
    if site.encoder is not None:
        found |= {f"encoder.{name}": tensor for name, tensor in site.encoder.tensors().items()}
    for number, earlier in enumerate(site.kept):
        found |= {f"kept{number}.{name}": tensor for name, tensor in _tensors(earlier).items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _facts(site: HookedBlock) -> dict[str, Any]:
    plan = site.plan
    gate = None if plan.gate is None or plan.gate is plan.directions else _set_facts(plan.gate)
    settings = None if site.encoder is None else site.encoder.settings()
    kept = [_facts(earlier) for earlier in site.kept]
    own = {"layer": plan.layer, "directions": _set_facts(plan.directions), "gate": gate, "encoder": settings}
    return own | ({"kept": kept} if kept else {})


def _set_facts(directions: DirectionSet) -> dict[str, Any]:
    names = feature_names(directions)
    ids = feature_ids(directions)
    return {"feature_ids": ids, "hook_name": directions.hook_name, "names": [names.get(i, "") for i in ids]}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        data = (folder / TENSORS).read_bytes()
        tensors = load(data)
        kind, version, digest, *_ = (manifest[key] for key in ("kind", "format", "digest", "family", "d_model"))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FeatclError(f"{folder} does not hold a saved hook adapter: {type(error).__name__}: {error}") from error
    if version != FORMAT or kind not in HOOK_KINDS:
        raise FeatclError(f"{folder}: kind {kind!r} in format {version} is unknown to this featcl (format {FORMAT})")
    if files.digest_bytes(data) != digest:
        raise FeatclError(f"{folder}: {TENSORS} does not match its digest; the file was changed")
    return manifest, tensors


def _loaded(model: Any, kind: Any, facts: dict[str, Any], tensors: dict[str, Tensor]) -> HookedBlock:
    """A block's update, with what is kept beside it."""
    path, layer = resolve_hook(model, f"blocks.{facts['layer']}.hook_resid_post")
    device = next(inner_model(model).get_submodule(path).parameters()).device
    own = {name: tensor.to(device) for name, tensor in _under(tensors, f"{layer}.").items()}
    site = _site((path, layer), kind, facts, own)
    for number, earlier in enumerate(facts.get("kept", ())):
        site.kept.append(_site((path, layer), kind, earlier, _under(own, f"kept{number}.")))
        site.kept[-1].coordinates.requires_grad_(False)
    return site


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _site(place: tuple[str, int], kind: Any, facts: dict[str, Any], own: dict[str, Tensor]) -> HookedBlock:
    path, layer = place
    encoder = _encoder(own, facts["encoder"])
    foreign = facts["gate"]
    own_encoder = None if foreign else encoder
    directions = _directions(facts["directions"], own["vectors"], own.get("readers"), layer, own_encoder)
    gate = None if encoder is None else directions
    if foreign:
        gate = _directions(foreign, own["gate.vectors"], None, layer, encoder)
    write = _fold(directions.vectors, own["write_basis"])
    read = write if kind == "scale" else None
    if kind == "residual":
        readers = directions.vectors if directions.readers is None else directions.readers
        read = _fold(readers, own["read_basis"])
    protected = {role: own[key] for role in HOOK_KINDS[kind] if (key := f"protected.{role}") in own}
    plan = HookPlan(kind, layer, path, directions, gate, write, read, protected)
    site = HookedBlock(plan)
    site.adopt_(plan, frame=own.get("frame"), coordinates=own["coordinates"])
    return site


def _fold(vectors: Tensor, basis: Tensor) -> Fold:
    return Fold(vectors.double(), basis.double(), None, centered=False)


def _directions(
    facts: dict[str, Any], vectors: Tensor, readers: Tensor | None, layer: int, encoder: FeatureEncoder | None
) -> SavedDirections:
    ids = tuple(facts["feature_ids"])
    names = {feature: name for feature, name in zip(ids, facts["names"], strict=True) if name}
    return SavedDirections(vectors, readers, ids, facts["hook_name"], layer, names, encoder)


def _encoder(tensors: dict[str, Tensor], settings: dict[str, Any] | None) -> FeatureEncoder | None:
    if settings is None:
        return None
    parts: dict[str, Any] = {"threshold": None, **_under(tensors, "encoder.")}
    return FeatureEncoder(**parts, **{**settings, "chosen": tuple(settings["chosen"])})
