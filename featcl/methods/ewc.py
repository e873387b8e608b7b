"""Elastic weight consolidation: stay where the Fisher information of earlier tasks says that it matters.

    F_t = E_x Σ_tokens E_{y ~ p(y | x, θ*_t)} (∂ log p(y | x, θ) / ∂θ)²  per target token, at θ*_t
    per task    penalty = ½ Σ_t Σ_i F_ti (θ_i - θ*_ti)²
    online      penalty = ½ Σ_i F_i (θ_i - θ*_i)²,   F ← decay · F + F_t,   θ* the latest

To second order ½ F (θ - θ*)² is the divergence KL(p_θ* ‖ p_θ) per token of the old task (its diagonal part), so the
strength weighs nats per old token against nats per new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featcl.methods.checks import choice, count, positive, share, spread
from featcl.methods.method import Cost, View
from featcl.methods.quadratic import Quadratic, Well, copies, nbytes
from featcl.methods.sensitivity import measure
from featcl.objectives.experience import Experience
from featcl.objectives.scoring import Scorer, TokenBatch, row_chunks
from featcl.objectives.sft import nll_sum


class EWC(Quadratic):
    """A quadratic penalty for each earlier task, weighted by the diagonal of its Fisher information.

    Args:
        strength: λ.
        variant: `per_task` keeps one penalty, two copies of the trained tensors, per task; `online` keeps one in all.
        decay: γ of `online`: what remains of the old Fisher at each task's end.
        labels: `sampled`, drawn from the model at θ*: the Fisher information; `data`, the task's own: the empirical
            Fisher, which vanishes where the data are fitted perfectly.
        experiences: Measure on at most so many of a task's experiences, evenly spread; None: all.

    Raises:
        FeatclError: If an argument is out of range.

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3; online: Schwarz et al. 2018, arXiv:1805.06370, eqs. 8, 9;
    on the two kinds of labels: Kunstner et al. 2019, arXiv:1905.12558.
    """

    name = "ewc"

    def __init__(
        self,
        *,
        strength: float = 100.0,
        variant: str = "per_task",
        decay: float = 1.0,
        labels: str = "sampled",
        experiences: int | None = None,
    ) -> None:
        positive(self.name, strength=strength)
        share(self.name, decay=decay)
        choice(self.name, ("per_task", "online"), variant=variant)
        choice(self.name, ("sampled", "data"), labels=labels)
        count(self.name, experiences=experiences)
        self.variant, self.decay, self.labels, self.experiences = variant, decay, labels, experiences
        super().__init__(strength=strength, factor=0.5)
        self._tokens = 0

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """Measure the Fisher information at the coordinates that the task ends with."""
        self.wells.check(view.student.adapter)
        scorer, generator = view.student.scorer, view.generator("ewc")

        def score(hidden: Tensor, row: TokenBatch) -> Tensor:
            targets = row.targets if self.labels == "data" else drawn(hidden.detach(), scorer, generator)
            return nll_sum(hidden, targets, scorer.head, width=scorer.logit_width)

        chosen = spread(experiences, self.experiences)
        found = measure(chosen, view, score, of=torch.square, method=self.name)
        self._tokens += found.tokens
        self.wells.set_(self._with(found.importance, view), changes=view.student.adapter.changes)

    def _with(self, fisher: dict[str, Tensor], view: View) -> list[Well]:
        centre = copies(view.parameters)
        earlier = [self.wells[number] for number in range(len(self.wells))]
        if self.variant == "per_task" or not earlier:
            return [*earlier, Well(centre, fisher)]
        old = earlier[0].importance
        return [Well(centre, {name: self.decay * old[name].to(new) + new for name, new in fisher.items()})]

    def cost(self) -> Cost:
        """Fisher information and coordinates, of every task or of one; a forward and backward pass per task."""
        return Cost(nbytes(self.tensors()), self._tokens, self._tokens)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"tokens": self._tokens, **super().state()}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._tokens = int(state["tokens"])
        super().load_state_(state)


@torch.no_grad()
def drawn(hidden: Tensor, scorer: Scorer, generator: torch.Generator) -> Tensor:
    """One token per position, from the model's own distribution there."""
    parts = []
    for (rows,) in row_chunks(hidden, width=scorer.logit_width, limit=1 << 24):
        chances = scorer.head(rows).float().softmax(-1).cpu()  # the generator is the CPU's
        parts.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
    return torch.cat(parts).to(hidden.device)
