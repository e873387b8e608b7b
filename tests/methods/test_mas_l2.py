"""MAS and L2 to the start on two biased coins, by hand."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.l2 import L2ToStart
from featcl.methods.mas import MAS
from tests.methods.coins import Coins, experience_of, gradient, round_trip, same_tensors, view_of

THETA = (1.5, -2.0)


def test_sensitivity_is_that_of_the_squared_norm_of_the_logits() -> None:
    # logits after x are [0, θ_x], so ‖F‖² = Σ θ_x² and its gradient is 2 θ_x per target after x
    view = view_of(Coins(THETA))
    method = MAS()
    method.end_task_("a", [experience_of((0, 1, 0, 0)), experience_of((1, 1))], view)
    # first sequence: two targets after 0, one after 1; second: one after 1; four targets in all
    expected = [2 * 2 * 1.5 / 4, (2 * 2.0 + 2 * 2.0) / 4]
    assert method.wells[0].importance["theta"].tolist() == pytest.approx(expected, rel=1e-6)


def test_labels_do_not_matter_and_absolute_values_do() -> None:
    found = []
    for data in ((0, 1), (0, 0)):
        view, method = view_of(Coins(THETA)), MAS()
        method.end_task_("a", [experience_of(data)], view)
        found.append(method.wells[0].importance["theta"])
    assert torch.equal(*found)
    assert found[0][0] == pytest.approx(3.0)
    view, method = view_of(Coins((-1.5, 0.0))), MAS()  # negative control: without the absolute value it would be -3
    method.end_task_("a", [experience_of((0, 1))], view)
    assert method.wells[0].importance["theta"][0] == pytest.approx(3.0)


def test_mas_adds_up_and_pulls_to_where_the_last_task_ended() -> None:
    made = Coins(THETA)
    view, method = view_of(made), MAS(strength=0.5)
    method.end_task_("a", [experience_of((0, 1))], view)
    with torch.no_grad():
        made.theta += 1.0
    method.end_task_("b", [experience_of((0, 1), (1, 1))], view)
    importance = [3.0 + 2.5, 1.0]
    assert method.wells[0].importance["theta"].tolist() == pytest.approx(importance, rel=1e-6)
    with torch.no_grad():
        made.theta += torch.tensor([2.0, 1.0])
    assert method.wells.penalty(view.student).item() == pytest.approx(4 * 5.5 + 1.0, rel=1e-6)
    here = experience_of((0, 1))
    plain, held = (gradient(terms, here, view.student) for terms in (view.terms, [*view.terms, *method.terms()]))
    assert (held - plain).tolist() == pytest.approx([0.5 * 2 * 5.5 * 2, 0.5 * 2 * 1.0], rel=1e-5)


def test_mas_goes_through_a_checkpoint() -> None:
    view, method = view_of(Coins(THETA)), MAS()
    method.end_task_("a", [experience_of((0, 1))], view)
    other = round_trip(method, MAS)
    for each in (method, other):
        each.end_task_("b", [experience_of((1, 0))], view)
    assert same_tensors(method.tensors(), other.tensors())
    assert other.cost() == method.cost()


@pytest.mark.parametrize(("start", "expected"), [("learning", 4.0 + 9.0), ("task", 1.0 + 4.0)])
def test_l2_is_the_squared_distance_to_the_start(start: str, expected: float) -> None:
    made = Coins(THETA)
    view, method = view_of(made), L2ToStart(strength=2.0, start=start)
    for task in ("a", "b"):
        method.begin_task_(task, view)
        with torch.no_grad():
            made.theta += torch.tensor([1.0, 1.0]) if task == "a" else torch.tensor([1.0, 2.0])
    assert method.wells.penalty(view.student).item() == pytest.approx(expected, rel=1e-6)
    here = experience_of((0, 1))
    plain, held = (gradient(terms, here, view.student) for terms in (view.terms, [*view.terms, *method.terms()]))
    away = made.theta.detach() - method.wells[0].centre["theta"]
    assert torch.allclose(held - plain, 2.0 * 2.0 * away)
    other = round_trip(method, lambda: L2ToStart(start=start))
    assert torch.equal(other.wells.penalty(view.student), method.wells.penalty(view.student))


@pytest.mark.parametrize("make", [lambda: MAS(strength=0), lambda: L2ToStart(start="base"), lambda: MAS(experiences=0)])
def test_bad_arguments_are_refused(make) -> None:
    with pytest.raises(FeatclError, match=r"strength|start|experiences"):
        make()
