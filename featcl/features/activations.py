"""Residual-stream activations of several layers in one pass, and replacing them on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.features.tokens import TokenBatch
from featcl.models import inner_model, residual_stream, resolve_hook


def layer_module(model: nn.Module, layer: int) -> nn.Module:
    """The block whose output is `blocks.{layer}.hook_resid_post`; a FeatclError where there is none."""
    path, _ = resolve_hook(model, hook_of(layer))
    return inner_model(model).get_submodule(path)


def hook_of(layer: int) -> str:
    """TransformerLens' name for the residual stream after block `layer`."""
    return f"blocks.{layer}.hook_resid_post"


def check_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Raise unless `layers` names one or more blocks of this model, each once."""
    if not layers or len(set(layers)) != len(layers):
        raise FeatclError(f"layers {list(layers)}: name at least one layer, each once")
    for layer in layers:
        layer_module(model, layer)


@torch.no_grad()
def layer_activations(
    model: nn.Module, batch: TokenBatch, *, layers: Sequence[int]
) -> Float[Tensor, "tokens layers d_model"]:
    """Outputs of `layers` on the counted tokens, float32; the forward stops at the highest of them.

    Args:
        model: A Hugging Face causal LM.
        batch: Tokens on the model's device.
        layers: Block indices, in the order of the result.
    """
    top = max(layers)
    lower: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: lower.__setitem__(layer, _hidden(output))

    modules = {layer: layer_module(model, layer) for layer in layers if layer != top}
    handles = [module.register_forward_hook(keep(layer)) for layer, module in modules.items()]
    try:
        lower[top] = residual_stream(model, batch.input_ids, batch.attention_mask, layer=top)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([lower[layer][batch.counted].float() for layer in layers], dim=1)


@contextmanager
def replacing(model: nn.Module, layer: int, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, the output h [batch, seq, d_model] of `layer` becomes `replace(h)`."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        changed = replace(_hidden(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = layer_module(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
