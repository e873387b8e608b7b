"""Updates without a component in blocked directions: gradient and step of each trained matrix X are projected.

    P(X) = (I - L Lᵀ) X (I - R Rᵀ)        ∇X ← P(∇X),     X ← X₀ + P(X - X₀)

L and R are orthonormal columns. Projecting the gradient alone, as papers with plain SGD do, leaks under AdamW, whose
element-wise scaling turns the step out of the subspace, and under weight decay; the step itself must stay inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.method import Method, View

Bases = dict[str, Tensor]


class Projected(Method):
    """What GPM, the null space of inputs, and OPLoRA share.

    Attributes:
        left: L by the name of the trained matrix; a missing one blocks nothing.
        right: R likewise.
    """

    def __init__(self) -> None:
        self.left: Bases = {}
        self.right: Bases = {}
        self._changes = 0

    def block_(self, view: View, *, left: Bases | None = None, right: Bases | None = None) -> None:
        """Block these directions from here on.

        Raises:
            FeatclError: If nothing is left that could be learned.
        """
        self.left, self.right = dict(left or {}), dict(right or {})
        self._changes = view.student.adapter.changes
        if self.room(view) == 0.0:
            raise FeatclError(
                f"{self.name}: every direction of every trained matrix is blocked, so nothing can be learned any more; "
                "block less, or train more (a higher rank, more layers)"
            )

    def room(self, view: View) -> float:
        """Share of the dimensions of the trained matrices that are still free."""
        free = total = 0
        for name, parameter in view.parameters.items():
            rows, columns = parameter.shape
            blocked = [bases[name].shape[1] if name in bases else 0 for bases in (self.left, self.right)]
            free += (rows - blocked[0]) * (columns - blocked[1])
            total += rows * columns
        return free / total

    @torch.no_grad()
    def project_(self, view: View) -> None:
        """∇X ← P(∇X)."""
        self._check(view)
        for name, parameter in view.parameters.items():
            if parameter.grad is not None:
                parameter.grad.copy_(self._free(name, parameter.grad))

    @torch.no_grad()
    def project_step_(self, before: Mapping[str, Tensor], view: View) -> None:
        """X ← X₀ + P(X - X₀)."""
        for name, parameter in view.parameters.items():
            if name in self.left or name in self.right:
                start = before[name].to(parameter)
                parameter.copy_(start + self._free(name, parameter - start))

    def _free(self, name: str, value: Tensor) -> Tensor:
        """P, in float64 and rounded once."""
        wide = value.double()
        if (left := self.left.get(name)) is not None:
            basis = left.to(wide)
            wide = wide - basis @ (basis.T @ wide)
        if (right := self.right.get(name)) is not None:
            basis = right.to(wide)
            wide = wide - (wide @ basis) @ basis.T
        return wide.to(value.dtype)

    def _check(self, view: View) -> None:
        if (self.left or self.right) and view.student.adapter.changes != self._changes:
            raise FeatclError(
                f"{self.name}: the directions were changed after it chose what to block, which was in the old "
                "coordinates; use it without changes of directions"
            )

    # --- what a version holds

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"changes": self._changes}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._changes = int(state["changes"])

    def tensors(self) -> dict[str, Tensor]:
        """L and R."""
        sides = {"left": self.left, "right": self.right}
        return {f"{side}/{name}": basis for side, bases in sides.items() for name, basis in bases.items()}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        for side in ("left", "right"):
            found = {key.split("/", 1)[1]: basis for key, basis in tensors.items() if key.startswith(f"{side}/")}
            setattr(self, side, found)


def orthonormal(columns: Float[Tensor, "width n"], *, tolerance: float = 1e-6) -> Float[Tensor, "width rank"]:
    """Orthonormal columns with the same span, float32; columns shorter than `tolerance` of the longest span nothing."""
    u, s, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    return u[:, s > tolerance * s.max().clamp(min=1e-300)].float()
