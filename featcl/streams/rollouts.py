"""Sampling replies from the student: batched, with a key-value cache, from an explicit generator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featcl.errors import FeatclError


@dataclass(frozen=True)
class Rollout:
    """Sampled replies, one per prompt.

    Attributes:
        token_ids: Tokens of each reply, the stop token included where one was drawn.
        logprobs: Their log-probabilities in nats under the model itself (temperature 1), token by token.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: Collection[int] = (),
    pad_id: int = 0,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Continue every prompt until a stop token or `max_new_tokens`.

    Prompts are padded on the left and decoded together. A reply depends on its own row of draws only, not on
    when the others stop.

    Args:
        model: A causal language model, adapted or not.
        prompts: Token ids of each prompt, none empty.
        max_new_tokens: Longest reply in tokens.
        temperature: 0 is greedy.
        stop_ids: Tokens that end a reply.
        pad_id: Any id; padding is never attended to.
        generator: CPU generator of the draws; needed unless greedy.

    Returns:
        Replies with their log-probabilities.

    Raises:
        FeatclError: If a prompt is empty, or sampling is asked for without a generator.
    """
    if not prompts or not all(prompts):
        raise FeatclError("generate needs at least one prompt, and none may be empty")
    if temperature > 0 and generator is None:
        raise FeatclError("sampling at temperature > 0 needs a generator; greedy decoding is temperature 0")
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decode = _Decoder(causal, prompts, pad_id)
    draws = torch.rand(len(prompts), max_new_tokens, generator=generator) if temperature > 0 else None
    stops = torch.tensor(sorted(stop_ids) or [-1], device=decode.device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=decode.device)
    drawn, scored, kept = [], [], []
    for step in range(max_new_tokens):
        logits = decode.logits().float()
        token = choose(logits, temperature, draws[:, step].to(logits.device) if draws is not None else None)
        drawn.append(token)
        scored.append(logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1))
        kept.append(running)
        running = running & ~torch.isin(token, stops)
        if step + 1 == max_new_tokens or not running.any():
            break
        decode.append_(token)
    return _collect(drawn, scored, kept)


def choose(
    logits: Float[Tensor, "batch vocab"], temperature: float, draws: Float[Tensor, " batch"] | None
) -> Int[Tensor, " batch"]:
    """One token per row: the most likely, or by inverting the cumulative distribution at `draws` in [0, 1)."""
    if draws is None:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    points = draws.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class _Decoder:
    """The model's state between tokens: cache, attention mask and positions of left-padded rows."""

    def __init__(self, causal: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        from transformers import DynamicCache

        self.causal = causal
        self.device = next(causal.parameters()).device
        self.cache = DynamicCache(config=causal.config)
        longest = max(len(prompt) for prompt in prompts)
        rows = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.ids = torch.tensor(rows, device=self.device)
        self.mask = (torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()
        self.padded = bool((lengths != longest).any())
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def logits(self) -> Float[Tensor, "batch vocab"]:
        output = self.causal(
            input_ids=self.ids,
            attention_mask=self.mask if self.padded else None,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def append_(self, token: Int[Tensor, " batch"]) -> None:
        self.ids = token[:, None]
        self.positions = self.positions[:, -1:] + 1
        if self.padded:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=-1)


def _collect(drawn: list[Tensor], scored: list[Tensor], kept: list[Tensor]) -> Rollout:
    lengths = torch.stack(kept, dim=-1).sum(-1).tolist()
    tokens, scores = torch.stack(drawn, dim=-1).tolist(), torch.stack(scored, dim=-1).tolist()
    return Rollout(
        [row[:length] for row, length in zip(tokens, lengths, strict=True)],
        [row[:length] for row, length in zip(scores, lengths, strict=True)],
    )
