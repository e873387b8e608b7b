"""On-policy distillation: the student samples, a teacher scores those tokens, the divergence is the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.objectives.divergence import check_divergence
from featcl.objectives.experience import Experience, Student, divergence_sum
from featcl.objectives.prompts import Prompt, privileged_context, reply_prompts
from featcl.objectives.scoring import Scorer, TokenBatch, pack_group, sum_in_chunks
from featcl.streams.chat import Encoded
from featcl.streams.rollouts import generate

MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class TaughtBatch(TokenBatch):
    """The student's sequences, with the teacher's view of the same replies: as many targets, in the same order."""

    teacher: TokenBatch


@dataclass(frozen=True)
class Distillation:
    """Divergence to a teacher on the student's own samples.

    Attributes:
        context: Give the teacher privileged context; the teacher is then the student's own weights
            (self-distillation), unless the learner has another teacher.
        alpha: 1 reverse KL(student ‖ teacher), 0 forward, between: generalised Jensen-Shannon divergence.
        estimator: `full` vocabulary; `sampled`: the drawn token only, as a policy-gradient advantage, discount 0.
        top_k: Teacher's k most likely tokens and a tail bucket; None is all (estimator `full`).
        skip: First tokens of a reply that do not count, against leaking phrases such as "as in the example"; at
            least the last token of a reply counts.
        max_new_tokens: Longest reply; also at most four tokens more than the trajectory's own longest.
        max_turns: At most so many of a trajectory's assistant turns, evenly spread.
        temperature: Of the student's samples.
        on_policy: False: score the trajectory's own replies instead of samples.

    Source: Agarwal et al. 2024, arXiv:2306.13649; with context, self-distillation: Shenfeld et al. 2026.
    """

    context: bool = False
    alpha: float = 1.0
    estimator: Literal["full", "sampled"] = "full"
    top_k: int | None = None
    skip: int = 0
    max_new_tokens: int = 64
    max_turns: int = 8
    temperature: float = 1.0
    on_policy: bool = True

    def __post_init__(self) -> None:
        check_divergence(self.alpha, self.top_k)
        if self.estimator not in ("full", "sampled"):
            raise FeatclError(f"unknown estimator {self.estimator!r}: full or sampled")
        if self.estimator == "sampled" and (self.alpha != 1.0 or self.top_k is not None or not self.on_policy):
            raise FeatclError("estimator sampled is for on-policy reverse KL: alpha 1, top_k null, on_policy true")

    @property
    def metric(self) -> str:
        """Names the divergence."""
        return "distill/" + {1.0: "reverse_kl", 0.0: "forward_kl"}.get(self.alpha, "jsd")

    def read(self, experience: Experience, student: Student) -> Sequence[TokenBatch]:
        """Replies to the trajectory's prompts, as the student and as the teacher read them."""
        context = privileged_context(experience.trajectory) if self.context else None
        prompts = reply_prompts(
            experience.trajectory,
            student.chat,
            context=context,
            max_length=student.max_length,
            max_new_tokens=self.max_new_tokens,
            max_turns=self.max_turns,
        )
        replies = self._replies(prompts, experience, student)
        pairs = [_pair(prompt, reply, self.skip) for prompt, reply in zip(prompts, replies, strict=True)]
        return [_taught(group, student.scorer.device) for group in _groups(pairs)]

    def loss(self, hidden: Float[Tensor, "targets d_model"], batch: TokenBatch, student: Student) -> Float[Tensor, ""]:
        """Sum of the divergence over reply tokens in nats; gradients do not reach the teacher."""
        assert isinstance(batch, TaughtBatch)
        teacher = student.teacher or student.scorer
        with torch.no_grad():
            seen = teacher.hidden(batch.teacher)
        if self.estimator == "sampled":
            return _sampled_sum(hidden, seen, batch.targets, student.scorer, teacher)
        return divergence_sum(hidden, seen, student.scorer, teacher, alpha=self.alpha, top_k=self.top_k)

    def _replies(self, prompts: list[Prompt], experience: Experience, student: Student) -> list[list[int]]:
        if not self.on_policy:
            return [prompt.reply for prompt in prompts]
        limit = min(self.max_new_tokens, 4 + max(len(prompt.reply) for prompt in prompts))
        rollout = generate(
            student.scorer.causal,
            [prompt.student for prompt in prompts],
            max_new_tokens=limit,
            temperature=self.temperature,
            stop_ids=student.chat.stop_ids,
            generator=experience.generator("rollout"),
        )
        return rollout.token_ids


def sampled_reverse_kl(
    student_logprobs: Float[Tensor, " tokens"], teacher_logprobs: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """One-sample estimate of KL(student ‖ teacher) per token whose gradient is that of the divergence on average.

        value  log q − log p,        gradient  (log q − log p) ∇ log q

    The log-ratio itself, used as a loss, has zero expected gradient.

    Args:
        student_logprobs: log q of tokens drawn from the student.
        teacher_logprobs: log p of the same tokens; treated as constant.
    """
    ratio = student_logprobs.detach() - teacher_logprobs.detach()
    return ratio + ratio * (student_logprobs - student_logprobs.detach())


def _sampled_sum(hidden: Tensor, seen: Tensor, targets: Tensor, student: Scorer, teacher: Scorer) -> Tensor:
    def total(own: Tensor, other: Tensor, drawn: Int[Tensor, " tokens"]) -> Tensor:
        with torch.no_grad():
            log_p = teacher.head(other).float().log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        log_q = student.head(own).float().log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        return sampled_reverse_kl(log_q, log_p).sum()

    return sum_in_chunks(total, hidden, seen, targets, width=student.logit_width)


def _pair(prompt: Prompt, reply: list[int], skip: int) -> tuple[Encoded, Encoded]:
    skipped = min(skip, len(reply) - 1)
    counted = [False] * skipped + [True] * (len(reply) - skipped)
    return (
        Encoded(prompt.student + reply, [False] * len(prompt.student) + counted),
        Encoded(prompt.teacher + reply, [False] * len(prompt.teacher) + counted),
    )


def _groups(pairs: list[tuple[Encoded, Encoded]]) -> list[list[tuple[Encoded, Encoded]]]:
    """Pairs in groups of at most MAX_BATCH_TOKENS padded tokens, or one pair."""
    longest = max(len(sequence) for pair in pairs for sequence in pair)
    size = max(1, MAX_BATCH_TOKENS // longest)
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _taught(group: list[tuple[Encoded, Encoded]], device: torch.device) -> TaughtBatch:
    own = pack_group([pair[0] for pair in group], device=device)
    other = pack_group([pair[1] for pair in group], device=device)
    return TaughtBatch(own.input_ids, own.positions, own.targets, other)
