"""SI on a quadratic, where the path integral is the loss itself."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.method import View
from featcl.methods.si import SI
from featcl.objectives.build import Term
from tests.methods.coins import Coins, experience_of, gradient, round_trip, same_tensors, step_, view_of

CURVES = torch.tensor([2.0, 0.5])
TARGET = torch.tensor([1.0, -3.0])
NOTHING = experience_of((0, 1))


class Bowl:
    """½ Σ a (θ - t)², a `Penalty`."""

    metric = "bowl"

    def __init__(self, curves: Tensor = CURVES, target: Tensor = TARGET) -> None:
        self.curves, self.target = curves, target

    def penalty(self, student) -> Tensor:
        return 0.5 * (self.curves * (student.adapter.theta - self.target).square()).sum()

    def value(self, theta: Tensor) -> Tensor:
        return 0.5 * self.curves * (theta - self.target).square()


def learn_(method: SI, view: View, steps: int, lr: float, bowl: Bowl | None = None) -> None:
    for _ in range(steps):
        step_(method, view, lr, terms=[Term("bowl", 1.0, bowl or Bowl())], experience=NOTHING)


def start(theta: tuple[float, float] = (0.0, 0.0), **options: float) -> tuple[SI, Coins, View]:
    made = Coins(theta)
    method, view = SI(**options), view_of(made)
    method.begin_task_("a", view)
    return method, made, view


def test_the_path_integral_is_what_the_loss_lost() -> None:
    method, made, view = start()
    learn_(method, view, 1000, 0.004)
    lost = Bowl().value(torch.zeros(2)) - Bowl().value(made.theta.detach())
    assert method.path["theta"].tolist() == pytest.approx(lost.tolist(), rel=6e-3)  # half a step's curvature
    assert (lost > 0.5).all()


def test_two_steps_by_hand() -> None:
    method, _, view = start()
    learn_(method, view, 2, 0.1)
    # g = a (θ - t): (-2, 1.5) at 0; θ becomes (0.2, -0.15); g = (-1.6, 1.425)
    by_hand = [0.1 * (4.0 + 2.56), 0.1 * (2.25 + 1.425**2)]
    assert method.path["theta"].tolist() == pytest.approx(by_hand, rel=1e-6)


def test_at_the_minimum_the_penalty_is_the_loss_again() -> None:
    method, made, view = start(damping=1e-9)
    learn_(method, view, 3000, 0.005)
    method.end_task_("a", [], view)
    assert method.wells[0].importance["theta"].tolist() == pytest.approx((CURVES / 2).tolist(), rel=0.01)
    with torch.no_grad():
        made.theta.copy_(torch.tensor([3.0, 1.0]))
    expected = Bowl().value(made.theta.detach()).sum()
    assert method.wells.penalty(view.student).item() == pytest.approx(float(expected), rel=0.01)


def test_importance_adds_up_over_tasks_and_the_centre_moves() -> None:
    method, made, view = start(damping=0.1)
    learn_(method, view, 100, 0.01)
    first_path, first = method.path["theta"].clone(), made.theta.detach().clone()
    method.end_task_("a", [], view)
    omega = first_path / (first.square() + 0.1)
    assert torch.allclose(method.wells[0].importance["theta"], omega)
    assert not method.path["theta"].any()  # the next task's path starts from 0
    method.begin_task_("b", view)
    learn_(method, view, 100, 0.01, Bowl(target=torch.tensor([-1.0, 2.0])))
    second_path, second = method.path["theta"].clone(), made.theta.detach().clone()
    method.end_task_("b", [], view)
    later = (omega + second_path / ((second - first).square() + 0.1)).clamp(min=0)
    assert torch.allclose(method.wells[0].importance["theta"], later)
    assert torch.equal(method.wells[0].centre["theta"], second)
    # negative control: what only the second task gave is less
    assert (later > 1.2 * (second_path / ((second - first).square() + 0.1))).all()


def test_its_own_penalty_is_no_part_of_the_path() -> None:
    method, made, view = start(strength=100.0, damping=0.1)
    learn_(method, view, 50, 0.01)
    method.end_task_("a", [], view)
    method.begin_task_("b", view)
    there = made.theta.detach().clone()
    with torch.no_grad():
        made.theta += 1.0  # where the penalty pulls hard
    away = made.theta.detach().clone()
    step_(method, view, 0.001, terms=[Term("bowl", 1.0, Bowl())], experience=NOTHING)
    moved = made.theta.detach() - away
    loss_gradient = CURVES * (away - TARGET)
    assert torch.allclose(method.path["theta"], -loss_gradient * moved, rtol=1e-3)
    pull = 200.0 * method.wells[0].importance["theta"] * (away - there)  # negative control: with it, it is far more
    assert ((loss_gradient + pull).abs() > 5 * loss_gradient.abs()).all()


def test_several_steps_of_one_update_and_a_step_scaled_back() -> None:
    """The learner steps twice, then the trust region takes half of the whole back: the path ends where θ does."""
    method, made, view = start()
    bowl, before = Bowl(), {"theta": made.theta.detach().clone()}
    seen: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):
        made.theta.grad = bowl.curves * (made.theta.detach() - bowl.target)
        seen.append((made.theta.detach().clone(), made.theta.grad.clone()))
        method.project_(view)
        with torch.no_grad():
            made.theta -= 0.1 * made.theta.grad
    with torch.no_grad():
        made.theta.copy_(torch.lerp(before["theta"], made.theta, 0.5))
    method.after_step_(before, {"theta": seen[-1][1]}, view)
    (a, g), (b, h) = seen
    assert torch.allclose(method.path["theta"], -(g * (b - a) + h * (made.theta.detach() - b)))


def test_numbers_that_made_the_loss_worse_have_no_importance() -> None:
    method, made, view = start()
    made.theta.grad = torch.tensor([1.0, -1.0])
    method.project_(view)
    with torch.no_grad():
        made.theta += torch.tensor([0.5, 0.5])  # against the gradient for the first, along it for the second
    method.after_step_({}, {}, view)
    method.end_task_("a", [], view)
    importance = method.wells[0].importance["theta"]
    assert importance[0] == 0
    assert importance[1] == pytest.approx(0.5 / (0.25 + 1e-3))


def test_state_goes_through_a_checkpoint_in_the_middle_of_a_task() -> None:
    method, made, view = start()
    learn_(method, view, 20, 0.05)
    method.end_task_("a", [], view)
    learn_(method, view, 5, 0.05, Bowl(target=torch.zeros(2)))
    other, here = round_trip(method, SI), made.coordinates()
    found: list[Mapping[str, Tensor]] = []
    for each in (method, other):
        made.load_coordinates_(here)
        learn_(each, view, 5, 0.05, Bowl(target=torch.zeros(2)))
        each.end_task_("b", [], view)
        found.append(each.tensors())
    assert same_tensors(*found)
    assert method.cost().stored_bytes == 4 * 8


def test_a_step_that_failed_leaves_no_trace() -> None:
    method, made, view = start()
    learn_(method, view, 3, 0.05)
    saved, state = {name: tensor.clone() for name, tensor in method.tensors().items()}, method.state()
    made.theta.grad = torch.ones(2)
    method.project_(view)
    method.load_state_(state)
    method.load_tensors_(saved)
    with torch.no_grad():
        made.theta += 5.0
    method.after_step_({}, {}, view)
    assert same_tensors(method.tensors(), saved)


def test_before_the_first_task_ends_it_changes_nothing() -> None:
    method, _, view = start()
    plain, held = (gradient(terms, NOTHING, view.student) for terms in (view.terms, [*view.terms, *method.terms()]))
    assert torch.equal(plain, held)


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"damping": 0.0}])
def test_bad_arguments_are_refused(wrong: dict) -> None:
    with pytest.raises(FeatclError, match=next(iter(wrong))):
        SI(**wrong)
