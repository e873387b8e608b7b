"""Step, momentum and decay of each token and head, and how far the output is opened: sigmoids of a projection."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

MAX_MOMENTUM = 0.99
MIN_DECAY = 1e-4
"""Limits of η and of α: with them the state is bounded whatever the tokens, see `norm_bound`."""

AT_REST = {"step": -1.0, "momentum": 0.0, "decay": -6.0, "opening": 2.0}
"""What the sigmoids are taken of before training: θ = 0.27 θ_max, η = 0.5, α = 0.0026, output 0.88 open."""

GRADIENT = 8.0
"""Longest gradient of a token in a layer, over √d_value. With values of unit entries and an empty memory it is 2."""


def default_max_step(chunk_size: int, d_key: int) -> float:
    """θ_max = (1 + √(chunk / d_key))⁻².

    The largest eigenvalue of Σ k kᵀ over a chunk of random unit keys, by the law of Marchenko and Pastur (1967), is
    (1 + √(chunk / d_key))²; at this step the parallel update of a linear memory just does not overshoot twofold.
    """
    return (1.0 + math.sqrt(chunk_size / d_key)) ** -2


def norm_bound(max_step: float, max_gradient: float, *, momentum: bool, decay: bool) -> float:
    """What decay bounds: no layer of a head ever is longer than its start plus this, in the Frobenius norm.

    A token's gradient has at most length G, so |S_t| ≤ η_max |S_{t-1}| + θ_max G ≤ s = θ_max G / (1 - η_max), and
    |M_t| ≤ (1 - α_min) |M_{t-1}| + s ≤ |M_0| + s / α_min. Without decay |M_t| ≤ |M_0| + t s: the bound is infinite,
    but growth is linear.
    """
    longest = max_step * max_gradient / (1.0 - (MAX_MOMENTUM if momentum else 0.0))
    return longest / MIN_DECAY if decay else math.inf


def gate_values(
    raw: Float[Tensor, "batch time gates_heads"], *, heads: int, max_step: float, momentum: bool, decay: bool
) -> Float[Tensor, "batch time heads gates"]:
    """θ = θ_max σ(·), η = η_max σ(·), α = α_min + (1 - α_min) σ(·), and σ(·) of the opening where there is one.

    Args:
        raw: What the sigmoids are taken of: all heads' steps, then momenta, decays and openings.
        heads: Number of heads.
        max_step: θ_max.
        momentum: False puts η to 0.
        decay: False puts α to 0.
    """
    gates = torch.sigmoid(raw.unflatten(-1, (raw.shape[-1] // heads, heads)).transpose(-1, -2))
    scale = [max_step, MAX_MOMENTUM * momentum, (1.0 - MIN_DECAY) * decay, 1.0]
    shift = [0.0, 0.0, MIN_DECAY * decay, 0.0]
    return gates * gates.new_tensor(scale[: gates.shape[-1]]) + gates.new_tensor(shift[: gates.shape[-1]])
