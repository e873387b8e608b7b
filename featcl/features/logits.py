"""What a direction does to the next token: direct logit attribution through the final norm and the unembedding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.features.activations import capture
from featcl.features.hooks import resolve
from featcl.features.tokens import TokenBatch
from featcl.models import residual_map, unembedding

VOCABULARY_ROWS = 16384
"""Rows of W_U that are in float32 at a time."""


@torch.no_grad()
def logit_effects(
    model: Any, vectors: Float[Tensor, "k d_model"], *, inverse_rms: float = 1.0
) -> Float[Tensor, "k vocab"]:
    """Change of each logit per unit of a direction in the final residual stream, less the mean over the vocabulary.

    effect = W_U (g ⊙ d) · ⟨1 / rms(h)⟩, d less its mean where the final norm subtracts it (OLMo-1)

    The norm's divisor is held fixed, later blocks are passed by, and a soft-cap of the logits (Gemma-2), which keeps
    their order, is left out. The mean is taken away since adding a constant to all logits changes no probability.

    Args:
        model: A causal LM whose final norm and unembedding are known.
        vectors: Rows in the residual stream.
        inverse_rms: Mean of 1 / rms(h) over tokens, h the final residual stream (`final_inverse_rms`).

    Returns:
        Logits, float32, on the CPU.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Elhage et al. 2021, direct logit attribution.
    """
    out = unembedding(model)
    rows = vectors.detach().float().to(out.weight.device)
    if out.centered:
        rows = rows - rows.mean(dim=-1, keepdim=True)
    if out.gain is not None:
        rows = rows * out.gain.to(rows.device)
    effects = torch.cat([(rows @ part.float().T).cpu() for part in out.weight.split(VOCABULARY_ROWS)], dim=-1)
    return (effects - effects.mean(dim=-1, keepdim=True)) * inverse_rms


@torch.no_grad()
def final_inverse_rms(model: Any, batch: TokenBatch) -> float:
    """Mean over counted tokens of 1 / rms of the final residual stream, as the final norm divides by it."""
    out, last = unembedding(model), residual_map(model).n_layers - 1
    [hidden] = capture(model, batch, hooks=[resolve(model, f"blocks.{last}.hook_resid_post")])
    hidden = hidden.float()
    if out.centered:
        hidden = hidden - hidden.mean(dim=-1, keepdim=True)
    return float((hidden.pow(2).mean(dim=-1) + out.eps).rsqrt().mean())
