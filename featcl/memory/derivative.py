"""The derivative of one chunk, written out: from its end and what it read, to its start and what it was given."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.memory.inner import Fast, Inner, layer_scales, product, silu_backward


def retreat_(
    d_fast: Fast,
    fast: Fast,
    found: Inner,
    *,
    chunk: Float[Tensor, "three rows 1 1"],
    tokens: Float[Tensor, "kinds rows chunk"],
    d_outputs: Float[Tensor, "rows both d_value"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse of `inner_pass` and `advance`.

    Args:
        d_fast: Derivatives by weights and momentum at the chunk's end; changed in place to those at its start.
        fast: At the chunk's start.
        found: Of these weights.
        chunk: keep, carry, hold.
        tokens: As `advance` takes them.
        d_outputs: Derivative by what the queries read, in the lower half; the upper is filled with that by the error.

    Returns:
        The derivatives by keys and queries [rows, 2 chunk, d_key], by `chunk` [3, rows] and by `tokens`.
    """
    size, depth, scales = tokens.shape[-1], len(fast.weights), layer_scales(fast.weights)
    d_chunk = d_tokens = torch.zeros((), dtype=tokens.dtype, device=tokens.device)
    d_keys, d_deltas = [], []
    for layer in range(depth):
        d_key, d_delta, d_token = _written(d_fast, found, layer, scale=scales[layer], tokens=tokens)
        d_keys.append(d_key)
        d_deltas.append(d_delta)
        d_tokens, d_chunk = d_token + d_tokens, _carried_(d_fast, fast, layer, chunk) + d_chunk
    d_hidden = []
    for layer in range(depth - 1):  # the inner backward pass, reversed: from the first layer up
        outputs, scale = found.outputs[layer][:, :size], scales[layer + 1]
        d_through = silu_backward(d_deltas[layer], outputs)
        d_hidden.append(d_deltas[layer].mul_(found.through[layer]).mul_(_silu_second(outputs)))
        d_deltas[layer + 1].baddbmm_(d_through, fast.weights[layer + 1], alpha=scale)
        d_fast.weights[layer + 1].baddbmm_(d_through.mT, found.deltas[layer + 1], alpha=scale)
    d_outputs[:, :size] = d_deltas[-1]
    for layer in reversed(range(depth)):  # the forward pass, reversed
        d_fast.weights[layer].baddbmm_(found.inputs[layer].mT, d_outputs, alpha=scales[layer])
        d_inputs = product(d_outputs, fast.weights[layer].mT, scales[layer])
        d_inputs[:, :size] += d_keys[layer]
        if layer:
            d_outputs = silu_backward(d_inputs, found.outputs[layer - 1])
            d_outputs[:, :size] += d_hidden[layer - 1]
    return d_inputs, d_chunk, d_tokens


def _written(d_fast: Fast, found: Inner, layer: int, *, scale: float, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Through - s a_lᵀ (token / n_l δ_l), which weights and momentum got: by a_l, δ_l and the tokens' scalars."""
    delta, length = found.deltas[layer], found.lengths[layer]
    keys = found.inputs[layer][:, : delta.shape[1]]
    ends, amounts = [part[layer] for part in d_fast if part], (tokens / length)[..., None]
    along = [product(keys, end, -scale) for end in ends]
    overlap = torch.stack([(part * delta).sum(dim=-1) for part in along])
    rows = amounts * delta
    d_key, d_delta = product(rows[0], ends[0].mT, -scale), along[0].mul_(amounts[0])
    for end, row, part, amount in zip(ends[1:], rows[1:], along[1:], amounts[1:], strict=True):
        d_key.baddbmm_(row, end.mT, alpha=-scale)
        d_delta.addcmul_(part, amount)
    # n_l grows with the lengths of a_l and δ_l where the gradient is clipped; keys keep theirs
    clipped = length > found.floor
    if bool(clipped.any()):
        slope = torch.where(clipped, (tokens * overlap).sum(dim=0) / length, 0.0)[..., None]
        d_delta -= slope * delta / _square(delta)
        if layer:
            d_key -= slope * keys / _square(keys)
    return d_key, d_delta, overlap.div_(length)


def _carried_(d_fast: Fast, fast: Fast, layer: int, chunk: Tensor) -> Float[Tensor, "three rows"]:
    """Through keep M + carry S and hold S, in place; returns the derivatives by keep, carry and hold."""
    keep, carry, hold = chunk
    d_weight, weight = d_fast.weights[layer], fast.weights[layer]
    dots = [_dot(d_weight, weight)]
    if fast.momentum:
        d_momentum, momentum = d_fast.momentum[layer], fast.momentum[layer]
        dots += [_dot(d_weight, momentum), _dot(d_momentum, momentum)]
        d_momentum.mul_(hold).addcmul_(d_weight, carry)
    else:
        dots += [torch.zeros_like(dots[0])] * 2
    d_weight.mul_(keep)
    return torch.stack(dots)


def _dot(left: Tensor, right: Tensor) -> Float[Tensor, " rows"]:
    """Inner product of every row; cut in two, since a product of single vectors is many times slower."""
    parts = 2 if left[0].numel() % 2 == 0 else 1
    left, right = (tensor.view(len(tensor), parts, -1) for tensor in (left, right))
    return torch.bmm(left, right.mT).diagonal(dim1=1, dim2=2).sum(dim=-1)


def _square(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _silu_second(z: Tensor) -> Tensor:
    """SiLU''(z) = σ(1 - σ)(2 + z(1 - 2σ))."""
    s = torch.sigmoid(z)
    inner = torch.addcmul(z, z, s, value=-2.0).add_(2.0)
    return inner.mul_(s).mul_(s.neg_().add_(1.0))
