"""Composition, discrimination and transfer against hand-computed values, and what must hold for all scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcl.errors import FeatclError
from featcl.evaluation.composition import (
    composition_gap,
    cross_task_discrimination,
    gain_share,
    naming_gain,
    ratio_to,
)
from featcl.evaluation.relations import Claims, Relations

shares = st.floats(0, 1)


def test_the_gap_by_hand() -> None:
    assert composition_gap(0.5, [0.8, 0.9]) == pytest.approx(0.5 - 0.72)
    assert composition_gap(0.5, [0.8, 0.9, 0.5]) == pytest.approx(0.5 - 0.36)
    with pytest.raises(FeatclError, match="at least two parts"):
        composition_gap(0.5, [0.8])


def test_parts_that_fail_independently_leave_no_gap_and_parts_that_fail_together_a_positive_one() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 50_000)) < np.array([[0.8], [0.6]])
    assert composition_gap((a & b).mean(), [a.mean(), b.mean()]) == pytest.approx(0.0, abs=0.01)
    assert composition_gap((a & a).mean(), [a.mean(), a.mean()]) > 0.1
    assert composition_gap(0.0, [a.mean(), b.mean()]) < -0.4  # they are there and do not come together


@settings(deadline=None)
@given(shares, shares, shares)
def test_the_gap_is_bounded_and_perfect_parts_make_it_the_error(whole: float, a: float, b: float) -> None:
    assert -1 <= composition_gap(whole, [a, b]) <= 1
    assert composition_gap(whole, [1.0, 1.0]) == pytest.approx(whole - 1)
    assert composition_gap(whole, [a, b]) == pytest.approx(composition_gap(whole, [b, a]))


def test_many_scores_at_once() -> None:
    whole, parts = np.array([0.5, 0.2]), [np.array([0.5, 0.4]), np.array([1.0, 0.5])]
    np.testing.assert_allclose(composition_gap(whole, parts), [0.0, 0.0])
    np.testing.assert_allclose(cross_task_discrimination(whole, parts), [-0.25, -0.25])


def test_knowing_each_task_is_not_knowing_which() -> None:
    assert cross_task_discrimination(0.5, [1.0, 0.9]) == pytest.approx(-0.45)
    assert cross_task_discrimination(0.95, [1.0, 0.9]) == pytest.approx(0.0)
    with pytest.raises(FeatclError, match="within the tasks"):
        cross_task_discrimination(0.5, [])


def test_ratios_and_shares_of_a_gain() -> None:
    assert ratio_to(0.3, 0.6) == pytest.approx(0.5)
    assert math.isnan(ratio_to(0.3, 0.0))
    assert gain_share(0.5, 0.1, 0.9) == pytest.approx(0.5)
    assert gain_share(0.0, 0.1, 0.9) < 0  # what the base could do was lost
    assert math.isnan(gain_share(0.5, 0.9, 0.9))
    assert naming_gain(0.8, 0.5) == pytest.approx(0.3)


RELATIONS = {
    "composed": {"both": ["a", "b"]},
    "named": {"both_named": "both"},
    "across": {"across": ["a", "b"]},
    "related": [["a", "b"]],
    "contradicts": {"b": "a"},
    "claims": {"row": "b", "items": {"a": ["a1"]}},
}


def test_relations_come_back_from_json() -> None:
    relations = Relations.from_dict(RELATIONS)
    assert relations.composed["both"] == ("a", "b")
    assert relations.claims == Claims("b", {"a": ("a1",)})
    assert relations.to_dict() == RELATIONS
    assert Relations.from_dict({}).to_dict() == {}
    relations.check(["a", "b", "both", "both_named", "across"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"compose": {}}, "unknown key 'compose'; did you mean 'composed'"),
        ({"composed": {"both": "a"}}, "stands alone"),
        ({"claims": {"items": {}}}, "KeyError: 'row'"),
        ({"related": 3}, "has not its form"),
    ],
)
def test_relations_of_another_form_are_refused(data: dict, words: str) -> None:
    with pytest.raises(FeatclError, match=words):
        Relations.from_dict(data)


def test_a_relation_of_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(FeatclError, match="'both_named' is no column"):
        Relations.from_dict(RELATIONS).check(["a", "b", "both", "across"])
