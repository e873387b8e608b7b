"""Whether an SAE fits a model: reconstruction, sparsity, dead features, and what splicing it in costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features import hooks
from featcl.features.diagnosis import Fit, judge, remember
from featcl.features.hooks import Hook
from featcl.features.tokens import Text, TokenBatch, token_batches, token_windows
from featcl.models import max_context

FEWEST = 16
"""Fewer tokens say nothing about whether an SAE fits."""


@dataclass(frozen=True)
class SAEHealth:
    """How well an SAE stands for what it was trained on; BOS and padding are left out of every number.

    Attributes:
        fvu: Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − mean(x)‖²; 0 is perfect, 1 no better than the mean.
        l0: Mean number of active features per token.
        dead_fraction: Share of features that fired on none of the `tokens`.
        loss_recovered: (nll_zero − nll_spliced) / (nll_zero − nll); 1 is no loss, 0 as bad as zeros.
        nll: Nats per next token of the model as it is.
        nll_spliced: With x replaced by x̂ at the hook.
        nll_zero: With x replaced by zeros at the hook.
        tokens: How many tokens were read.
        hook_name: Where.
    """

    fvu: float
    l0: float
    dead_fraction: float
    loss_recovered: float
    nll: float
    nll_spliced: float
    nll_zero: float
    tokens: int
    hook_name: str

    def record(self) -> dict[str, Any]:
        """As a flat dictionary."""
        return asdict(self)


@torch.no_grad()
def check_sae(
    sae: Any,
    model: Any,
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    max_tokens: int = 16384,
    context: int | None = None,
    hook_name: str | None = None,
    strict: bool = True,
) -> SAEHealth:
    """Measure an SAE on texts; three forward passes per batch, stopped after `max_tokens`.

    Args:
        sae: A `sae_lens.SAE` of the residual stream, of MLP outputs, or of attention heads at `hook_z`.
        model: The causal LM it belongs to.
        tokenizer: Its tokenizer.
        texts: Strings or token ids; about `max_tokens` of them are read.
        max_tokens: Enough tokens stop the reading; rare features need more to count as alive.
        context: Longest window; by default the model's, at most 512.
        hook_name: Measure here instead of where the SAE was trained, as a comparison; never an error.
        strict: Whether numbers that are far off raise. False reports them.

    Raises:
        FeatclError: If the widths differ, the hook does not exist, the texts hold no token, or (`strict`) the SAE does
            not fit the model there; then the likely cause is named.
    """
    hook = hooks.resolve(model, hook_name or sae)
    if (have := hooks.width(model, hook)) != sae.cfg.d_in:
        raise FeatclError(f"the SAE has width {sae.cfg.d_in}, the model has {have} at {hook.hook_name}")
    context = context or min(512, max_context(model))
    sample: list[Text] = []
    windows = token_windows(
        tokenizer, remember(texts, sample), context=context, prepend_bos=sae.cfg.metadata["prepend_bos"]
    )
    sums = _Sums(sae)
    for batch in token_batches(windows, tokenizer, batch_tokens=2048, lookahead=32):
        _measure_(sums, model, batch.to(model.device), hook)
        if sums.tokens >= max_tokens:
            break
    health = sums.health(hook.hook_name)
    if strict and hook_name is None and health.tokens >= FEWEST:
        far_off = health.loss_recovered < 0 and health.fvu > 0.5
        judge(
            sae, model, tokenizer, sample, hook=hook, found=Fit(health.fvu, health.l0), far_off=far_off, context=context
        )
    return health


class _Sums:
    """Running sums over tokens, float64."""

    def __init__(self, sae: Any) -> None:
        self.sae = sae
        self.device = sae.W_dec.device
        self.tokens = self.predictions = 0
        self.error = self.square = self.active = 0.0
        self.total = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=self.device)
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=self.device)
        self.nll = torch.zeros(3, dtype=torch.float64)

    def reconstruct(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """x̂, with the sums over x and its features updated."""
        rows = x.to(self.device, torch.float32)
        parts = []
        for part in rows.split(max(1, 2**24 // self.sae.cfg.d_sae)):
            feature_acts = self.sae.encode(part)
            parts.append(self.sae.decode(feature_acts))
            self.active += int((feature_acts != 0).sum())
            self.fired |= (feature_acts != 0).any(dim=0)
        recons = torch.cat(parts)
        self.error += float((recons - rows).double().pow(2).sum())
        self.square += float(rows.double().pow(2).sum())
        self.total += rows.double().sum(dim=0)
        self.tokens += len(rows)
        return recons.to(x.device, x.dtype)

    def health(self, hook_name: str) -> SAEHealth:
        if self.tokens == 0 or self.predictions == 0:
            raise FeatclError("checking an SAE needs texts of at least two tokens besides BOS")
        variance = self.square - float(self.total.pow(2).sum()) / self.tokens
        nll, spliced, zero = (self.nll / self.predictions).tolist()
        return SAEHealth(
            fvu=self.error / variance if variance > 0 else float("nan"),
            l0=self.active / self.tokens,
            dead_fraction=1 - float(self.fired.double().mean()),
            loss_recovered=(zero - spliced) / (zero - nll) if zero != nll else float("nan"),
            nll=nll,
            nll_spliced=spliced,
            nll_zero=zero,
            tokens=self.tokens,
            hook_name=hook_name,
        )


def _measure_(sums: _Sums, model: Any, batch: TokenBatch, hook: Hook) -> None:
    counted = batch.counted
    kept: list[Tensor] = []

    def put(rows: Tensor) -> Any:
        def replace(x: Tensor) -> Tensor:
            changed = x.clone()
            changed[counted] = rows
            return changed

        return replace

    targets = counted[:, :-1] & batch.attention_mask[:, 1:].bool()
    with hooks.replacing(model, hook, lambda x: kept.append(x[counted])):
        nll = [_nll(model, batch, targets)]
    for rows in (sums.reconstruct(kept[0]), torch.zeros_like(kept[0])):
        with hooks.replacing(model, hook, put(rows)):
            nll.append(_nll(model, batch, targets))
    sums.nll += torch.tensor(nll, dtype=torch.float64)
    sums.predictions += int(targets.sum())


def _nll(model: Any, batch: TokenBatch, targets: Bool[Tensor, "batch seq_minus_1"]) -> float:
    """Summed NLL of the next token at `targets`."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    labels: Int[Tensor, " predictions"] = batch.input_ids[:, 1:][targets]
    return float(torch.nn.functional.cross_entropy(logits[:, :-1][targets].float(), labels, reduction="sum"))
