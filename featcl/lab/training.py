"""Training of the laboratory's models from the generated corpus: the base model and the teacher of one family.

Seeded and complete: the scripts in `scripts/lab` and `featcl lab train` call nothing else.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from featcl.lab.corpus import Conversation

if TYPE_CHECKING:
    from featcl.streams.chat import Chat, Encoded

FAMILIES = ("olmo2", "gemma2")
GAIN_SIGMA = 0.5
CONTEXT_WEIGHT = 0.05  # what a token outside the assistant's replies counts
SHAPE: dict[str, Any] = {
    "hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """AdamW with warm-up and linear decay to zero.

    Attributes:
        steps: Optimizer steps.
        lr: Peak learning rate.
        batch_tokens: Tokens a step, padding included.
        weight_decay: Decoupled, on matrices only: norm gains keep their spread.
        horizon: Step at which the rate would reach zero; None is the last.
    """

    steps: int
    lr: float = 2e-3
    batch_tokens: int = 3072
    weight_decay: float = 0.05
    horizon: int | None = None

    def factor(self, step: int) -> float:
        """Share of the peak rate."""
        end = self.horizon or self.steps
        warmup = max(1, end // 20)
        return min((step + 1) / warmup, max(0.0, (end - step) / (end - warmup)))


def new_model(family: str, chat: Chat, *, seed: int) -> torch.nn.Module:
    """A random model of the family with log-normal norm gains (σ = `GAIN_SIGMA`)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(seed)
    tokenizer = chat.tokenizer
    common = dict(SHAPE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
                  eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)  # fmt: skip
    if family == "olmo2":
        model = Olmo2ForCausalLM(Olmo2Config(**common, tie_word_embeddings=False))
    else:
        width = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
        model = Gemma2ForCausalLM(Gemma2Config(
            **common, head_dim=width, query_pre_attn_scalar=width, sliding_window=256,
            hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True,
        ))  # fmt: skip
    spread_gains_(model, offset=1.0 if family == "gemma2" else 0.0, seed=seed)
    return model


def spread_gains_(model: torch.nn.Module, *, offset: float, seed: int) -> None:
    """Make the gains of the norms on the residual stream log-normal; `offset` is what the class adds itself."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "layernorm" in name:
            gain = torch.exp(GAIN_SIGMA * torch.randn(parameter.shape, generator=generator))
            parameter.data.copy_(gain - offset)


def gain_spread(model: torch.nn.Module, *, offset: float) -> float:
    """Smallest std/mean of a norm gain on the residual stream."""
    gains = [p + offset for name, p in model.named_parameters() if p.ndim == 1 and "layernorm" in name]
    return min((gain.std() / gain.mean()).item() for gain in gains)


def batches(chat: Chat, source: Iterable[Conversation], *, tokens: int, seed: int,
            context_weight: float = CONTEXT_WEIGHT) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Right-padded ids and target weights [batch, seq], conversations of similar length together.

    There are few shapes (lengths are multiples of 16), since matrix kernels are prepared once per shape.
    """
    rng = random.Random(seed)
    source, pad = iter(source), chat.tokenizer.pad_token_id
    waiting: dict[int, list[Encoded]] = {}
    while chunk := [chat.encode(conversation) for conversation in islice(source, 1024)]:
        ready = []
        for encoded in chunk:
            length = 16 * -(-len(encoded) // 16)
            group = waiting.setdefault(length, [])
            group.append(encoded)
            if len(group) == max(1, tokens // length):
                ready.append(_padded(waiting.pop(length), length, pad, context_weight))
        rng.shuffle(ready)
        yield from ready


def _padded(group: list[Encoded], length: int, pad: int, context_weight: float) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(group), length), pad)
    weights = torch.zeros(len(group), length)
    for row, encoded in enumerate(group):
        ids[row, : len(encoded)] = torch.tensor(encoded.input_ids)
        weights[row, : len(encoded)] = torch.tensor(
            [1.0 if learned else context_weight for learned in encoded.loss_mask]
        )
    return ids, weights


def train_(model: Any, data: Iterator[tuple[Tensor, Tensor]], schedule: Schedule,
           *, parameters: Sequence[Tensor] | None = None,
           report: Callable[[int, float, float], None] | None = None) -> None:  # fmt: skip
    """Train `model` in place on weighted next-token loss.

    Args:
        model: A Hugging Face causal LM.
        data: Ids and target weights, as from `batches`.
        schedule: Steps and learning rate.
        parameters: What is trained, such as an adapter's; all of the model's by default.
        report: Called with step, loss and seconds every 100 steps.
    """
    trained = list(model.parameters() if parameters is None else parameters)
    matrices = [p for p in trained if p.ndim > 1]
    gains = [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.98), fused=True)
    model.train()
    for parameter in trained:
        parameter.requires_grad_(True)
    start = time.perf_counter()
    for step, (ids, weights) in enumerate(islice(data, schedule.steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * schedule.factor(step)
        loss = weighted_loss(model(input_ids=ids, use_cache=False).logits, ids, weights)
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if report and step % 100 == 0:
            report(step, loss.item(), time.perf_counter() - start)
    model.eval().requires_grad_(False)


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Next-token cross-entropy, each target counted by its weight.

    The last position, which has no target, counts zero: cutting it off would copy all logits, and again backwards.
    """
    targets, counts = ids.roll(-1, dims=1).flatten(), weights.roll(-1, dims=1)
    counts[:, -1] = 0.0
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    return (losses * counts.flatten()).sum() / counts.sum()
