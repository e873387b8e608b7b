"""Features that tell two kinds of text apart: by their mean activation, or along a residual vector between the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.features.activity import activity, compare, mean_rows
from featcl.features.selectors.base import Ranking
from featcl.features.tokens import Text


def contrast(sae: Any, model: Any, tokenizer: Any, *, positive: Sequence[Text], negative: Sequence[Text]) -> Ranking:
    """By effect size (Cohen's d), those whose difference passes the false discovery rate first; none below zero."""
    found = compare(*(activity(sae, model, tokenizer, texts) for texts in (positive, negative)))
    order = found.effect.argsort(descending=True, stable=True)
    order = order[(~found.significant[order]).int().argsort(stable=True)]  # significant ones first
    order = order[found.difference[order] > 0]
    scores = {"effect": found.effect, "difference": found.difference, "q_value": found.q_value}
    return Ranking(order, scores, facts={"significant": int(found.significant.sum())})


def persona(sae: Any, model: Any, tokenizer: Any, *, positive: Sequence[Text], negative: Sequence[Text]) -> Ranking:
    """By the cosine of the decoder row with v = mean(h | positive) − mean(h | negative), means over tokens.

    Source: Chen et al. 2025, arXiv:2507.21509 (persona vectors, and the SAE features nearest to them).
    """
    means = [mean_rows(sae, model, tokenizer, texts) for texts in (positive, negative)]
    vector = means[0] - means[1]
    scale = max(float(mean.norm()) for mean in means)
    if not float(vector.norm()) > 1e-6 * scale:
        raise FeatclError("persona: positive and negative texts have the same mean residual vector")
    rows = torch.nn.functional.normalize(sae.W_dec.detach().double().cpu(), dim=-1)
    cosine = rows @ (vector / vector.norm())
    order = cosine.argsort(descending=True, stable=True)
    facts = {"vector_norm": float(vector.norm()), "mean_norm": scale}
    return Ranking(order[cosine[order] > 0], {"cosine": cosine}, facts=facts)
