"""Brakes on forgetting that are losses: stay close to the base model, in behaviour or in weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.objectives.divergence import check_divergence
from featcl.objectives.experience import Experience, Student, base_hidden, divergence_sum
from featcl.objectives.scoring import TokenBatch, pack
from featcl.streams.windows import cut_windows


@dataclass(frozen=True)
class KlToBase:
    """Divergence to the base model (the adapter switched off) on the trajectory's own targets.

    Attributes:
        alpha: 1 reverse KL(student ‖ base), 0 forward, between: generalised Jensen-Shannon divergence.
    """

    alpha: float = 1.0
    metric: str = "anchor/kl_to_base"

    def __post_init__(self) -> None:
        check_divergence(self.alpha, None)

    def read(self, experience: Experience, student: Student) -> Sequence[TokenBatch]:
        """The experience's own windows."""
        return experience.batches

    def loss(self, hidden: Float[Tensor, "targets d_model"], batch: TokenBatch, student: Student) -> Float[Tensor, ""]:
        """Sum of the divergence over targets in nats."""
        base = base_hidden(student, batch)
        return divergence_sum(hidden, base, student.scorer, student.scorer, alpha=self.alpha)


@dataclass(frozen=True)
class Recover:
    """Divergence to the base model (the adapter switched off) on background text: a free brake on forgetting.

    Attributes:
        background: Texts of what the model should keep; every token counts.
        texts: How many of them an update draws.
        alpha: As in `KlToBase`.
    """

    background: tuple[str, ...] = field(default=(), repr=False)
    texts: int = 4
    alpha: float = 1.0
    metric: str = "recover/kl_to_base"

    def __post_init__(self) -> None:
        check_divergence(self.alpha, None)
        if not self.background:
            raise FeatclError("objective recover needs background texts: the learner's `background`")

    def read(self, experience: Experience, student: Student) -> Sequence[TokenBatch]:
        """Background texts drawn for this experience, each cut at the longest sequence."""
        order = torch.randperm(len(self.background), generator=experience.generator("recover"))[: self.texts]
        encoded = [student.chat.encode_text(self.background[int(index)]) for index in order]
        windows = [cut_windows(text, max_length=student.max_length).windows[0] for text in encoded]
        return pack(windows, device=student.scorer.device)

    loss = KlToBase.loss  # type: ignore[assignment]


@dataclass(frozen=True)
class L2ToBase:
    """‖ΔW‖², summed over adapted weights, ΔW = scaling · B A of each LoRA (so it is the same for every basis)."""

    metric: str = "anchor/l2_to_base"

    def penalty(self, student: Student) -> Float[Tensor, ""]:
        """Squared distance from the base weights."""
        return student.adapter.distance_squared()
