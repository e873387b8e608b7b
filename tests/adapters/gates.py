"""Directions with an encoder whose features fire on a known share of a model's own tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from featcl.adapters import constrain
from featcl.adapters.hook_adapter import HookAdapter
from featcl.features import Directions, FeatureEncoder
from featcl.models import residual_stream

KINDS = ("residual", "gated", "shift", "scale")


def directions_for(
    zoo: Any, model: Any, *, fires: float = 0.06, k: int = 6, layer: int = 2, seed: int = 0
) -> Directions:
    """JumpReLU features, each of which fires on a share `fires` of the tokens of `zoo.batch()`."""
    directions = zoo.directions(k, layer=layer, seed=seed)
    ids, mask = zoo.batch()
    hidden = residual_stream(model, ids, mask, layer=layer)[mask.bool()].float()
    W_enc = directions.readers.T.contiguous()
    b_dec = 0.1 * torch.ones(hidden.shape[1])
    hidden_pre = (hidden - b_dec) @ W_enc
    encoder = FeatureEncoder(
        W_enc=W_enc,
        b_enc=torch.zeros(k),
        b_dec=b_dec,
        threshold=hidden_pre.quantile(1 - fires, dim=0).clamp(min=1e-3),
        activation="jumprelu",
        active=0,
        chosen=tuple(range(k)),
    )
    return replace(directions, encoder=encoder, names=tuple(f"name {i}" for i in range(k)))


def hooked(zoo: Any, family: str, kind: str, **options: Any) -> HookAdapter:
    """An untrained hook adapter on a fresh random model."""
    model = zoo.model(family)
    adapter = constrain(model, directions_for(zoo, model), kind=kind, **options)
    assert isinstance(adapter, HookAdapter)
    return adapter


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of every position."""
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def streams(adapter: HookAdapter, ids: Tensor, mask: Tensor, *, layer: int = 2) -> tuple[Tensor, Tensor]:
    """The residual stream after `layer` of the base and of the adapted model."""
    with adapter.disabled():
        base = residual_stream(adapter.model, ids, mask, layer=layer)
    return base, residual_stream(adapter.model, ids, mask, layer=layer)
