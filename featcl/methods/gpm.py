"""Gradient projection memory: later updates leave what earlier tasks' inputs do to the adapter as it is.

After each task, with R the inputs of a trained matrix [d, n] and M the basis so far:

    R̂ = R - M Mᵀ R = U S Vᵀ,     M ← [M, U_k]     with the smallest k:  ‖M Mᵀ R‖² + Σ_{i ≤ k} s_i² ≥ ε ‖R‖²

and X ← X + ΔX (I - M Mᵀ) from there on: for inputs in the span of M, X z stays what it was. Both factors of a plain
LoRA are matrices in this sense: A with the linear's inputs, B with the inputs A a; where only A is kept clear, B still
changes what A a gives. At ε = 1 all logits on those tokens stay the same, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.methods.checks import count, share
from featcl.methods.method import Cost, View
from featcl.methods.projected import Projected
from featcl.methods.quadratic import nbytes
from featcl.methods.site_inputs import inputs_of, need_matrices
from featcl.objectives.experience import Experience


class GPM(Projected):
    """Blocks the main directions of the inputs of all earlier tasks.

    Args:
        threshold: ε, the share of the inputs' energy that must lie in the basis; 1 blocks all of their span.
        tokens: A task's inputs are judged by at most so many tokens, drawn evenly.

    Raises:
        FeatclError: If an argument is out of range.

    Source: Saha, Garg, Roy 2021, arXiv:2103.09762, eqs. 5 to 9; the authors' code keeps one direction fewer than eq. 9
    asks for; here it is kept.
    """

    name = "gpm"

    def __init__(self, *, threshold: float = 0.97, tokens: int = 2048) -> None:
        share(self.name, threshold=threshold)
        count(self.name, tokens=tokens)
        super().__init__()
        self.threshold, self.tokens = threshold, tokens
        self._read = 0

    def refuse(self, view: View) -> None:
        """A kind that trains no matrix."""
        need_matrices(view.student.adapter, self.name)

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """Add this task's directions."""
        self._check(view)
        found, read = inputs_of(
            experiences, view.student, limit=self.tokens, generator=view.generator("gpm"), method=self.name
        )
        right = {name: grown(self.right.get(name), rows, threshold=self.threshold) for name, rows in found.items()}
        self._read += read
        self.block_(view, right=right)

    def cost(self) -> Cost:
        """The bases; a forward pass over a task's experiences at its end."""
        return Cost(nbytes(self.right), self._read)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**super().state(), "read": self._read}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        super().load_state_(state)
        self._read = int(state["read"])


def grown(
    basis: Float[Tensor, "width k"] | None, rows: Float[Tensor, "tokens width"], *, threshold: float
) -> Float[Tensor, "width k_new"]:
    """The basis with the fewest new directions that make it hold `threshold` of the rows' energy; orthonormal.

    Args:
        basis: M, or None.
        rows: Rᵀ.
        threshold: ε.
    """
    rows = rows.double()
    known = torch.zeros(rows.shape[1], 0, dtype=torch.float64, device=rows.device) if basis is None else basis.to(rows)
    rest = rows - (rows @ known) @ known.T
    rest = rest - (rest @ known) @ known.T  # twice is enough: Giraud et al. 2005
    _, s, vt = torch.linalg.svd(rest, full_matrices=False)
    total = float(rows.square().sum())
    held = total - float(s.square().sum()) + torch.cat([s.new_zeros(1), s.square().cumsum(0)])
    enough = (held >= threshold * total * (1.0 - 1e-12)).nonzero()
    new = int(enough[0]) if len(enough) else len(s)
    new = min(new, int((s > 1e-6 * total**0.5).sum()))  # what is smaller is rounding of float32 inputs
    return torch.linalg.qr(torch.cat([known, vt[:new].T], dim=1)).Q.float()
