"""Quadratic wells Σ Ω_i (θ_i - θ*_i)²: the penalty of EWC, SI, MAS and L2, in the trained coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.method import Method
from featcl.objectives.build import Term
from featcl.objectives.experience import Student

Tensors = Mapping[str, Tensor]


def copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, on their own."""
    return {name: tensor.detach().clone() for name, tensor in parameters.items()}


@dataclass(frozen=True, eq=False)
class Well:
    """Σ Ω_i (θ_i - θ*_i)².

    Attributes:
        centre: θ*, by the name of the trained tensor.
        importance: Ω, at least 0, likewise.
    """

    centre: Tensors
    importance: Tensors


class Wells:
    """factor · Σ_t Σ_i Ω_ti (θ_i - θ*_ti)², a `Penalty`; 0 as long as there is no well.

    Args:
        metric: Name under which its value is logged; what comes before the slash is the method's name.
        factor: 1 or 1/2, as the paper has it.
    """

    def __init__(self, metric: str, *, factor: float = 1.0) -> None:
        self.metric = metric
        self.factor = factor
        self._wells: list[Well] = []
        self._changes = 0

    def __len__(self) -> int:
        return len(self._wells)

    def __getitem__(self, index: int) -> Well:
        return self._wells[index]

    def set_(self, wells: Sequence[Well], *, changes: int) -> None:
        """Hold these wells from here on.

        Args:
            wells: In the present coordinates.
            changes: How often the adapter's directions were changed; other directions have other coordinates.
        """
        self._wells, self._changes = list(wells), changes

    def check(self, adapter: Any) -> None:
        """Raise FeatclError where the adapter's directions were changed since a well was made."""
        if self._wells and adapter.changes != self._changes:
            raise FeatclError(
                f"{self.metric.split('/')[0]}: the directions were changed after its importances were measured, and "
                "they belong to the old coordinates; use it without changes of directions"
            )

    def penalty(self, student: Student) -> Float[Tensor, ""]:
        """The value, with its gradient."""
        self.check(student.adapter)
        parameters = student.adapter.named_parameters()
        first = next(iter(parameters.values()))
        total = 0.0 * first.float().sum()  # so that there is a gradient before the first well
        for well in self._wells:
            for name, parameter in parameters.items():
                away = parameter.float() - well.centre[name].to(parameter.device)
                part = (well.importance[name].to(parameter.device) * away.square()).sum()
                total = total + self.factor * part.to(total.device)
        return total

    @torch.no_grad()
    def gradient(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """2 · factor · Σ_t Ω_t ⊙ (θ - θ*_t), by name."""
        found = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        for well in self._wells:
            for name, tensor in parameters.items():
                away = tensor - well.centre[name].to(tensor)
                found[name] += 2.0 * self.factor * well.importance[name].to(tensor) * away
        return found

    # --- what a version holds

    def state(self) -> dict[str, int]:
        """How many wells, and for which directions."""
        return {"wells": len(self._wells), "changes": self._changes}

    def load_state_(self, state: Mapping[str, int]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self._wells, self._changes = [Well({}, {})] * int(state["wells"]), int(state["changes"])

    def tensors(self) -> dict[str, Tensor]:
        """Centres and importances by number of the well."""
        return {
            f"{number}/{part}/{name}": tensor
            for number, well in enumerate(self._wells)
            for part in ("centre", "importance")
            for name, tensor in getattr(well, part).items()
        }

    def load_tensors_(self, tensors: Tensors) -> None:
        """Put `tensors` back."""
        found: list[dict[str, dict[str, Tensor]]] = [{"centre": {}, "importance": {}} for _ in self._wells]
        for key, tensor in tensors.items():
            number, part, name = key.split("/", 2)
            found[int(number)][part][name] = tensor
        self._wells = [Well(**parts) for parts in found]


class Quadratic(Method):
    """A method whose penalty is wells, and whose wells are what it remembers; a subclass says when they are dug.

    Args:
        strength: Weight of the penalty.
        factor: As for `Wells`.
    """

    def __init__(self, *, strength: float, factor: float = 1.0) -> None:
        self.wells = Wells(f"{self.name}/penalty", factor=factor)
        self._term = Term(self.name, strength, self.wells)

    def terms(self) -> Sequence[Term]:
        """The penalty."""
        return (self._term,)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(self.wells.state())

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self.wells.load_state_(state)

    def tensors(self) -> dict[str, Tensor]:
        """The wells."""
        return self.wells.tensors()

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self.wells.load_tensors_(tensors)


def nbytes(*groups: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for group in groups for tensor in group.values())
