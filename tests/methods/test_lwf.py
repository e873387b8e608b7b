"""LwF: zero where nothing has changed, exact on given logits; the KL anchor likewise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from featcl.errors import FeatclError
from featcl.learning.gradient import accumulate_gradient_
from featcl.methods.lwf import LwF
from featcl.methods.method import Method
from featcl.objectives.anchors import KlToBase
from featcl.objectives.build import Term
from tests.methods.coins import Coins, batch_of, experience_of, gradient, round_trip, step_, view_of

THETA = (1.0, -0.5)
HERE = experience_of((0, 1, 0), (1, 1))


def value(terms, student, experience=HERE) -> float:
    return accumulate_gradient_(terms, experience, student).loss


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("match", ["logits", "features"])
def test_it_is_zero_where_the_task_begins_and_not_after(match: str) -> None:
    made = Coins(THETA)
    view, method = view_of(made), LwF(match=match)
    method.begin_task_("a", view)
    assert value(method.terms(), view.student) == 0.0
    assert gradient(method.terms(), HERE, view.student).abs().max() < 1e-6  # rounding
    with torch.no_grad():
        made.theta += 0.5
    assert value(method.terms(), view.student) > 0.01  # negative control: an LwF that does nothing would be 0 here too
    method.begin_task_("b", view)  # the new task's old model is the one of now
    assert value(method.terms(), view.student) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_it_is_the_softened_divergence_on_given_logits(temperature: float) -> None:
    made = Coins(THETA)
    view, method = view_of(made), LwF(temperature=temperature, strength=3.0)
    method.begin_task_("a", view)
    with torch.no_grad():
        made.theta.copy_(torch.tensor([-1.0, 2.0]))
    after = torch.tensor([0, 1, 1])  # tokens that the three targets follow
    old, new = (torch.stack([torch.zeros(3), torch.tensor(t)[after]], -1) for t in (THETA, (-1.0, 2.0)))
    by_hand = temperature**2 * kl((old / temperature).softmax(-1), (new / temperature).softmax(-1)).mean()
    assert value(method.terms(), view.student) == pytest.approx(3.0 * float(by_hand), rel=1e-5)
    # gradient of T² KL with respect to the new logit: T (σ(θ/T) - σ(θ_old/T)), mean over targets
    parts = temperature * ((new[:, 1] / temperature).sigmoid() - (old[:, 1] / temperature).sigmoid()) / 3
    expected = torch.zeros(2).index_add(0, after, 3.0 * parts)
    assert torch.allclose(gradient(method.terms(), HERE, view.student), expected, rtol=1e-4)


def test_the_gradient_is_that_of_the_papers_cross_entropy() -> None:
    made = Coins(THETA)
    view, method = view_of(made), LwF(temperature=2.0)
    method.begin_task_("a", view)
    with torch.no_grad():
        made.theta += 0.7
    theta = made.theta.detach().clone().requires_grad_()
    logits = torch.stack([torch.zeros(3), theta[[0, 1, 1]]], -1)
    old = torch.stack([torch.zeros(3), torch.tensor(THETA)[[0, 1, 1]]], -1)
    (4.0 * F.cross_entropy(logits / 2, (old / 2).softmax(-1))).backward()
    assert torch.allclose(gradient(method.terms(), HERE, view.student), theta.grad, rtol=1e-4)


def test_features_are_the_hidden_states() -> None:
    made = Coins(THETA)
    view, method = view_of(made), LwF(match="features")
    method.begin_task_("a", view)
    with torch.no_grad():
        made.theta += torch.tensor([2.0, 1.0])
    assert value(method.terms(), view.student) == pytest.approx(0.5 * (4 + 1 + 1) / 3, rel=1e-6)
    assert torch.allclose(gradient(method.terms(), HERE, view.student), torch.tensor([2.0 / 3, 2.0 / 3]))


def test_the_old_model_stays_the_same_within_a_task_and_is_asked_once_per_batch() -> None:
    made = Coins(THETA)
    view, method = view_of(made), LwF()
    method.begin_task_("a", view)
    for _ in range(3):
        step_(method, view, 0.5, terms=view.terms, experience=HERE)
    assert method.cost().forward_tokens == 2 * 3  # two sequences, padded to three tokens
    assert torch.equal(made.coordinates()["theta"], made.theta)
    first = value(method.terms(), view.student)
    again = experience_of((0, 1, 0), (1, 1))  # the same tokens, tokenised anew
    assert value(method.terms(), view.student, again) == pytest.approx(first, rel=1e-6)


def test_it_keeps_more_of_what_was_learned() -> None:
    # task a: 1 after 0; task b: 0 after 0
    left = {}
    for strength in (1e-9, 5.0):
        made = Coins((0.0, 0.0))
        view, method = view_of(made), LwF(strength=strength, temperature=1.0)
        method.begin_task_("a", view)
        for _ in range(20):
            step_(Method(), view, 0.5, terms=view.terms, experience=experience_of((0, 1)))
        method.begin_task_("b", view)
        for _ in range(50):
            step_(method, view, 0.5, terms=view.terms, experience=experience_of((0, 0)))
        left[strength] = float(made.theta.detach()[0].sigmoid())
    assert left[1e-9] < 0.2 < 0.6 < left[5.0]


def test_state_goes_through_a_checkpoint() -> None:
    made = Coins(THETA)
    view, method = view_of(made), LwF()
    method.begin_task_("a", view)
    with torch.no_grad():
        made.theta += 0.5
    other = round_trip(method, LwF)
    assert value(other.terms(), view.student) == value(method.terms(), view.student) > 0
    assert method.cost().stored_bytes == 8


def test_what_it_lacks_is_an_error_and_not_zero() -> None:
    made = Coins(THETA)
    view, method = view_of(made), LwF()
    with pytest.raises(FeatclError, match="no task has begun"):
        value(method.terms(), view.student)
    method.begin_task_("a", view)
    with pytest.raises(FeatclError, match="no targets"):
        value(method.terms(), view.student, type(HERE)(HERE.trajectory, [], HERE.generator))
    made.changes += 1
    with pytest.raises(FeatclError, match="directions were changed"):
        value(method.terms(), view.student)
    with pytest.raises(FeatclError, match="temperature"):
        LwF(temperature=0.0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_kl_to_base_is_zero_at_the_start_and_exact_on_given_logits(alpha: float) -> None:
    made = Coins((0.0, 0.0))
    view, term = view_of(made), [Term("kl_to_base", 1.0, KlToBase(alpha=alpha))]
    assert value(term, view.student) == 0.0
    with torch.no_grad():
        made.theta.copy_(torch.tensor([math.log(4.0), 0.0]))  # probability 0.8 against the base's 0.5
    student, base = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    by_hand = kl(base, student) if alpha == 0.0 else kl(student, base)
    assert value(term, view.student) == pytest.approx(float(by_hand) / 3, rel=1e-5)  # one target of three follows a 0
    assert batch_of((0, 1, 0), (1, 1)).tokens == 3
