"""Streaming statistics of feature activations over texts: sums only, never an activation matrix of a whole corpus.

At any time there are the activations of one part of one batch (`encoder.CHUNK_BYTES` of them) and a few vectors of
length d_sae, however many tokens are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features import hooks
from featcl.features.activations import capture
from featcl.features.encoder import CHUNK_BYTES, FeatureEncoder
from featcl.features.tokens import Text, TokenBatch, token_batches, token_windows
from featcl.models import max_context

SIGNIFICANT = 0.05
"""False discovery rate below which a difference counts."""

Encode: TypeAlias = Callable[[Tensor], Iterator[tuple[slice, Tensor]]]
"""Rows [tokens, d_in] -> (which of them, their activations [rows, d_sae]), part by part; copy what is to be kept."""


def encode_in_parts(sae: Any) -> Encode:
    """All features of an SAE, a bounded number of activations at a time.

    Args:
        sae: A `sae_lens.SAE`.
    """
    encoder = FeatureEncoder.from_sae(sae, tuple(range(sae.cfg.d_sae)))
    if encoder is not None:
        return encoder.chunks
    size = max(1, CHUNK_BYTES // (4 * sae.cfg.d_sae))

    @torch.no_grad()
    def parts(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(rows), size):
            yield slice(start, min(start + size, len(rows))), sae.encode(rows[start : start + size].float())

    return parts


def windows_of(
    sae: Any, model: Any, tokenizer: Any, texts: Iterable[Text], *, context: int | None = None
) -> Iterator[list[int]]:
    """Windows of the texts, with the BOS convention of the SAE; by default of the model's context, at most 512."""
    context = context or min(512, max_context(model))
    return token_windows(tokenizer, texts, context=context, prepend_bos=sae.cfg.metadata["prepend_bos"])


def hook_rows(
    sae: Any, model: Any, tokenizer: Any, texts: Iterable[Text], *, context: int | None = None
) -> Iterator[tuple[TokenBatch, Float[Tensor, "tokens d_in"]]]:
    """What the SAE reads on the counted tokens of each batch, float32, on the SAE's device."""
    hook = hooks.resolve(model, sae)
    for batch in token_batches(windows_of(sae, model, tokenizer, texts, context=context), tokenizer):
        batch = batch.to(model.device)
        if batch.counted.any():
            yield batch, capture(model, batch, hooks=[hook])[0].float().to(sae.W_dec.device)


def mean_rows(sae: Any, model: Any, tokenizer: Any, texts: Iterable[Text]) -> Float[Tensor, " d_in"]:
    """Mean over tokens of what the SAE reads, float64; BOS and padding are left out."""
    total, tokens = torch.zeros(sae.cfg.d_in, dtype=torch.float64), 0
    for _, rows in hook_rows(sae, model, tokenizer, texts):
        total += rows.sum(dim=0, dtype=torch.float64).cpu()
        tokens += len(rows)
    if tokens == 0:
        raise FeatclError("the texts hold no tokens besides BOS")
    return total / tokens


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
        sae: A `sae_lens.SAE`.
        model: The causal LM it belongs to.
        tokenizer: Its tokenizer.
        texts: Strings or token ids; a text longer than the context counts as several windows.
        context: Longest window; by default the model's, at most 512.

    Raises:
        FeatclError: If the texts hold no token.
    """
    sums, encode = WindowSums(sae.cfg.d_sae, sae.W_dec.device), encode_in_parts(sae)
    for batch, rows in hook_rows(sae, model, tokenizer, texts, context=context):
        owner = batch.counted.nonzero()[:, 0].to(rows.device)  # the window of each counted token, ascending
        for where, feature_acts in encode(rows):
            sums.add_(feature_acts, owner[where])
        sums.close_()
    return sums.activity()


class WindowSums:
    """Running sums over windows of one number per feature and token; a window may come in several parts in a row."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.total, self.squares, self.active = (
            torch.zeros(d_sae, dtype=torch.float64, device=device) for _ in range(3)
        )
        self.windows = self.tokens = 0
        self.owner, self.sum, self.count = -1, torch.zeros(d_sae, dtype=torch.float64, device=device), 0

    def add_(self, feature_acts: Float[Tensor, "rows d_sae"], owner: Int[Tensor, " rows"]) -> None:
        """Add some tokens; `owner` says which window each belongs to, in ascending order."""
        owners, row, counts = owner.unique_consecutive(return_inverse=True, return_counts=True)
        member = torch.nn.functional.one_hot(row, len(owners)).to(feature_acts.dtype)
        sums = (member.T @ feature_acts).double()  # [windows of this part, d_sae]
        self.active += (feature_acts > 0).sum(dim=0)
        if self.owner == int(owners[0]):
            sums[0] += self.sum
            counts[0] += self.count
        else:
            self.close_()
        self._finished_(sums[:-1] / counts[:-1, None])
        self.owner, self.sum, self.count = int(owners[-1]), sums[-1].clone(), int(counts[-1])
        self.tokens += len(owner)

    def close_(self) -> None:
        """No more tokens of the window that is open."""
        if self.count:
            self._finished_((self.sum / self.count)[None])
        self.owner, self.count = -1, 0

    def _finished_(self, means: Float[Tensor, "windows d_sae"]) -> None:
        self.total += means.sum(dim=0)
        self.squares += means.pow(2).sum(dim=0)
        self.windows += len(means)

    def activity(self) -> Activity:
        """Mean and variance over the windows that were closed.

        Raises:
            FeatclError: If there was no token.
        """
        if self.tokens == 0:
            raise FeatclError("the texts hold no tokens besides BOS")
        mean = self.total / self.windows
        variance = ((self.squares - self.windows * mean.pow(2)) / max(1, self.windows - 1)).clamp(min=0)
        return Activity(self.windows, self.tokens, mean.cpu(), variance.cpu(), self.active.long().cpu())


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
