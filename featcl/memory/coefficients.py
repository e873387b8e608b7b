"""What each token of a chunk contributes to the chunk's end: scalars of the gates alone, for all chunks at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Coefficients(NamedTuple):
    """With gradients g_s at the chunk's starting weights, a chunk's end is linear in its start:

        M' = keep · M + carry · S - Σ_s write_s g_s        S' = hold · S - Σ_s impulse_s g_s

    Each is a product or a sum of products of numbers in [0, 1], times a step.
    """

    keep: Float[Tensor, "*rows"]
    carry: Float[Tensor, "*rows"]
    hold: Float[Tensor, "*rows"]
    write: Float[Tensor, "*rows chunk"]
    impulse: Float[Tensor, "*rows chunk"]


def chunk_coefficients(
    step: Float[Tensor, "*rows chunk"],
    momentum: Float[Tensor, "*rows chunk"],
    decay: Float[Tensor, "*rows chunk"],
    *,
    valid: Bool[Tensor, "*rows chunk"] | None = None,
) -> Coefficients:
    """Unroll S_t = η_t S_{t-1} - θ_t g_t, M_t = (1 - α_t) M_{t-1} + S_t over a chunk.

    Without gradients some tokens take (M, S) to (keep M + carry S, hold S). What token s wrote, its own S, goes through
    the tokens after it: write_s = θ_s (keep + carry of s+1 …), impulse_s = θ_s (hold of s+1 …).

    Args:
        step: θ of each token.
        momentum: η, in [0, 1].
        decay: α, in [0, 1].
        valid: False where there is no token: nothing happens there, not even what momentum would add. None: all.

    Returns:
        The five coefficients; a chunk without tokens leaves M and S as they are.

    Source: Titans, arXiv:2501.00663, eqs. 13-14 unrolled; their section 3.2 for the chunk-wise form.
    """
    added = momentum
    if valid is not None:
        step, momentum, decay, added = step * valid, torch.where(valid, momentum, 1.0), decay * valid, momentum * valid
    keep, hold, carry = _suffixes(1.0 - decay, momentum, added)
    one = torch.ones_like(step[..., :1])
    keep_after, hold_after = (torch.cat([part[..., 1:], one], dim=-1) for part in (keep, hold))
    carry_after = torch.cat([carry[..., 1:], torch.zeros_like(one)], dim=-1)
    write, impulse = step * (keep_after + carry_after), step * hold_after
    return Coefficients(keep[..., 0], carry[..., 0], hold[..., 0], write, impulse)


def _suffixes(keep: Tensor, hold: Tensor, carry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token and all after it together, from those of single tokens: by doubling, log₂(chunk) times.

    First (keep_1, hold_1, carry_1), then (keep_2, …): M'' = keep_2 (keep_1 M + carry_1 S) + carry_2 hold_1 S.
    """
    length, size = 1, keep.shape[-1]
    while length < size:
        first = [part[..., :-length] for part in (keep, hold, carry)]
        then = [part[..., length:] for part in (keep, hold, carry)]
        both = (first[0] * then[0], first[1] * then[1], torch.addcmul(then[0] * first[2], then[2], first[1]))
        keep, hold, carry = (
            torch.cat([new, old[..., -length:]], dim=-1) for new, old in zip(both, (keep, hold, carry), strict=True)
        )
        length *= 2
    return keep, hold, carry
