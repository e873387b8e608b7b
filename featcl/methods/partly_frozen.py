"""Methods that set one factor of a LoRA by a rule and train only the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from featcl.methods.method import Method, View


class PartlyFrozen(Method):
    """Keeps some of the trained tensors where they are, weight decay and old momentum included.

    Attributes:
        frozen: Names of these tensors.
    """

    def __init__(self) -> None:
        self.frozen: tuple[str, ...] = ()

    def freeze_(self, names: Iterable[str]) -> None:
        """Freeze these, and no others, from here on."""
        self.frozen = tuple(sorted(names))

    @torch.no_grad()
    def project_(self, view: View) -> None:
        """No gradient for what is frozen."""
        for name in self.frozen:
            if (gradient := view.parameters[name].grad) is not None:
                gradient.zero_()

    @torch.no_grad()
    def project_step_(self, before: Mapping[str, Tensor], view: View) -> None:
        """What moved all the same (weight decay, momentum) goes back."""
        for name in self.frozen:
            view.parameters[name].copy_(before[name])

    def state(self) -> dict[str, Any]:
        """Names of what is frozen."""
        return {"frozen": list(self.frozen)}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self.frozen = tuple(state["frozen"])
