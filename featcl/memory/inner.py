"""One chunk: the inner loss's gradients at the chunk's starting weights in closed form, and the chunk's end.

Rows are batch and head. With a_l the input of layer l (a_1 the unit keys), s_l its scale, z_l = s_l a_l W_l, and δ_l
half the gradient of ℓ = ‖z_L - v‖² by z_l:

    δ_L = z_L - v        δ_l = s_{l+1} δ_{l+1} W_{l+1}ᵀ ⊙ SiLU'(z_l)        ∇_l ℓ = 2 s_l a_lᵀ δ_l  for one token

A gradient longer than G is clipped to G: ∇ = G s_l a_lᵀ δ_l / n_l with n_l = max(s_l |a_l| |δ_l|, G / 2).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.memory.network import layer_scale

Layers: TypeAlias = list[Tensor]
"""One tensor per layer."""

LARGEST = 1e15
"""Larger entries of δ are cut where there are hidden layers: far outside of all use, and far from an overflow."""

silu, silu_backward = torch.nn.functional.silu, torch.ops.aten.silu_backward


class Fast(NamedTuple):
    """The fast weights while a scan changes them, [rows, d_in, d_out] each; or derivatives by them."""

    weights: Layers
    momentum: Layers  # empty where there is none

    def clone(self) -> Fast:
        """A copy, each tensor contiguous."""
        return Fast(*([layer.clone(memory_format=torch.contiguous_format) for layer in part] for part in self))


class Inner(NamedTuple):
    """A chunk's forward pass of keys and queries, and backward pass of the keys; lists have an entry per layer."""

    inputs: Layers  # a_l of keys and, below them, queries [rows, 2 chunk, d_in]
    outputs: Layers  # z_l
    deltas: Layers  # δ_l of the keys [rows, chunk, d_out]
    through: Layers  # s_{l+1} δ_{l+1} W_{l+1}ᵀ, which δ_l is made of; none for the last layer
    lengths: Layers  # n_l [rows, chunk]
    floor: float  # G / 2, which n_l exceeds where the gradient is clipped


def inner_pass(
    weights: Layers,
    tokens: Float[Tensor, "rows both d_key"],
    values: Float[Tensor, "*rows chunk d_value"],
    *,
    max_gradient: float,
) -> Inner:
    """Forward and backward of one chunk.

    Args:
        weights: At the chunk's start.
        tokens: Keys and below them queries, of length one.
        values: Of the keys; rows may be in two axes.
        max_gradient: G.
    """
    size, depth, scales, floor = values.shape[-2], len(weights), layer_scales(weights), 0.5 * max_gradient
    inputs, outputs = [tokens], [product(tokens, weights[0], scales[0])]
    for layer in range(1, depth):
        inputs.append(silu(outputs[-1]))
        outputs.append(product(inputs[-1], weights[layer], scales[layer]))
    error = outputs[-1][:, :size].view(values.shape) - values
    deltas, through, lengths = [error.view(-1, size, error.shape[-1])], [], []
    for layer in reversed(range(depth)):
        if depth > 1:
            deltas[0].clamp_(-LARGEST, LARGEST)
        length = torch.linalg.vector_norm(deltas[0], dim=-1)
        if layer:  # keys have length one
            length.mul_(torch.linalg.vector_norm(inputs[layer][:, :size], dim=-1)).mul_(scales[layer])
            through.insert(0, product(deltas[0], weights[layer].mT, scales[layer]))
            deltas.insert(0, silu_backward(through[0], outputs[layer - 1][:, :size]))
        lengths.insert(0, length.clamp_(min=floor))
    return Inner(inputs, outputs, deltas, through, lengths, floor)


def advance(
    fast: Fast,
    found: Inner,
    *,
    chunk: Float[Tensor, "three rows 1 1"],
    tokens: Float[Tensor, "kinds rows chunk"],
    in_place: bool = False,
) -> Fast:
    """From a chunk's start to its end.

    Args:
        fast: At the start.
        found: Of the same weights.
        chunk: keep, carry, hold.
        tokens: G write and, where there is momentum, G impulse.
        in_place: Whether `fast` becomes the end, or stays as it is.

    Source: Titans, arXiv:2501.00663, eqs. 13-14 over a chunk, eq. 16.
    """
    keep, carry, hold = chunk
    end = fast if in_place else Fast([], [])
    for layer, scale in enumerate(layer_scales(fast.weights)):
        weight, delta = fast.weights[layer], found.deltas[layer]
        keys, amounts = found.inputs[layer][:, : delta.shape[1]].mT, (tokens / found.lengths[layer])[..., None]
        weight = weight.mul_(keep) if in_place else weight * keep
        if fast.momentum:
            momentum = fast.momentum[layer]
            weight.addcmul_(momentum, carry)
            momentum = momentum.mul_(hold) if in_place else momentum * hold
            momentum.baddbmm_(keys, amounts[1] * delta, alpha=-scale)
        weight.baddbmm_(keys, amounts[0] * delta, alpha=-scale)
        if not in_place:
            end.weights.append(weight)
            end.momentum.extend([momentum] if fast.momentum else [])
    return end


def layer_scales(weights: Layers) -> list[float]:
    """s of each layer."""
    return [layer_scale(layer, weight.shape[-2]) for layer, weight in enumerate(weights)]


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left @ right of every row."""
    if scale == 1.0:
        return torch.bmm(left, right)
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)
