"""A short causal convolution along the stream, whose last inputs are part of the state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.memory import packing


def short_convolution(
    x: Float[Tensor, "batch time channels"],
    tail: Float[Tensor, "batch kept channels"],
    lengths: packing.Places,
    *,
    weight: Float[Tensor, "out kernel"],
) -> tuple[Float[Tensor, "batch time out"], Float[Tensor, "batch kept channels"]]:
    """Each channel is mixed with its own past.

    Args:
        x: Packed tokens.
        tail: The kernel - 1 tokens before them, zeros at the beginning.
        lengths: How many tokens of each row count.
        weight: The last column weighs the token itself. A multiple of the channels: several outputs per channel,
            those of one channel beside each other.

    Returns:
        The mixed tokens, and the tail for the next piece.
    """
    line = torch.cat([tail.to(x.dtype), x], dim=1)
    wide = line.repeat_interleave(len(weight) // x.shape[-1], dim=-1) if len(weight) != x.shape[-1] else line
    kept = weight.shape[1] - 1
    mixed = wide[:, kept:] * weight[:, kept].to(x.dtype)
    for back in range(1, kept + 1):
        mixed = torch.addcmul(mixed, wide[:, kept - back : wide.shape[1] - back], weight[:, kept - back].to(x.dtype))
    return mixed, packing.cut(line, lengths, kept, lengths + kept).to(tail.dtype).clone()
