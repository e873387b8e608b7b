"""Memory aware synapses: stay where the outputs are sensitive, whatever the labels.

    Ω += Σ_s |∂ Σ_t ‖F_t(x_s)‖² / ∂θ| / (number of targets),    penalty = Σ_i Ω_i (θ_i - θ*_i)²

F_t(x_s): the logits at the t-th target of sequence s, all together the outputs of one data point. The absolute value is
taken sequence by sequence, since gradients of several would cancel. θ* is where the last task ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featcl.methods.checks import count, positive, spread
from featcl.methods.method import Cost, View
from featcl.methods.quadratic import Quadratic, Well, copies, nbytes
from featcl.methods.sensitivity import measure
from featcl.objectives.experience import Experience
from featcl.objectives.scoring import TokenBatch, sum_in_chunks


class MAS(Quadratic):
    """A quadratic penalty, weighted by the sensitivity of the squared norm of the logits.

    Args:
        strength: λ.
        experiences: Measure on at most so many of a task's experiences, evenly spread; None: all.

    Raises:
        FeatclError: If an argument is out of range.

    Source: Aljundi et al. 2018, arXiv:1711.09601, eqs. 2 to 4 and section 4.2 (the squared l2 norm).
    """

    name = "mas"

    def __init__(self, *, strength: float = 1.0, experiences: int | None = None) -> None:
        positive(self.name, strength=strength)
        count(self.name, experiences=experiences)
        self.experiences = experiences
        super().__init__(strength=strength)
        self._tokens = 0

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """Add the sensitivities of this task's sequences."""
        adapter, scorer = view.student.adapter, view.student.scorer
        self.wells.check(adapter)

        def score(hidden: Tensor, row: TokenBatch) -> Tensor:
            return sum_in_chunks(
                lambda rows: scorer.head(rows).float().square().sum(), hidden, width=scorer.logit_width
            )

        found = measure(spread(experiences, self.experiences), view, score, of=torch.abs, method=self.name)
        importance = found.importance
        if len(self.wells):
            old = self.wells[0].importance
            importance = {name: old[name].to(new) + new for name, new in importance.items()}
        self.wells.set_([Well(copies(view.parameters), importance)], changes=adapter.changes)
        self._tokens += found.tokens

    def cost(self) -> Cost:
        """Two copies of the trained tensors; a forward and backward pass per task."""
        return Cost(nbytes(self.tensors()), self._tokens, self._tokens)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"tokens": self._tokens, **super().state()}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._tokens = int(state["tokens"])
        super().load_state_(state)
