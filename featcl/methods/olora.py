"""O-LoRA: a fresh LoRA per task, whose inputs' side is pulled away from those of all earlier tasks.

    ΔW = Σ_t B_t A_t,     penalty of task t = Σ_{i < t} ‖A_i A_tᵀ‖²

so that the span of A_t's rows, to which the update of task t reacts, is orthogonal to those before. Earlier pairs are
frozen. A is the factor `lora_A` where it is trained: that of kind `none`, and C of a writer, whose frozen lora_B is the
features' span anyway. A reader's lora_A is the features themselves, the same for every task, and is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.checks import positive
from featcl.methods.fresh_lora import freeze_and_restart_, lora_sites
from featcl.methods.method import Cost, Method, View
from featcl.methods.quadratic import nbytes
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student


class OLoRA(Method):
    """Soft orthogonality between the tasks' LoRA.

    Args:
        strength: λ₁.

    Raises:
        FeatclError: If an argument is out of range; at the first task, if no lora_A is trained.

    Source: Wang et al. 2023, arXiv:2310.14152, eqs. 7 and 8 (the authors' code sums absolute values, not squares).
    """

    name = "olora"
    moves_adapter = True

    def __init__(self, *, strength: float = 0.5) -> None:
        positive(self.name, strength=strength)
        self.past = PastRows()
        self._term = Term(self.name, strength, self.past)
        self._frozen_bytes = 0

    def terms(self) -> Sequence[Term]:
        """The penalty."""
        return (self._term,)

    def refuse(self, view: View) -> None:
        """A kind that trains no lora_A."""
        adapter = view.student.adapter
        if not any("lora_A" in site.trained for site in lora_sites(adapter, self.name)):
            raise FeatclError(
                f"olora: kind {adapter.kind!r} trains no lora_A, the same features are read in every task; use none, "
                "write or both"
            )

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """From the second task on, freeze the LoRA of the task before and start a new one."""
        self.refuse(view)
        adapter = view.student.adapter
        if self.past.rows:
            self._frozen_bytes = freeze_and_restart_(adapter, view.generator(f"olora/{task}"), self.name)

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """The rows that the next tasks should keep clear of."""
        self.past.add_({name: p for name, p in view.parameters.items() if name.endswith(".lora_A")})

    def cost(self) -> Cost:
        """Earlier rows, and the frozen LoRA; both grow by one rank per task."""
        return Cost(stored_bytes=nbytes(self.past.rows) + self._frozen_bytes)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"frozen_bytes": self._frozen_bytes}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._frozen_bytes = int(state["frozen_bytes"])

    def tensors(self) -> dict[str, Tensor]:
        """Earlier rows, by the name of the trained factor."""
        return dict(self.past.rows)

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self.past.rows = dict(tensors)


class PastRows:
    """Σ ‖A_i Aᵀ‖² over sites and earlier tasks, a `Penalty`.

    Attributes:
        rows: The rows of all A_i, one below the other, by the name of the trained factor.
    """

    metric = "olora/overlap"

    def __init__(self) -> None:
        self.rows: dict[str, Float[Tensor, "n width"]] = {}

    def add_(self, factors: Mapping[str, Tensor]) -> None:
        """One more task's."""
        for name, factor in factors.items():
            now = factor.detach().clone()
            self.rows[name] = torch.cat([self.rows[name].to(now), now]) if name in self.rows else now

    def penalty(self, student: Student) -> Float[Tensor, ""]:
        """The value, with its gradient."""
        parameters = student.adapter.named_parameters()
        first = next(iter(parameters.values()))
        total = 0.0 * first.float().sum()  # so that there is a gradient in the first task
        for name, rows in self.rows.items():
            overlap = (rows.to(parameters[name]) @ parameters[name].T).square().sum()
            total = total + overlap.to(total.device)
        return total
