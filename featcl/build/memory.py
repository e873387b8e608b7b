"""The memory of a config: what it is, where it is attached, and how its slow weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcl.build.longtexts import long_texts
from featcl.config import MemoryConfig, RunConfig
from featcl.errors import FeatclError
from featcl.features import Directions
from featcl.features.provenance import Digests
from featcl.learning.memorizing import MemoryTraining
from featcl.memory.attach import AttachedMemory, attach_memory
from featcl.memory.features import FeatureMemory
from featcl.memory.neural import NeuralMemory
from featcl.memory.saved import made_of, read_saved
from featcl.models import blocks, residual_map
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


def _load_weights_(attached: AttachedMemory, folder: str | Path) -> None:
    """Slow weights that `AttachedMemory.save` wrote; a memory of other settings would read them as something else."""
    try:
        was, tensors = read_saved(Path(folder))
    except FeatclError as error:
        raise FeatclError(f"memory.path: {error}") from error
    here = residual_map(attached.model)
    own = {"family": here.family, "d_model": here.d_model, "layer": attached.layer, "form": attached.form}
    own |= made_of(attached.memory)
    own, was = ({**made, **made["memory"], "memory": None} for made in (own, was))
    if differ := [f"{key} {was.get(key)}, here {own[key]}" for key in own if own[key] != was.get(key)]:
        raise FeatclError(f"memory.path: {folder} has {differ[0]}: set memory to what it was trained as")
    attached.load_tensors_(tensors)
