"""Features by the gradient of a loss at the hook: `attribution` (activation × gradient) and `gradient_energy`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features import hooks
from featcl.features.activity import WindowSums, activity, encode_in_parts, windows_of
from featcl.features.selectors.base import Ranking
from featcl.features.tokens import Text, TokenBatch, token_batches

Loss: TypeAlias = Callable[[Tensor, TokenBatch], Tensor]
"""loss(logits [batch, seq, vocab], batch) -> a scalar summed over the batch."""


def attribution(
    sae: Any,
    model: Any,
    tokenizer: Any,
    *,
    positive: Sequence[Text] | None = None,
    stream: Sequence[Text] | None = None,
    negative: Sequence[Text] | None = None,
    loss: Loss | None = None,
) -> Ranking:
    """By how much the loss of the task would rise, to first order, without what is the task's own in the feature.

    Scaling a feature down to its level on the negative texts, a_t → s a_t with s = mean a₋ / mean a₊, changes the loss
    by A = −(1 − s) Σ_t a_t ∂L/∂a_t, per token of the positive texts. ∂L/∂a = g · W_dec row, g the gradient at the hook.
    Without negative texts s = 0: the feature is ablated.

    Args:
        sae: The SAE.
        model: The causal LM.
        tokenizer: Its tokenizer.
        positive: Texts of the task; where there are none, `stream`.
        stream: As above.
        negative: Texts that are not of the task.
        loss: Of the task; by default the next-token negative log-likelihood.

    Source: Marks et al. 2024, arXiv:2403.19647, eq. 3 (attribution patching at SAE features).
    """
    texts = positive if positive is not None else stream
    if texts is None:
        raise FeatclError("attribution needs positive or stream texts")
    ablation = _ablation(sae, model, tokenizer, texts, loss)
    score, scores = ablation, {"attribution": ablation}
    if negative is not None:
        here, elsewhere = (activity(sae, model, tokenizer, side).mean for side in (texts, negative))
        scores["own_share"] = torch.where(here > 0, 1 - elsewhere / here.clamp(min=1e-30), 0.0).clamp(min=0)
        scores["attribution"] = score = ablation * scores["own_share"]
    order = score.argsort(descending=True, stable=True)
    return Ranking(order[score[order] > 0], scores)


attribution.needs = ("positive|stream",)  # pyright: ignore[reportFunctionMemberAccess]


def gradient_energy(
    sae: Any, model: Any, tokenizer: Any, *, stream: Sequence[Text], loss: Loss | None = None
) -> Ranking:
    """By Σ_t (g_t · d)² / Σ_t ‖g_t‖², g_t the loss gradient at the hook, d the decoder row; chance is 1 / width."""
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=-1)
    energy, total = torch.zeros(len(rows), dtype=torch.float64), 0.0
    for batch, _, gradient in loss_gradients(sae, model, tokenizer, stream, loss):
        for part in gradient[batch.counted.to(gradient.device)].split(max(1, 2**22 // len(rows))):
            energy += (part @ rows.T).pow(2).sum(dim=0, dtype=torch.float64).cpu()
            total += float(part.double().pow(2).sum())
    if total == 0:
        raise FeatclError("gradient_energy: the loss on the stream has no gradient at this hook")
    share = energy / total
    order = share.argsort(descending=True, stable=True)
    return Ranking(order, {"energy_share": share}, facts={"chance": 1 / rows.shape[1]})


def _ablation(
    sae: Any, model: Any, tokenizer: Any, texts: Sequence[Text], loss: Loss | None
) -> Float[Tensor, " d_sae"]:
    """−Σ_t a_t ∂L/∂a_t per token of a window, mean over windows."""
    rows, encode = sae.W_dec.detach().float(), encode_in_parts(sae)
    sums = WindowSums(len(rows), rows.device)
    for batch, hidden, gradient in loss_gradients(sae, model, tokenizer, texts, loss):
        counted = batch.counted.to(hidden.device)
        owner, gradient = counted.nonzero()[:, 0], gradient[counted]
        for where, feature_acts in encode(hidden[counted]):
            sums.add_(-feature_acts * (gradient[where] @ rows.T), owner[where])
        sums.close_()
    return sums.activity().mean


def loss_gradients(
    sae: Any, model: Any, tokenizer: Any, texts: Iterable[Text], loss: Loss | None = None
) -> Iterator[tuple[TokenBatch, Float[Tensor, "batch seq d_in"], Float[Tensor, "batch seq d_in"]]]:
    """Batches, what the SAE reads there, and the gradient of the loss at it; float32, on the SAE's device."""
    hook, device = hooks.resolve(model, sae), sae.W_dec.device
    for batch in token_batches(windows_of(sae, model, tokenizer, texts), tokenizer, batch_tokens=1024):
        batch = batch.to(model.device)
        if not batch.counted[:, :-1].any():
            continue
        leaves: list[Tensor] = []

        def leaf(value: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad(), hooks.replacing(model, hook, leaf):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            [gradient] = torch.autograd.grad((loss or next_token_nll)(logits, batch), leaves)
        yield batch, leaves[0].detach().float().to(device), gradient.float().to(device)


def next_token_nll(logits: Float[Tensor, "batch seq vocab"], batch: TokenBatch) -> Float[Tensor, ""]:
    """Negative log-likelihood of each token after a counted one, summed."""
    targets = batch.counted[:, :-1] & batch.attention_mask[:, 1:].bool()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][targets].float(), batch.input_ids[:, 1:][targets], reduction="sum"
    )
