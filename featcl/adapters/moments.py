"""An optimizer's state when its coordinates are expressed in another basis.

Adam's first moment is a mean of gradients and rotates as C does. Its second is a mean of squares, which no rotation
carries over, so it starts anew, and with it the step counter that corrects the bias of both: the new state is the one
after a single first step whose gradient was the rotated mean m. (Zeros in its place, beside a first moment that is not
zero, divide m by next to nothing where the next gradient is small: steps of 400 times the learning rate were seen.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from featcl.errors import FeatclError

_LINEAR = {"exp_avg", "momentum_buffer"}  # state that is a weighted sum of gradients
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq"}


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The optimizer's group that trains a parameter.

    Raises:
        FeatclError: If none does.
    """
    for group in optimizer.param_groups:
        if any(parameter is held for held in group["params"]):
            return group
    raise FeatclError("the optimizer does not train this adapter: give it adapter.parameters()")


def turn_moments_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, turn: Callable[[Tensor], Tensor]) -> None:
    """Rotate what is linear in past gradients, reset the rest; see the head of this module."""
    state = optimizer.state.get(parameter, {})
    past = {name: value for name, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape}
    for name, value in past.items():
        turned = turn(value).to(value)
        state[name] = turned if name in _LINEAR else torch.zeros_like(turned)
    if "exp_avg" in past:
        beta, beta_square = group_of(optimizer, parameter)["betas"]
        mean = state["exp_avg"] / (1 - beta ** float(state["step"]))
        state["exp_avg"] = (1 - beta) * mean
        for name in _SQUARES & set(past):
            state[name] = (1 - beta_square) * mean.square()
        state["step"] = torch.ones_like(torch.as_tensor(state["step"], dtype=torch.float32))


def new_accumulator_(parameter: nn.Parameter) -> None:
    """Let go of the autograd node that collects a parameter's gradient, before its shape changes.

    A loss that the caller still holds keeps that node alive, with the old shape, and the next backward pass would
    refuse the new one. Torch makes another where the data change their dtype, so they do, for a moment.
    """
    data = parameter.data
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data
