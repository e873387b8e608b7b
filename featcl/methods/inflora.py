"""InfLoRA-like: each task's LoRA reads only directions in which the new task has inputs and the earlier ones have none.

With M the basis of earlier tasks' inputs (as GPM's) and H the inputs of the task to come, before task t:

    A_t = the largest right singular vectors of H (I - M Mᵀ), as rows;    B_t = 0;    only B_t is trained

so that ΔW_t = B_t A_t gives 0 for every input in span(M): no interference, by construction. Earlier pairs are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.checks import count, share
from featcl.methods.fresh_lora import freeze_and_restart_, need_kind_none
from featcl.methods.gpm import grown
from featcl.methods.method import Cost, View
from featcl.methods.partly_frozen import PartlyFrozen
from featcl.methods.quadratic import nbytes
from featcl.methods.site_inputs import inputs_of
from featcl.objectives.experience import Experience


class InfLoRA(PartlyFrozen):
    """A designed, frozen lora_A per task; lora_B is trained. On kind `none`, with tasks known in advance.

    Args:
        threshold: Share of earlier inputs' energy that must lie in M (the paper raises it from task to task).
        tokens: At most so many tokens of a task are looked at.

    Raises:
        FeatclError: If an argument is out of range; at a task's beginning, if its experiences are not known or the kind
            is another; if no direction is left that the new task has and the earlier ones have not.

    Source: Liang & Li 2024, arXiv:2404.00228, section 3.3 and algorithm 1; the rows' length 1/√3 is as in the authors'
    code, and as in a random lora_A. M is kept as it is (the paper's DualGPM keeps the complement where it is smaller).
    """

    name = "inflora"
    moves_adapter = True

    def __init__(self, *, threshold: float = 0.97, tokens: int = 2048) -> None:
        share(self.name, threshold=threshold)
        count(self.name, tokens=tokens)
        super().__init__()
        self.threshold, self.tokens = threshold, tokens
        self.known: dict[str, Tensor] = {}  # M by the name of the trained lora_A
        self._read = self._frozen_bytes = 0

    def refuse(self, view: View) -> None:
        """Another kind."""
        need_kind_none(view.student.adapter, self.name, "designs lora_A and trains lora_B")

    @torch.no_grad()
    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Freeze the LoRA of the task before, and design the next.

        Args:
            task: Its name.
            view: The learner.
            upcoming: The task's experiences, tokenised.
        """
        self.refuse(view)
        adapter = view.student.adapter
        if not upcoming:
            raise FeatclError(
                "inflora: it designs lora_A from the task's experiences; they must be known when it begins"
            )
        if self.known:
            self._frozen_bytes = freeze_and_restart_(adapter, view.generator(f"inflora/{task}"), self.name)
        found = self._inputs(upcoming, view, f"inflora/{task}/upcoming")
        for name, rows in found.items():
            parameter = view.parameters[name]
            parameter.copy_(self._design(name, rows, rank=len(parameter)))
        for name, parameter in view.parameters.items():
            if name.endswith(".lora_B"):
                parameter.zero_()
        self.freeze_(found)

    def _design(self, name: str, rows: Tensor, *, rank: int) -> Float[Tensor, "rank width"]:
        designed = new_directions(rows, self.known.get(name), rank=rank)
        if not bool(designed.any()):
            raise FeatclError(f"inflora: {name} has no input here that earlier tasks did not have; lower threshold")
        return designed / math.sqrt(3.0)

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """Add this task's inputs to what later tasks must not react to."""
        found = self._inputs(experiences, view, f"inflora/{task}/end")
        self.known = {name: grown(self.known.get(name), rows, threshold=self.threshold) for name, rows in found.items()}

    def _inputs(self, experiences: Sequence[Experience], view: View, purpose: str) -> dict[str, Tensor]:
        found, read = inputs_of(
            experiences, view.student, limit=self.tokens, generator=view.generator(purpose), method=self.name
        )
        self._read += read
        return {name: rows for name, rows in found.items() if name.endswith(".lora_A")}

    def cost(self) -> Cost:
        """Bases, and the frozen LoRA, which grows by one rank per task; two forward passes over each task."""
        return Cost(nbytes(self.known) + self._frozen_bytes, self._read)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**super().state(), "read": self._read, "frozen_bytes": self._frozen_bytes}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        super().load_state_(state)
        self._read, self._frozen_bytes = int(state["read"]), int(state["frozen_bytes"])

    def tensors(self) -> dict[str, Tensor]:
        """M by the name of the trained lora_A."""
        return dict(self.known)

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self.known = dict(tensors)


def new_directions(
    rows: Float[Tensor, "tokens width"], known: Float[Tensor, "width k"] | None, *, rank: int
) -> Float[Tensor, "rank width"]:
    """The largest right singular vectors of the rows outside span(known), as rows; 0 where they run out."""
    wide = rows.double()
    rest = wide
    for _ in range(0 if known is None else 2):  # twice is enough: Giraud et al. 2005
        rest = rest - (rest @ known.to(wide)) @ known.to(wide).T  # type: ignore[union-attr]
    _, s, vt = torch.linalg.svd(rest, full_matrices=False)
    some = vt[: min(rank, int((s > 1e-5 * wide.norm()).sum()))]
    return torch.nn.functional.pad(some, (0, 0, 0, rank - len(some))).to(rows.dtype)
