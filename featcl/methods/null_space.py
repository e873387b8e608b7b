"""Null space of retained inputs: updates along directions in which what is to be kept has (almost) no inputs.

With Σ = Σ z zᵀ / n over all retained tokens, earlier tasks' included, and its eigenvectors by falling eigenvalue:

    X ← X + ΔX V₀ V₀ᵀ,    V₀: the last eigenvectors, as many as hold at most `lost` of trace Σ

GPM picks directions task by task and keeps all it ever picked; here one covariance stands for everything seen, so what
is rare in the whole is freed again. It costs width² numbers per trained matrix, however many tasks there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featcl.methods.checks import count, share
from featcl.methods.method import Cost, View
from featcl.methods.projected import Projected
from featcl.methods.quadratic import nbytes
from featcl.methods.site_inputs import inputs_of, need_matrices
from featcl.objectives.experience import Experience
from featcl.streams.trajectory import Trajectory


class NullSpace(Projected):
    """Blocks the directions of the inputs of retained texts and of earlier tasks.

    Args:
        lost: Share of the inputs' energy that may lie in the directions left free.
        retained: Texts of what the model should keep, read before the first task; none by default.
        tokens: At most so many tokens of a task, or of the retained texts, are read into the covariance.

    Raises:
        FeatclError: If an argument is out of range.

    Source: Wang, Li, Sun, Xu 2021, arXiv:2103.07113, algorithm 2 (Adam-NSCL, which projects Adam's step, not its
    gradient); the share is the R of its eq. 10.
    """

    name = "null_space"

    def __init__(self, *, lost: float = 0.03, retained: Sequence[str] = (), tokens: int = 2048) -> None:
        share(self.name, lost=lost)
        count(self.name, tokens=tokens)
        super().__init__()
        self.lost, self.retained, self.tokens = lost, tuple(retained), tokens
        self._sums: dict[str, Tensor] = {}  # Σ z zᵀ, float64
        self._read = 0

    def refuse(self, view: View) -> None:
        """A kind that trains no matrix."""
        need_matrices(view.student.adapter, self.name)

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Before the first task, read the retained texts."""
        if self.retained and not self._sums:
            kept = [view.encode(Trajectory(f"retained-{i}", text=text)) for i, text in enumerate(self.retained)]
            self._add_(kept, view)

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """This task is to be kept from here on."""
        self._check(view)
        self._add_(experiences, view)

    def _add_(self, experiences: Sequence[Experience], view: View) -> None:
        found, read = inputs_of(
            experiences, view.student, limit=self.tokens, generator=view.generator("null_space"), method=self.name
        )
        for name, rows in found.items():
            product = rows.double().T @ rows.double()
            self._sums[name] = product if name not in self._sums else self._sums[name].to(product) + product
        self._read += read
        self.block_(view, right={name: main_directions(total, lost=self.lost) for name, total in self._sums.items()})

    def cost(self) -> Cost:
        """Covariances and bases; a forward pass over what is retained."""
        return Cost(nbytes(self.right, self._sums), self._read)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**super().state(), "read": self._read}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        super().load_state_(state)
        self._read = int(state["read"])

    def tensors(self) -> dict[str, Tensor]:
        """Bases and covariances."""
        return {**super().tensors(), **{f"sums/{name}": total for name, total in self._sums.items()}}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        super().load_tensors_(tensors)
        self._sums = {key.split("/", 1)[1]: total for key, total in tensors.items() if key.startswith("sums/")}


def main_directions(total: Tensor, *, lost: float) -> Tensor:
    """The fewest eigenvectors of Σ z zᵀ without which at most `lost` of its trace is left; orthonormal columns."""
    values, vectors = torch.linalg.eigh(total)
    left = values.clamp(min=0.0).cumsum(0) / values.clamp(min=0.0).sum().clamp(min=1e-300)  # of the smallest so many
    free = int((left <= lost).sum())
    return vectors[:, free:].flip(1).float()
