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

    Backwards over the tokens, with A_s = ∏_{r>s} (1 - α_r), E_s = ∏_{r>s} η_r and u_s = A_s + η_{s+1} u_{s+1}, which
    collects what S_s adds to M from s on: write_s = θ_s u_s, impulse_s = θ_s E_s, carry = η_1 u_1.

    Args:
        step: θ of each token.
        momentum: η, in [0, 1].
        decay: α, in [0, 1].
        valid: False where there is no token: nothing happens there, not even what momentum would add. None: all.

    Returns:
        The five coefficients; a chunk without tokens leaves M and S as they are.

    Source: Titans, arXiv:2501.00663, eqs. 13-14 unrolled; their section 3.2 for the chunk-wise form.
    """
    if valid is not None:
        step, momentum, decay = step * valid, torch.where(valid, momentum, 1.0), decay * valid
    kept = 1.0 - decay
    keep = hold = torch.ones_like(step[..., 0])
    total = torch.zeros_like(keep)  # η_{s+1} u_{s+1}, the last token's being 0
    write, impulse = [], []
    for s in reversed(range(step.shape[-1])):
        total = total + (keep if valid is None else keep * valid[..., s])
        write.append(total)
        impulse.append(hold)
        total, keep, hold = total * momentum[..., s], keep * kept[..., s], hold * momentum[..., s]
    write.reverse()
    impulse.reverse()
    return Coefficients(keep, total, hold, torch.stack(write, -1) * step, torch.stack(impulse, -1) * step)
