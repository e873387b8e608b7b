"""EWC on two biased coins, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from featcl.errors import FeatclError
from featcl.learning.gradient import accumulate_gradient_
from featcl.methods.ewc import EWC
from featcl.methods.method import View
from tests.methods.coins import Coins, experience_of, gradient, round_trip, same_tensors, step_, view_of

P0, P1 = 0.8, 0.3  # probability of 1 after 0 and after 1
THETA = (math.log(P0 / (1 - P0)), math.log(P1 / (1 - P1)))


def coins() -> tuple[Coins, View]:
    made = Coins(THETA)
    return made, view_of(made)


def test_the_empirical_fisher_is_the_one_computed_by_hand() -> None:
    # 0→1→0→1: after 0 came 1 twice, after 1 came 0 once. The score of θ_x is Σ (y - p_x).
    _, view = coins()
    method = EWC(labels="data")
    method.end_task_("a", [experience_of((0, 1, 0, 1)), experience_of((0, 0))], view)
    first = (2 * (1 - P0), 0 - P1)
    second = (0 - P0, 0.0)
    expected = [(first[i] ** 2 + second[i] ** 2) / 4 for i in (0, 1)]  # 3 + 1 targets
    assert method.wells[0].importance["theta"].tolist() == pytest.approx(expected, rel=1e-6)
    assert method.wells[0].centre["theta"].tolist() == pytest.approx(THETA, rel=1e-6)


def test_sequences_of_one_batch_are_squared_one_by_one() -> None:
    _, view = coins()
    together, apart = EWC(labels="data"), EWC(labels="data")
    together.end_task_("a", [experience_of((0, 1, 0, 1), (0, 0))], view)
    apart.end_task_("a", [experience_of((0, 1, 0, 1)), experience_of((0, 0))], view)
    assert same_tensors(together.tensors(), apart.tensors())
    # negative control: the squared gradient of the batch's mean, which is often taken instead, is another number
    mean = gradient(view.terms, experience_of((0, 1, 0, 1), (0, 0)), view.student)
    assert not torch.allclose(together.wells[0].importance["theta"], mean.square(), rtol=0.2)


def test_a_trusted_experience_counts_more() -> None:
    _, view = coins()
    method = EWC(labels="data")
    method.end_task_("a", [experience_of((0, 1), weight=3.0), experience_of((0, 0), weight=1.0)], view)
    expected = (3 * (1 - P0) ** 2 + P0**2) / 4
    assert float(method.wells[0].importance["theta"][0]) == pytest.approx(expected, rel=1e-6)


def test_the_sampled_fisher_is_the_fisher_information() -> None:
    # p (1 - p) per token after x; half of the tokens follow a 0. Labels are drawn, so the data's own do not matter.
    _, view = coins()
    many = [experience_of(*[(0, 1), (1, 1)] * 500)]
    method = EWC()
    method.end_task_("a", many, view)
    expected = torch.tensor([P0 * (1 - P0) / 2, P1 * (1 - P1) / 2])
    spread = torch.tensor([P0 * (1 - P0), P1 * (1 - P1)]).sqrt() * torch.tensor([1 - 2 * P0, 1 - 2 * P1]).abs()
    found = method.wells[0].importance["theta"]
    assert ((found - expected).abs() < 4 * 0.5 * spread / 500**0.5).all()
    other = EWC(labels="data")  # negative control: the labels say 1 always, so the empirical Fisher is (1 - p)²
    other.end_task_("a", many, view)
    wrong = other.wells[0].importance["theta"]
    assert wrong.tolist() == pytest.approx([(1 - P0) ** 2 / 2, (1 - P1) ** 2 / 2], rel=1e-4)


def test_half_the_fisher_times_the_squared_distance_is_the_divergence_per_token() -> None:
    made, view = coins()
    method = EWC()
    method.end_task_("a", [experience_of(*[(0, 1)] * 1000)], view)
    moved = 0.05
    with torch.no_grad():
        made.theta[0] += moved
    p, q = torch.tensor(THETA[0]).sigmoid(), torch.tensor(THETA[0] + moved).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert method.wells.penalty(view.student).item() == pytest.approx(float(kl), rel=0.1)


def test_the_penalty_and_its_gradient_are_those_computed_by_hand() -> None:
    made, view = coins()
    method = EWC(strength=10.0, labels="data")
    method.end_task_("a", [experience_of((0, 1), (1, 0))], view)
    fisher = [(1 - P0) ** 2 / 2, P1**2 / 2]
    with torch.no_grad():
        made.theta += torch.tensor([0.5, -2.0])
    assert method.wells.penalty(view.student).item() == pytest.approx(
        0.5 * (fisher[0] * 0.25 + fisher[1] * 4.0), rel=1e-5
    )
    here = experience_of((0, 1))
    plain, held = (gradient(terms, here, view.student) for terms in (view.terms, [*view.terms, *method.terms()]))
    assert (held - plain).tolist() == pytest.approx([10.0 * fisher[0] * 0.5, 10.0 * fisher[1] * -2.0], rel=1e-4)


def test_per_task_adds_penalties_and_online_keeps_one() -> None:
    one, two = experience_of((0, 1)), experience_of((1, 1))
    f_one, f_two = (1 - P0) ** 2, (1 - torch.tensor(THETA[1] + 1).sigmoid()) ** 2
    found = {}
    for variant in ("per_task", "online"):
        made, view = coins()
        method = EWC(variant=variant, labels="data", decay=0.5 if variant == "online" else 1.0)
        method.end_task_("a", [one], view)
        with torch.no_grad():
            made.theta += 1.0
        method.end_task_("b", [two], view)
        with torch.no_grad():
            made.theta += 1.0
        found[variant] = method.wells.penalty(view.student).item()
        assert len(method.wells) == (2 if variant == "per_task" else 1)
    # per task: θ is 2 from the first centre and 1 from the second; online: 1 from the only one
    assert found["per_task"] == pytest.approx(0.5 * (4 * f_one + float(f_two)), rel=1e-5)
    assert found["online"] == pytest.approx(0.5 * (0.5 * f_one + float(f_two)), rel=1e-5)


def test_before_the_first_task_ends_it_changes_nothing() -> None:
    _, view = coins()
    here = experience_of((0, 1, 1))
    plain, held = (gradient(terms, here, view.student) for terms in (view.terms, [*view.terms, *EWC().terms()]))
    assert torch.equal(plain, held)


def test_it_forgets_less_than_plain_training() -> None:
    # task a: 0→1; task b asks for 0→0, on the same number
    left = {}
    for strength in (1e-12, 100.0):
        made, view = coins()
        method = EWC(strength=strength)
        for _ in range(10):
            step_(method, view, 0.5, terms=view.terms, experience=experience_of((0, 1)))
        method.end_task_("a", [experience_of(*[(0, 1)] * 256)], view)
        for _ in range(100):
            step_(method, view, 0.1, terms=view.terms, experience=experience_of((0, 0)))
        left[strength] = float(made.theta.detach()[0].sigmoid())
    assert left[1e-12] < 0.2
    assert left[100.0] > 0.85


def test_state_goes_through_a_checkpoint() -> None:
    made, view = coins()
    method = EWC()
    for task in ("a", "b"):
        method.end_task_(task, [experience_of((0, 1, 0), (1, 1))], view)
    other = round_trip(method, EWC)
    assert same_tensors(method.tensors(), other.tensors())
    assert other.state() == method.state()
    with torch.no_grad():
        made.theta += 0.3
    assert torch.equal(method.wells.penalty(view.student), other.wells.penalty(view.student))
    assert method.cost().stored_bytes == 2 * 2 * 8  # two tasks, centre and importance, two float32
    assert method.cost().backward_tokens == 2 * (2 + 1)  # what stands left of the last target


def test_changed_directions_are_refused() -> None:
    made, view = coins()
    method = EWC()
    method.end_task_("a", [experience_of((0, 1))], view)
    made.changes += 1
    with pytest.raises(FeatclError, match="directions were changed"):
        accumulate_gradient_([*view.terms, *method.terms()], experience_of((0, 1)), view.student)


@pytest.mark.parametrize(
    "wrong", [{"strength": 0.0}, {"strength": float("nan")}, {"variant": "both"}, {"decay": 1.5}, {"labels": "true"}]
)
def test_bad_arguments_are_refused(wrong: dict) -> None:
    with pytest.raises(FeatclError, match=next(iter(wrong))):
        EWC(**wrong)


def test_a_task_without_targets_is_refused() -> None:
    _, view = coins()
    with pytest.raises(FeatclError, match="no targets"):
        EWC().end_task_("a", [], view)
