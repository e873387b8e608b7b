"""Supervised fine-tuning: the negative log-likelihood of what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import CHUNK_LOGITS, Head, TokenBatch, sum_in_chunks


def nll_sum(
    hidden: Float[Tensor, "targets d_model"],
    targets: Int[Tensor, " targets"],
    head: Head,
    *,
    width: int,
    limit: int = CHUNK_LOGITS,
) -> Float[Tensor, ""]:
    """−Σ log p(target), in nats; logits exist chunk by chunk, in float32.

    Args:
        hidden: Last hidden states where the targets are predicted.
        targets: Token ids.
        head: Hidden states to logits.
        width: Logits per token.
        limit: Logits that may exist at one time.
    """

    def total(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

    return sum_in_chunks(total, hidden, targets, width=width, limit=limit)


@dataclass(frozen=True)
class Sft:
    """NLL on the assistant's tokens, or on all tokens of a raw text."""

    metric: str = "sft/nll"

    def read(self, experience: Experience, student: Student) -> Sequence[TokenBatch]:
        """The experience's own windows."""
        return experience.batches

    def loss(self, hidden: Float[Tensor, "targets d_model"], batch: TokenBatch, student: Student) -> Float[Tensor, ""]:
        """Sum of negative log-likelihoods in nats."""
        return nll_sum(hidden, batch.targets, student.scorer.head, width=student.scorer.logit_width)
