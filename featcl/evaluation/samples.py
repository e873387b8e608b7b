"""What the model says now, and at which tokens it says it differently from the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.evaluation.forward import target_batches
from featcl.evaluation.scoring import Reply
from featcl.html import card, coloured, note
from featcl.streams import Chat, Trajectory
from featcl.streams.rollouts import generate

COLUMNS = ("after", "prompt", "completion", "mean_kl", "tokens", "kl")
"""Of the table `samples`; `tokens` and `kl` are lists of one length."""
TEXT_PROMPT = 32  # tokens of a plain text that the model goes on from


@dataclass(frozen=True)
class Sample:
    """A reply drawn from the model as it is now.

    Attributes:
        prompt: What it was asked.
        completion: What it said.
        tokens: Its tokens as text, the one that ends the turn included.
        kl: KL(now || base) of the prediction of each, in nats.
    """

    prompt: str
    completion: str
    tokens: tuple[str, ...]
    kl: tuple[float, ...]

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return sum(self.kl) / len(self.kl)

    def _repr_html_(self) -> str:
        about = f"KL(now ‖ base) of each prediction: mean {self.mean_kl:.3g}, at most {max(self.kl):.3g} nats"
        return card("Reply", note(self.prompt), coloured(self.tokens, self.kl), note(about))

    def row(self, after: str) -> list[Any]:
        """A row of the table `samples`: what was sampled after training on `after`."""
        return [after, self.prompt, self.completion, self.mean_kl, list(self.tokens), list(self.kl)]


def sample_prompts(chat: Chat, trajectories: Sequence[Trajectory], count: int) -> list[list[int]]:
    """Token ids up to the last reply of the first trajectories that have one; of plain text, how it starts."""
    prompts: list[list[int]] = []
    for trajectory in trajectories:
        if len(prompts) == count:
            break
        if trajectory.text is not None:
            prompts.append(list(chat.encode_text(trajectory.text).input_ids[:TEXT_PROMPT]))
            continue
        replies = [place for place, message in enumerate(trajectory.messages) if message["role"] == "assistant"]
        if replies and replies[-1] > 0:
            prompts.append(chat.prompt(trajectory.messages[: replies[-1]], tools=trajectory.tools))
    return prompts


def sample_completions(
    adapter: Any,
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    *,
    generator: torch.Generator,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
) -> tuple[Sample, ...]:
    """Draw one reply to each prompt, and compare each token's prediction with the base model's.

    Args:
        adapter: A `ConstrainedAdapter` on the model; switched off, it is the base model.
        chat: The chat form of its tokenizer.
        prompts: Token ids, none empty.
        generator: CPU generator of the draws.
        max_new_tokens: Most tokens of a reply.
        temperature: 0 for the most likely reply; the KL is always that of the model's own predictions.

    Returns:
        One sample per prompt; none for no prompts.
    """
    if not prompts:
        return ()
    tokenizer = chat.tokenizer
    rollout = generate(
        adapter.model,
        [list(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=chat.stop_ids,
        pad_id=tokenizer.pad_token_id or 0,
        generator=generator,
    )
    said = [list(ids) for ids in rollout.token_ids]
    sequences = [
        Reply((*p, *ids), (False,) * len(p) + (True,) * len(ids)) for p, ids in zip(prompts, said, strict=True)
    ]
    return tuple(
        Sample(
            prompt=tokenizer.decode(list(prompt), skip_special_tokens=True),
            completion=chat.decode_reply(ids),
            tokens=tuple(tokenizer.decode([id]) for id in ids),
            kl=tuple(kl.tolist()),
        )
        for prompt, ids, kl in zip(prompts, said, _kl_to_base(adapter, sequences), strict=True)
    )


def _kl_to_base(adapter: Any, sequences: Sequence[Reply]) -> list[Float[Tensor, " targets"]]:
    """KL(now || base) = sum_v p_v (log p_v − log b_v) at every target of every sequence, in nats."""
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    base = target_batches(adapter.model, sequences)
    for now in target_batches(adapter.model, sequences):
        with adapter.disabled():
            reference = next(base).logits.float().log_softmax(-1)
        own = now.logits.float().log_softmax(-1)
        kl = (own.exp() * (own - reference)).sum(-1).clamp(min=0).cpu()
        for owner in now.owner.unique().tolist():
            found[owner] = kl[now.owner == owner]
    return found
