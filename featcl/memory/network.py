"""The memory's own network M: products with its weights, SiLU between them, sizes kept by fixed scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

SILU_GAIN = 1.6765
"""1 / sqrt(E[SiLU(z)²]) for a standard normal z."""


def layer_scale(layer: int, d_in: int) -> float:
    """What a layer's input is multiplied by: 1 for the first, gain / sqrt(d_in) after a SiLU.

    Entries of the weights are of order one and every layer's input is then of length about one, as keys are, so that
    one step size fits every depth and width.

    Source: the NTK parametrisation, Jacot et al. 2018, arXiv:1806.07572, section 2.
    """
    return 1.0 if layer == 0 else SILU_GAIN / math.sqrt(d_in)


def predict(
    weights: Sequence[Float[Tensor, "*rows _ _"]], keys: Float[Tensor, "*rows tokens d_key"]
) -> Float[Tensor, "*rows tokens d_value"]:
    """M(k) for every key.

    Args:
        weights: Of each layer; one layer is a linear memory.
        keys: Of every row; or queries.
    """
    hidden = keys
    for layer, weight in enumerate(weights):
        hidden = hidden if layer == 0 else torch.nn.functional.silu(hidden) * layer_scale(layer, weight.shape[-2])
        hidden = hidden @ weight
    return hidden
