"""The memory of a config: what it is, where it is attached, and how its slow weights are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcl.build.longtexts import long_texts
from featcl.config import MemoryConfig, RunConfig
from featcl.errors import FeatclError
from featcl.features import Directions
from featcl.features.provenance import Digests
from featcl.files import write_bytes, write_json
from featcl.learning.memorizing import MemoryTraining
from featcl.memory.attach import AttachedMemory, attach_memory
from featcl.memory.features import FeatureMemory
from featcl.memory.neural import NeuralMemory
from featcl.memory.saved import MANIFEST, STATE, WEIGHTS
from featcl.models import blocks
from featcl.objectives.scoring import Scorer
from featcl.streams import Chat


def memory_of(
    config: RunConfig, model: Any, chosen: Directions | Mapping[int, Directions] | None
) -> AttachedMemory | None:
    """The memory of the config on its model, untrained or with the slow weights of `path`.

    Args:
        config: The run's.
        model: Adapted or not.
        chosen: The chosen features, for `kind: features`.

    Raises:
        FeatclError: If the layer or the saved weights do not fit.
    """
    wanted = config.memory
    if wanted is None:
        return None
    layer = _layer(wanted, model, chosen)
    common = wanted.model_dump(include={"depth", "chunk_size", "conv", "momentum", "decay"})
    if wanted.kind == "features":
        memory: Any = FeatureMemory(_features_at(layer, chosen), seed=config.seed, **common)
    else:
        width = model.config.get_text_config().hidden_size
        memory = NeuralMemory(
            width, heads=wanted.heads, head_dim=wanted.head_dim, persistent=wanted.persistent, seed=config.seed,
            **common,
        )  # fmt: skip
    attached = attach_memory(model, memory, layer=layer, form=wanted.form, seed=config.seed)
    if wanted.path is not None:
        try:
            _load_weights_(attached, wanted.path)
        except FeatclError:
            attached.detach()
            raise
    return attached


def _layer(wanted: MemoryConfig, model: Any, chosen: Directions | Mapping[int, Directions] | None) -> int:
    if wanted.layer is not None:
        return wanted.layer
    if wanted.kind == "features":
        return max(chosen) if isinstance(chosen, Mapping) else chosen.layer  # type: ignore[union-attr]
    return len(blocks(model)) // 2


def _features_at(layer: int, chosen: Directions | Mapping[int, Directions] | None) -> Directions:
    sets = chosen if isinstance(chosen, Mapping) else {chosen.layer: chosen} if chosen is not None else {}
    if layer not in sets:
        raise FeatclError(
            f"memory: kind features at layer {layer} needs features chosen there; features.sae has {sorted(sets)}"
        )
    return sets[layer]


def training_of(
    config: RunConfig, attached: AttachedMemory | None, scorer: Scorer, chat: Chat, *, unseen: Digests
) -> MemoryTraining | None:
    """The training that the config asks for, at its start; arguments as for `long_texts`, and the memory."""
    wanted = None if config.memory is None else config.memory.train
    if attached is None or wanted is None:
        return None
    texts = long_texts(config, wanted, chat, unseen=unseen)
    return MemoryTraining(attached, scorer, texts, steps=wanted.steps, lr=wanted.lr, gate_only=wanted.gate_only)


def save_memory(attached: AttachedMemory, folder: str | Path) -> None:
    """Write slow weights, gate and state; one that is constrained to features has these beside it, in `directions`."""
    from safetensors.torch import save

    folder = Path(folder)
    if isinstance(attached.memory, NeuralMemory):
        attached.save(folder)
        return
    attached.memory.directions.save(folder / "directions")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sorted(attached.tensors().items())}
    write_bytes(folder / WEIGHTS, save(tensors))
    if attached.state is not None:
        attached.state.save(folder / STATE)
    write_json(folder / MANIFEST, _settings(attached))


def _settings(attached: AttachedMemory) -> dict[str, Any]:
    """What slow weights mean something with."""
    features = getattr(attached.memory, "directions", None)
    made = {"layer": attached.layer, "form": attached.form, "memory": attached.memory.settings()}
    return made if features is None else {**made, "directions": features.digest}


def _load_weights_(attached: AttachedMemory, folder: str | Path) -> None:
    """Slow weights that `AttachedMemory.save` wrote; a memory of other settings would read them as something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        was = {**manifest, **manifest["memory"]}
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FeatclError(f"memory.path: {folder} holds no saved memory ({error})") from error
    own = _settings(attached)
    own |= own.pop("memory")
    if differ := [f"{key} {was.get(key)}, here {own[key]}" for key in own if own[key] != was.get(key)]:
        raise FeatclError(f"memory.path: {folder} has {differ[0]}: set memory to what it was trained as")
    attached.load_tensors_(tensors)
