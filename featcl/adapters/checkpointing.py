"""Gradient checkpointing that leaves the frozen trunk out of the autograd graph.

`model.gradient_checkpointing_enable()` of transformers makes the embeddings require gradients, so that every block
below the lowest adapter is recomputed and differentiated for nothing. The gradients of the coordinates are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featcl.adapters.trunk import trunk_end
from featcl.errors import FeatclError
from featcl.models import blocks, inner_model


def checkpoint_(model: nn.Module, *, use_reentrant: bool = False) -> None:
    """Recompute activations in the backward pass, from the lowest adapted block up; acts while `model.training`.

    Args:
        model: An adapted model, `adapter.model`.
        use_reentrant: Which of torch's two ways. The reentrant one differentiates a block only if its input requires
            a gradient, so the lowest adapted block is given one; its cost is one more product per reader.

    Raises:
        FeatclError: If nothing is adapted.
    """
    causal: Any = inner_model(model)
    found, lowest = blocks(causal), trunk_end(causal)
    if lowest == len(found):
        raise FeatclError("no block is adapted, so there is nothing to differentiate and to checkpoint")
    causal.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    causal.disable_input_require_grads()
    for block in found[:lowest]:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    if use_reentrant and not any(hook is _require_grad for hook in found[lowest]._forward_pre_hooks.values()):
        found[lowest].register_forward_pre_hook(_require_grad)


def _require_grad(block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    stream: Tensor = inputs[0]
    if not (block.training and block.gradient_checkpointing and torch.is_grad_enabled()) or stream.requires_grad:
        return None
    return (stream.detach().requires_grad_(), *inputs[1:])
