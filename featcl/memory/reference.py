"""The paper's recurrence, one token after the other: slow, plain, and what the tests hold the memory against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.memory.network import predict


def recurrence(
    weights: Sequence[Float[Tensor, "_ _"]],
    momentum: Sequence[Float[Tensor, "_ _"]],
    *,
    queries: Float[Tensor, "tokens d_key"],
    keys: Float[Tensor, "tokens d_key"],
    values: Float[Tensor, "tokens d_value"],
    gates: Float[Tensor, "tokens 3"],
    chunk_size: int = 1,
    max_gradient: float = float("inf"),
) -> tuple[Float[Tensor, "tokens d_value"], list[Tensor], list[Tensor]]:
    """One memory of one head reads and writes a sequence.

        S_t = η_t S_{t-1} - θ_t ∇ℓ(M_c; k_t, v_t)    M_t = (1 - α_t) M_{t-1} + S_t    y_t = M_c(q_t)

    with ℓ = ‖M(k) - v‖² and M_c the memory at the start of t's chunk: M_{t-1} where the chunk is one token. The
    gradient of a token in a layer is clipped to the length `max_gradient`.

    Args:
        weights: M_0 of each layer.
        momentum: S_0 of each layer.
        queries: Read at the start of their chunk.
        keys: Stored.
        values: Stored under their keys.
        gates: Step θ, momentum η and decay α of every token.
        chunk_size: Tokens whose gradients are taken at the same weights.
        max_gradient: Longest gradient of one token in one layer.

    Returns:
        What was read, the last weights and the last momentum.

    Source: Titans, arXiv:2501.00663, eqs. 12-15; chunks: their section 3.2, eq. 16.
    """
    weights, momentum, reads = list(weights), list(momentum), []
    for t in range(len(keys)):
        if t % chunk_size == 0:
            start = list(weights)
        reads.append(predict(start, queries[t : t + 1])[0])
        step, keep, decay = gates[t]
        for layer, gradient in enumerate(inner_gradient(start, keys[t], values[t])):
            clip = (max_gradient / gradient.norm()).clamp(max=1.0)
            momentum[layer] = keep * momentum[layer] - step * clip * gradient
            weights[layer] = (1 - decay) * weights[layer] + momentum[layer]
    return torch.stack(reads), weights, momentum


def inner_gradient(
    weights: Sequence[Tensor], key: Float[Tensor, " d_key"], value: Float[Tensor, " d_value"]
) -> tuple[Tensor, ...]:
    """∇ℓ(M; k, v) in every layer, by autograd."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    with torch.enable_grad():
        loss = (predict(leaves, key[None])[0] - value).square().sum()
    return torch.autograd.grad(loss, leaves)
