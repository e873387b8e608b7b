"""Two biased coins: a language model of two numbers, small enough to compute everything by hand.

Vocabulary {0, 1}; after token x the next token is 1 with probability σ(θ_x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featcl.learning.gradient import accumulate_gradient_
from featcl.learning.randomness import derived_generator
from featcl.methods.method import Method, View
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import Head, TokenBatch
from featcl.objectives.sft import Sft
from featcl.streams import Trajectory


class Coins:
    """The trained part: θ, under the name `theta`."""

    def __init__(self, theta: Sequence[float]) -> None:
        self.theta = nn.Parameter(torch.tensor(theta))
        self.changes = 0
        self.off = False

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {"theta": self.theta}

    def parameters(self) -> list[nn.Parameter]:
        return [self.theta]

    def coordinates(self) -> dict[str, Tensor]:
        return {"theta": self.theta.detach().clone()}

    @torch.no_grad()
    def load_coordinates_(self, coordinates: Mapping[str, Tensor]) -> None:
        self.theta.copy_(coordinates["theta"])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.off = True
        yield
        self.off = False

    def penalty(self) -> None:
        return None

    def project_gradients_(self) -> None:
        return None


class CoinScorer:
    """hidden = θ of the token, logits = [0, hidden]."""

    def __init__(self, coins: Coins) -> None:
        self.coins = coins
        linear = nn.Linear(1, 2, bias=False)
        linear.weight = nn.Parameter(torch.tensor([[0.0], [1.0]]), requires_grad=False)
        self.head, self.logit_width, self.device = Head(linear, None), 2, torch.device("cpu")

    def hidden(self, batch: TokenBatch) -> Tensor:
        theta = torch.zeros(2) if self.coins.off else self.coins.theta
        return theta[batch.input_ids].flatten()[batch.positions][:, None]


def batch_of(*sequences: Sequence[int]) -> TokenBatch:
    """Sequences of one length or less; every token but the first is a target."""
    width = max(map(len, sequences))
    rows = [[*s, *[0] * (width - len(s))] for s in sequences]
    places = [(row, place) for row, s in enumerate(sequences) for place in range(len(s) - 1)]
    return TokenBatch(
        torch.tensor(rows),
        torch.tensor([row * width + place for row, place in places]),
        torch.tensor([sequences[row][place + 1] for row, place in places]),
    )


def experience_of(*sequences: Sequence[int], name: str = "e", weight: float = 1.0) -> Experience:
    """One experience whose only batch holds these sequences."""
    generator = partial(derived_generator, 0, name)
    return Experience(Trajectory(name, text="coins"), [batch_of(*sequences)], generator, weight=weight)


def view_of(coins: Coins, *, seed: int = 0) -> View:
    """As the learner's, with plain fine-tuning."""
    student = Student(CoinScorer(coins), coins, None, 8)  # type: ignore[arg-type]
    terms = [Term("sft", 1.0, Sft())]
    return View(
        student=student,
        parameters=coins.named_parameters(),
        terms=terms,
        encode=lambda trajectory: experience_of((0, 1)),
        gradient=lambda experience: {"theta": gradient(terms, experience, student)},
        generator=lambda purpose: derived_generator(seed, "version", purpose),
    )


def gradient(terms: Sequence[Any], experience: Experience, student: Student) -> Tensor:
    """∂loss/∂θ, as the learner computes it; leaves θ's own gradient empty."""
    student.adapter.theta.grad = None
    accumulate_gradient_(terms, experience, student)
    found = student.adapter.theta.grad
    student.adapter.theta.grad = None
    return found


def step_(method: Method, view: View, lr: float, *, terms: Sequence[Any] = (), experience: Experience) -> None:
    """One update as the learner makes it: loss and penalties, project, step, after the step."""
    adapter = view.student.adapter
    before = adapter.coordinates()
    adapter.theta.grad = None
    accumulate_gradient_([*terms, *method.terms()], experience, view.student)
    method.project_(view)
    seen = {"theta": adapter.theta.grad.clone()}
    with torch.no_grad():
        adapter.theta -= lr * adapter.theta.grad
    adapter.theta.grad = None
    method.after_step_(before, seen, view)


def round_trip(method: Method, fresh: Callable[[], Method]) -> Method:
    """A new method with the state of the old one, through the order in which a checkpoint is read."""
    import json

    other = fresh()
    other.load_state_(json.loads(json.dumps(method.state())))
    saved = {name: tensor.clone() for name, tensor in sorted(method.tensors().items())}
    other.load_tensors_(saved)
    return other


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names and bits agree."""
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
