"""How much each trained number matters, from the gradients of single sequences.

    Ω = Σ_s w_s f(∂ score_s / ∂θ) / Σ_s w_s n_s

f is the square or the absolute value, s runs over sequences with n_s targets and trust w_s. f comes before the mean:
the square of a batch's mean gradient, which is often taken for the Fisher information, vanishes at the optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.method import View
from featcl.objectives.experience import Experience
from featcl.objectives.scoring import TokenBatch

Score = Callable[[Tensor, TokenBatch], Tensor]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a pass over experiences found.

    Attributes:
        importance: Ω by the name of the trained tensor, float32.
        tokens: Tokens read, forwards and backwards.
    """

    importance: dict[str, Tensor]
    tokens: int


def measure(
    experiences: Sequence[Experience], view: View, score: Score, *, of: Callable[[Tensor], Tensor], method: str
) -> Measured:
    """Ω of the head of this module; the parameters' own gradients are left alone.

    Args:
        experiences: What the model should remain good at.
        view: Whose parameters.
        score: From last hidden states at the targets of one sequence, and the sequence, to a sum over its targets.
        of: f, such as `torch.square` or `torch.abs`.
        method: Named in an error.

    Raises:
        FeatclError: If no experience has a target.
    """
    names, parameters = list(view.parameters), list(view.parameters.values())
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    targets, tokens = 0.0, 0
    for experience in experiences:
        for row in (row for batch in experience.batches for row in rows_of(batch)):
            with torch.enable_grad():
                value = score(view.student.scorer.hidden(row), row)
                gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total += experience.weight * of(gradient.float())
            targets += experience.weight * row.tokens
            tokens += row.input_ids.numel()
    if targets == 0.0:
        raise FeatclError(f"{method}: the task's experiences have no targets, so nothing says what is important")
    return Measured({name: total / targets for name, total in zip(names, sums, strict=True)}, tokens)


def rows_of(batch: TokenBatch) -> Iterator[TokenBatch]:
    """Each sequence on its own, up to its last target; those without targets are left out."""
    width = batch.input_ids.shape[1]
    owner = torch.div(batch.positions, width, rounding_mode="floor")
    for number, ids in enumerate(batch.input_ids):
        mine = owner == number
        if bool(mine.any()):
            positions = batch.positions[mine] - number * width
            yield TokenBatch(ids[None, : int(positions.max()) + 1], positions, batch.targets[mine])
