"""What one update measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from featcl.html import facts_card


@dataclass(frozen=True)
class UpdateStats:
    """One call of `Learner.observe`.

    Attributes:
        trajectory, source, task: What was learned from.
        version: Number of accepted updates, this one included.
        objective: Names of the objectives, joined by `+`.
        loss: Weighted sum of the objectives, at the first step.
        losses: Each objective's mean over tokens, under its logged name, at the first step.
        lr: Learning rate.
        grad_norm: Euclidean norm of the gradient in coordinates, at the first step.
        kl: KL(before ‖ after) in nats per token, on the tokens learned from.
        step_scale: Share of the step that the trust region let through; 1 where it did not bind.
        delta_norm: ‖ΔW‖ after the update.
        tokens: Targets learned from, over all steps.
        tokens_left_out: Tokens of the trajectory that are in no window of the model's context.
        seconds: Wall clock.
        weight: What the loss was multiplied by; 1 without a weigher.
        measures: What else was measured, under the names that are logged (`weight/…`, `projection/…`, `guard/…`).
        quarantined: Why it was not trusted, so that nothing was learned from it, or None.
        postponed: Why methods kept it, for later or outside the weights, and the weights learned nothing; or None.
        alarm: What the guard found and did, or None.
        trajectories: All that the update was made from, where several experiences made one step.
        timings: Seconds of each part by name.
    """

    trajectory: str
    source: str
    task: str
    version: int
    objective: str
    loss: float
    losses: Mapping[str, float]
    lr: float
    grad_norm: float
    kl: float
    step_scale: float
    delta_norm: float
    tokens: int
    tokens_left_out: int
    seconds: float
    weight: float = 1.0
    measures: Mapping[str, float] = field(default_factory=dict)
    quarantined: str | None = None
    postponed: str | None = None
    alarm: str | None = None
    trajectories: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def learned(self) -> bool:
        """Whether the weights learn from it; where its step waits for others, later."""
        return self.quarantined is None and self.postponed is None

    def with_measures(self, measures: Mapping[str, float]) -> UpdateStats:
        """The same with further measures."""
        return replace(self, measures={**self.measures, **measures})

    def _repr_html_(self) -> str:
        facts = {
            "learned from": f"{self.trajectory} ({self.source}, {self.task})",
            "quarantined": self.quarantined,
            "postponed": self.postponed,
            "alarm": self.alarm,
            "objective": self.objective,
            "loss": None if math.isnan(self.loss) else self.loss,
            **(self.losses if len(self.losses) > 1 else {}),
            "KL(before ‖ after), nats per token": self.kl,
            "step let through": self.step_scale,
            "‖gradient‖": self.grad_norm,
            "‖ΔW‖": self.delta_norm,
            "tokens learned from": self.tokens,
            "tokens left out": self.tokens_left_out or None,
            "weight": None if self.weight == 1.0 else self.weight,
            **self.measures,
            "seconds": self.seconds,
        }
        return facts_card(f"Update, version {self.version}", facts)

    def record(self) -> dict[str, Any]:
        """Flat, under the names that are logged; a loss that was not computed is left out."""
        return {
            "trajectory": self.trajectory,
            "source": self.source,
            "task": self.task,
            "version": self.version,
            "objective": self.objective,
            **({} if math.isnan(self.loss) else {"train/loss": self.loss}),
            **self.losses,
            "optim/lr": self.lr,
            "optim/grad_norm": self.grad_norm,
            "update/kl": self.kl,
            "update/step_scale": self.step_scale,
            "constraint/delta_norm": self.delta_norm,
            "cost/tokens": self.tokens,
            "tokens_left_out": self.tokens_left_out,
            "seconds": self.seconds,
            "weight": self.weight,
            **self.measures,
            **{f"seconds/{part}": seconds for part, seconds in self.timings.items()},
            **({"trajectories": list(self.trajectories)} if len(self.trajectories) > 1 else {}),
            **({"quarantined": self.quarantined} if self.quarantined else {}),
            **({"postponed": self.postponed} if self.postponed else {}),
            **({"alarm": self.alarm} if self.alarm else {}),
        }
