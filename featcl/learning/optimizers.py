"""Optimizers in coordinates: a short list, all with decoupled weight decay."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featcl.errors import FeatclError


class Sgd(torch.optim.SGD):
    """Stochastic gradient descent with decoupled weight decay: C ← (1 − lr · decay) C, then C ← C − lr · step."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(parameters, lr=lr, momentum=momentum)
        self.param_groups[0]["decay"] = weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Decay, then step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and group["decay"]:
                    parameter.mul_(1.0 - group["lr"] * group["decay"])
        return super().step(closure)


def build_optimizer(
    name: str, parameters: Sequence[nn.Parameter], *, lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """`adamw` (torch's), `sgd`, or `momentum` (sgd with momentum 0.9).

    Raises:
        FeatclError: For another name, or a learning rate or decay that is negative or not finite.
    """
    for what, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise FeatclError(f"{what} must be a finite number, at least 0, got {value!r}")
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    if name in ("sgd", "momentum"):
        momentum = 0.9 if name == "momentum" else 0.0
        return Sgd(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum)
    raise FeatclError(f"unknown optimizer {name!r}; choose from adamw, sgd, momentum")


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the optimizer's state, one tensor per `parameter index/name`."""
    return {
        f"{index}/{name}": torch.as_tensor(value).detach().clone()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def load_moments_(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Put `moments` back; exact. The learning rate and other settings stay as they are.

    Raises:
        FeatclError: If a moment does not belong to one of the optimizer's parameters, or has another shape.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        index, name = key.split("/", 1)
        if int(index) >= len(parameters) or (value.ndim and value.shape != parameters[int(index)].shape):
            raise FeatclError(f"optimizer state {key} does not fit: it was saved for another adapter")
        state.setdefault(int(index), {})[name] = value.clone()
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
