"""Progressive growth: when a task begins, the LoRA of the tasks before is frozen and a new one starts beside it.

    ΔW = Σ_{i < t} B_i A_i (frozen) + B_t A_t (trained from ΔW_t = 0)

All of them act together, so nothing has to choose; the frozen part is kept as one LoRA of the smallest rank that holds
the sum: it grows by at most the adapter's rank with every task. Where one factor is the features' span (kinds `write`,
`read`, `both`) the sum stays in that span, so its rank never exceeds k, and growth ends there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featcl.methods.fresh_lora import freeze_and_restart_, lora_sites
from featcl.methods.method import Cost, Method, View
from featcl.objectives.experience import Experience


class Progressive(Method):
    """A fresh LoRA per task on top of those before; on kind `none` its memory grows with every task.

    Raises:
        FeatclError: With a learner whose adapter is no LoRA.

    Source: progressive networks (Rusu et al. 2016, arXiv:1606.04671), with ΔW that add in place of lateral connections;
    for prompts Razdaibiedina et al. 2023, arXiv:2301.12314.
    """

    name = "progressive"
    moves_adapter = True

    def __init__(self) -> None:
        self._begun = self._frozen_bytes = 0

    def refuse(self, view: View) -> None:
        """A kind that is no LoRA."""
        lora_sites(view.student.adapter, self.name)

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """From the second task on, freeze what there is and start anew."""
        if self._begun:
            generator = view.generator(f"progressive/{self._begun}")
            self._frozen_bytes = freeze_and_restart_(view.student.adapter, generator, self.name)
        self._begun += 1

    def cost(self) -> Cost:
        """The frozen LoRA."""
        return Cost(stored_bytes=self._frozen_bytes)

    def state(self) -> dict[str, Any]:
        """Plain numbers; the frozen LoRA itself is among the adapter's coordinates."""
        return {"begun": self._begun, "frozen_bytes": self._frozen_bytes}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._begun, self._frozen_bytes = int(state["begun"]), int(state["frozen_bytes"])
