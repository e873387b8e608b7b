"""OPLoRA-like: the update keeps clear of the base weight's largest singular directions, on both sides.

    W₀ = U S Vᵀ,    ΔW = (I - U_p U_pᵀ) B A (I - V_p V_pᵀ)

so that (W₀ + ΔW) v_i = σ_i u_i and u_iᵀ (W₀ + ΔW) = σ_i v_iᵀ for i ≤ p: what the base does there stays exactly. Here
A V_p = 0 and U_pᵀ B = 0 are kept for the trained matrices themselves, from the start on. Where one factor is the frozen
basis of the chosen features, the other carries both conditions, as far as the span leaves room for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featcl.adapters.lora import LoraSite
from featcl.errors import FeatclError
from featcl.methods.checks import count
from featcl.methods.fresh_lora import lora_sites
from featcl.methods.method import Cost, View
from featcl.methods.projected import Bases, Projected, orthonormal
from featcl.methods.quadratic import nbytes
from featcl.objectives.experience import Experience


class OPLoRA(Projected):
    """Blocks the largest singular directions of every adapted base weight.

    Args:
        preserved: p, how many singular directions of each weight are kept.

    Raises:
        FeatclError: If an argument is out of range.

    Source: Xiong & Xie 2025, arXiv:2510.13003 (P_L and P_R; proposition on preserved singular triples).
    """

    name = "oplora"
    moves_adapter = True

    def __init__(self, *, preserved: int = 16) -> None:
        count(self.name, preserved=preserved)
        super().__init__()
        self.preserved = preserved

    def refuse(self, view: View) -> None:
        """A kind that adapts no weights."""
        lora_sites(view.student.adapter, self.name)

    @torch.no_grad()
    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Before the first task: take the base weights apart, and project where the factors start."""
        if self.left or self.right:
            return
        left: Bases = {}
        right: Bases = {}
        for site in lora_sites(view.student.adapter, self.name):
            for side, bases in zip(_blocked(site, self.preserved), (left, right), strict=True):
                bases.update(side)
        self.block_(view, left=left, right=right)
        for name, parameter in view.parameters.items():
            parameter.copy_(self._free(name, parameter))

    def cost(self) -> Cost:
        """The singular directions."""
        return Cost(stored_bytes=nbytes(self.left, self.right))


def _blocked(site: LoraSite, preserved: int) -> tuple[Bases, Bases]:
    """(L, R) of one site by the name of its trained matrices.

    With ΔW = B A and both factors written as L X z: a trained lora_A carries the condition on the inputs, a trained
    lora_B that on the outputs; where only one is trained, it carries both, seen through the frozen other.
    """
    weight: Any = site.module.get_base_layer().weight
    if preserved > min(weight.shape):
        raise FeatclError(f"oplora: {site.name} has {min(weight.shape)} singular directions, not {preserved}")
    u, _, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    u, v = u[:, :preserved], vt[:preserved].T
    a, b = site.moving_factors()
    reads = "lora_A" if "lora_A" in site.trained else "lora_B"
    writes = "lora_B" if "lora_B" in site.trained else "lora_A"
    seen_in = v if reads == "lora_A" else a.double() @ v  # X (A V) = 0
    seen_out = u if writes == "lora_B" else b.double().T @ u  # Uᵀ B X = 0
    if (basis := site.frozen.get(f"{reads}.basis")) is not None and reads == "lora_A":
        seen_in = basis.double().T @ seen_in
    if (basis := site.frozen.get(f"{writes}.basis")) is not None and writes == "lora_B":
        seen_out = basis.double().T @ seen_out
    return {f"{site.name}.{writes}": orthonormal(seen_out)}, {f"{site.name}.{reads}": orthonormal(seen_in)}


def alignment(delta: Tensor, weight: Tensor, *, preserved: int) -> float:
    """ρ: ‖ΔW inside the top singular directions, on either side‖ / ‖ΔW‖; 0 where all of it keeps clear."""
    u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    u, v = u[:, :preserved], vt[:preserved].T
    delta = delta.double()
    outside = delta - u @ (u.T @ delta)
    outside = outside - (outside @ v) @ v.T
    return float((delta - outside).norm() / delta.norm())
