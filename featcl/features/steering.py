"""Steering: push the residual stream along a direction, and see how the likelihood of texts changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features import hooks
from featcl.features.activations import capture
from featcl.features.tokens import Text, TokenBatch, token_batches, token_windows
from featcl.models import max_context

Score: TypeAlias = Callable[[Tensor, TokenBatch], Tensor]
"""score(logits [batch, seq, vocab], batch) -> one number per window [batch]."""


class SteeredTexts:
    """Texts as batches, with their scores and the mean norm of the stream, unsteered.

    Args:
        model: The causal LM; not changed.
        tokenizer: Its tokenizer.
        texts: Strings or token ids; the first window of each counts.
        layer: Block at whose output is pushed.
        score: Of a text; by default its mean log-likelihood per token.
        batch_tokens: Most positions in one forward.

    Raises:
        FeatclError: If a text has no token to predict.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Sequence[Text],
        *,
        layer: int,
        score: Score | None = None,
        batch_tokens: int = 2048,
    ) -> None:
        self.model, self.score = model, score or mean_log_likelihood
        self.hook = hooks.resolve(model, f"blocks.{layer}.hook_resid_post")
        context = min(512, max_context(model))
        windows = [next(token_windows(tokenizer, [text], context=context), []) for text in texts]
        if short := sum(len(window) < 2 for window in windows):
            raise FeatclError(
                f"steering: {short} of the texts have fewer than two tokens: nothing is predicted in them"
            )
        order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
        batches = token_batches([windows[i] for i in order], tokenizer, batch_tokens=batch_tokens, lookahead=len(order))
        self.batches = [batch.to(model.device) for batch in batches]
        self.order = torch.tensor(order)
        self.norm = self._mean_norm()
        self.base = self._scores(None)

    def changes(self, vectors: Float[Tensor, "k d_model"], strength: float) -> Float[Tensor, "k texts"]:
        """Score steered minus unsteered, of every text under every direction."""
        pushes = strength * self.norm * vectors.to(self.model.device)
        return torch.stack([self._scores(push) - self.base for push in pushes])

    @torch.no_grad()
    def _scores(self, push: Tensor | None) -> Float[Tensor, " texts"]:
        """Of each text, in the order given."""
        found = []
        for batch in self.batches:
            with hooks.replacing(self.model, self.hook, _push(batch, push)):
                logits = self.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                ).logits
            found.append(self.score(logits, batch).double().cpu())
        scores = torch.empty(len(self.order), dtype=torch.float64)
        scores[self.order] = torch.cat(found)
        return scores

    @torch.no_grad()
    def _mean_norm(self) -> float:
        norms = torch.cat([capture(self.model, b, hooks=[self.hook])[0].float().norm(dim=-1) for b in self.batches])
        return float(norms.double().mean())


def mean_log_likelihood(logits: Float[Tensor, "batch seq vocab"], batch: TokenBatch) -> Float[Tensor, " batch"]:
    """Mean log-likelihood of each window's tokens given those before them, float64; padding is left out."""
    targets = batch.attention_mask[:, 1:].bool()
    rows, labels = logits[:, :-1][targets], batch.input_ids[:, 1:][targets]
    nll = [  # in parts: no float32 copy of all logits
        torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
        for part, wanted in zip(rows.split(256), labels.split(256), strict=True)
    ]
    per_token = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    per_token[targets] = -torch.cat(nll).double()
    return per_token.sum(dim=1) / targets.sum(dim=1)


def _push(batch: TokenBatch, push: Tensor | None) -> Any:
    """h ← h + push on the counted tokens."""
    if push is None:
        return lambda hidden: None
    return lambda hidden: hidden + batch.counted[..., None].to(hidden.dtype) * push.to(hidden)
