"""The trust region: an update may move the model's predictions only so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.objectives.experience import divergence_sum
from featcl.objectives.scoring import Scorer, TokenBatch

BISECTIONS = 12
CLOSE = 0.8  # a scale is good enough when it uses this share of what is allowed


@dataclass(frozen=True, eq=False)
class Reference:
    """What the model predicted before an update: last hidden states, since the output head does not change."""

    batches: Sequence[TokenBatch]
    hidden: Sequence[Float[Tensor, "targets d_model"]]

    @torch.no_grad()
    def kl(self, scorer: Scorer) -> float:
        """KL(before ‖ now) in nats per token."""
        total, tokens = 0.0, 0
        for batch, before in zip(self.batches, self.hidden, strict=True):
            total += float(divergence_sum(scorer.hidden(batch), before, scorer, scorer, alpha=0.0))
            tokens += batch.tokens
        return total / tokens if tokens else 0.0


@dataclass(frozen=True)
class Step:
    """An update as it was accepted: the share of it, and its KL(before ‖ after) in nats per token."""

    scale: float
    kl: float


def limit_step_(adapter: Any, before: dict[str, Tensor], measure: Callable[[], float], *, max_kl: float | None) -> Step:
    """Scale the step from `before` to the adapter's coordinates until its KL is at most `max_kl`.

    The KL grows with about the square of the scale, which gives the first guess; then bisection.

    Args:
        adapter: The adapter after the step; its coordinates are changed.
        before: Its coordinates before the step.
        measure: KL(before ‖ now) in nats per token.
        max_kl: None: only measure.

    Returns:
        Scale 0 if even the smallest step tried is too far.
    """
    kl = measure()
    if max_kl is None or kl <= max_kl or not math.isfinite(kl):
        return Step(1.0, kl)
    after = {name: tensor.detach().clone() for name, tensor in adapter.coordinates().items()}
    best, low, high = Step(0.0, 0.0), 0.0, 1.0
    scale = 0.95 * math.sqrt(max_kl / kl)
    for _ in range(BISECTIONS):
        adapter.load_coordinates_({name: torch.lerp(before[name], after[name], scale) for name in after})
        kl = measure()
        if kl <= max_kl:
            best, low = Step(scale, kl), scale
            if kl >= CLOSE * max_kl:
                return best
        else:
            high = scale
        scale = (low + high) / 2
    adapter.load_coordinates_({name: torch.lerp(before[name], after[name], best.scale) for name in after})
    return best
