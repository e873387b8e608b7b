"""CorDA, knowledge-preserved: train the part of the base weight that matters least for retained inputs.

With C = Σ a aᵀ / n over the retained texts' inputs a of a linear (damped), and the SVD of W₀ C:

    W₀ C = U S Vᵀ,   W₀ = U S (Vᵀ C⁻¹);     B₀ = U_r √S_r,  A₀ = √S_r V_rᵀ C⁻¹   of the `rank` smallest singular values
    ΔW = B A - B₀ A₀

The paper (and PEFT's `init_lora_weights="corda"`) takes B₀ A₀ out of the base weight; here the base stays what it is,
so that the adapter can be switched off exactly, and -B₀ A₀ is the adapter's frozen second LoRA. ΔW = 0 at the start up
to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.adapters.kept import attach_kept_
from featcl.errors import FeatclError
from featcl.methods.checks import count
from featcl.methods.fresh_lora import need_kind_none
from featcl.methods.method import Cost, Method, View
from featcl.methods.site_inputs import inputs_of
from featcl.objectives.experience import Experience
from featcl.streams.trajectory import Trajectory

DAMPING = 0.01  # of the mean variance, as in the authors' code
INVERSE_ERROR = 0.05  # of C C⁻¹, above which the damping is doubled


class CorDA(Method):
    """Context-oriented decomposition adaptation, on kind `none`.

    Args:
        retained: Texts of what the model should keep.
        tokens: At most so many tokens of them are looked at.

    Raises:
        FeatclError: If there are no texts; at the first task, if the kind is another.

    Source: Yang et al. 2024, arXiv:2406.05223, eqs. 1 to 4, knowledge-preserved mode.
    """

    name = "corda"
    moves_adapter = True

    def __init__(self, *, retained: Sequence[str] = (), tokens: int = 8192) -> None:
        count(self.name, tokens=tokens)
        if not retained:
            raise FeatclError("corda: no retained texts, which say what part of the weights is to be kept")
        self.retained, self.tokens = tuple(retained), tokens
        self._read = self._frozen_bytes = 0

    def refuse(self, view: View) -> None:
        """Another kind."""
        need_kind_none(view.student.adapter, self.name, "chooses both factors itself")

    @torch.no_grad()
    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Before the first task, set both factors."""
        if self._read:
            return
        self.refuse(view)
        adapter = view.student.adapter
        texts = [view.encode(Trajectory(f"retained-{i}", text=text)) for i, text in enumerate(self.retained)]
        found, self._read = inputs_of(
            texts, view.student, limit=self.tokens, generator=view.generator("corda"), method=self.name
        )
        taken = {}
        for site in adapter.sites:
            weight: Any = site.module.get_base_layer().weight
            rank = len(site.trained["lora_A"])
            a, b = least_needed(weight.detach(), found[f"{site.name}.lora_A"], rank=rank)
            root = site.scale**0.5
            site.trained["lora_A"].copy_(a / root)
            site.trained["lora_B"].copy_(b / root)
            a, b = site.moving_factors()
            taken[site.name] = (a, -b)
        attach_kept_(adapter.model, adapter.sites, taken)
        self._frozen_bytes = sum(tensor.nbytes for site in adapter.sites for tensor in site.kept.values())

    def cost(self) -> Cost:
        """The frozen LoRA; one forward pass over the retained texts."""
        return Cost(self._frozen_bytes, self._read)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"read": self._read, "frozen_bytes": self._frozen_bytes}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._read, self._frozen_bytes = int(state["read"]), int(state["frozen_bytes"])


def least_needed(
    weight: Float[Tensor, "d_out d_in"], inputs: Float[Tensor, "tokens d_in"], *, rank: int
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    """(A₀, B₀) of the head of this module, float32."""
    covariance = inputs.double().T @ inputs.double() / len(inputs)
    eye = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    damping = DAMPING
    while True:
        damped = covariance + damping * covariance.diagonal().mean() * eye
        inverse = torch.linalg.inv(damped)
        if float((damped @ inverse - eye).norm()) < INVERSE_ERROR:
            break
        damping *= 2.0
    u, s, vt = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    root = s[-rank:].sqrt()
    return (root[:, None] * (vt[-rank:] @ inverse)).float(), (u[:, -rank:] * root).float()
