"""Streaming statistics of feature activations over texts: sums only, never an activation matrix of a whole corpus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features.activations import layer_activations
from featcl.features.saelens import sae_hook
from featcl.features.tokens import Text, token_batches, token_windows
from featcl.models import max_context, resolve_hook

SIGNIFICANT = 0.05
"""False discovery rate below which a difference counts."""


@dataclass(frozen=True)
class Activity:
    """What each feature did on some texts; BOS and padding are left out.

    Attributes:
        windows: Number of windows, the independent samples of a comparison.
        tokens: Number of tokens.
        mean: Mean over windows of the window's mean activation.
        variance: Sample variance over windows of that mean.
        active: Number of tokens on which the feature fired.
    """

    windows: int
    tokens: int
    mean: Float[Tensor, " d_sae"]
    variance: Float[Tensor, " d_sae"]
    active: Int[Tensor, " d_sae"]


@torch.no_grad()
def activity(sae: Any, model: Any, tokenizer: Any, texts: Iterable[Text], *, context: int | None = None) -> Activity:
    """Read texts once and keep sums per feature, float64.

    Args:
        sae: A `sae_lens.SAE` of the residual stream.
        model: The causal LM it belongs to.
        tokenizer: Its tokenizer.
        texts: Strings or token ids; a text longer than the context counts as several windows.
        context: Longest window; by default the model's, at most 512.

    Raises:
        FeatclError: If the texts hold no token.
    """
    _, layer = resolve_hook(model, sae_hook(sae))
    device, d_sae = sae.W_dec.device, sae.cfg.d_sae
    total, squares = (torch.zeros(d_sae, dtype=torch.float64, device=device) for _ in range(2))
    active = torch.zeros(d_sae, dtype=torch.long, device=device)
    windows = tokens = 0
    context = context or min(512, max_context(model))
    for batch in token_batches(
        token_windows(tokenizer, texts, context=context, prepend_bos=sae.cfg.metadata["prepend_bos"]), tokenizer
    ):
        hidden = layer_activations(model, batch.to(model.device), layers=[layer])[:, 0].to(device)
        owner = batch.counted.nonzero()[:, 0].to(device)  # the window of each counted token
        sums = torch.zeros(len(batch.counted), d_sae, dtype=torch.float64, device=device)
        rows = max(1, 2**24 // d_sae)
        for part, part_owner in zip(hidden.split(rows), owner.split(rows), strict=True):
            feature_acts = sae.encode(part)
            sums.index_add_(0, part_owner, feature_acts.double())
            active += (feature_acts > 0).sum(dim=0)
        counts = batch.counted.sum(dim=1).to(device)
        means = sums[counts > 0] / counts[counts > 0, None]
        total, squares = total + means.sum(dim=0), squares + means.pow(2).sum(dim=0)
        windows, tokens = windows + len(means), tokens + int(counts.sum())
    if tokens == 0:
        raise FeatclError("the texts hold no tokens besides BOS")
    mean = total / windows
    variance = ((squares - windows * mean.pow(2)) / max(1, windows - 1)).clamp(min=0)
    return Activity(windows, tokens, mean.cpu(), variance.cpu(), active.cpu())


@dataclass(frozen=True)
class Contrast:
    """A feature-wise comparison of two sets of windows.

    Attributes:
        difference: Mean activation on the positive minus the negative windows.
        effect: Cohen's d, difference / pooled standard deviation.
        q_value: Two-sided Welch test, Benjamini-Hochberg adjusted over all features.
        significant: Active more on the positive windows, q_value at most 0.05.
    """

    difference: Float[Tensor, " d_sae"]
    effect: Float[Tensor, " d_sae"]
    q_value: Float[Tensor, " d_sae"]
    significant: Bool[Tensor, " d_sae"]


def compare(positive: Activity, negative: Activity) -> Contrast:
    """Difference of means with effect size and false discovery rate.

    t = (m₊ − m₋) / √(v₊/n₊ + v₋/n₋), degrees of freedom after Welch and Satterthwaite. The p value uses Wallace's
    normal form of t, z = (8ν + 1)/(8ν + 3) · √(ν log(1 + t²/ν)), within 2 % of the exact z for ν ≥ 3.

    Raises:
        FeatclError: If a side has fewer than two windows.

    Source: Wallace 1959, Ann. Math. Statist. 30, 1121; Benjamini & Hochberg 1995, JRSS B 57, 289.
    """
    if min(positive.windows, negative.windows) < 2:
        raise FeatclError("contrast needs at least two positive and two negative texts")
    difference = positive.mean - negative.mean
    floor = 1e-6 * max(float(positive.mean.max()), float(negative.mean.max()), 1e-30)  # of rounding, not of features
    parts = [(side.variance + floor**2) / side.windows for side in (positive, negative)]
    error = parts[0] + parts[1]
    t_squared = difference.pow(2) / error
    freedom = error.pow(2) / (parts[0].pow(2) / (positive.windows - 1) + parts[1].pow(2) / (negative.windows - 1))
    z = (8 * freedom + 1) / (8 * freedom + 3) * (freedom * torch.log1p(t_squared / freedom)).sqrt()
    q_value = benjamini_hochberg(torch.special.erfc(z / 2**0.5))
    weights = [side.windows - 1 for side in (positive, negative)]
    pooled = (weights[0] * positive.variance + weights[1] * negative.variance) / sum(weights) + floor**2
    return Contrast(difference, difference / pooled.sqrt(), q_value, (q_value <= SIGNIFICANT) & (difference > 0))


def benjamini_hochberg(p_values: Float[Tensor, " tests"]) -> Float[Tensor, " tests"]:
    """Adjusted p values: q_(i) = min over j ≥ i of p_(j) · m / j, at most 1."""
    m = len(p_values)
    order = p_values.argsort(descending=True)
    ranks = torch.arange(m, 0, -1, dtype=p_values.dtype)
    adjusted = torch.empty_like(p_values)
    adjusted[order] = (p_values[order] * m / ranks).cummin(dim=0).values.clamp(max=1)
    return adjusted
