"""Paired statistics against published implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featcl.errors import FeatclError
from featcl.evaluation.paired import chance_adjusted, compare_items, count_flips, mcnemar_exact


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (5, 5), (2, 11), (59, 6), (300, 250), (5000, 5200)])
def test_the_exact_test_is_that_of_statsmodels(b: int, c: int) -> None:
    reference = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    expected = 1.0 if b == c == 0 else reference.mcnemar([[10, b], [c, 10]], exact=True).pvalue
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


def test_hand_computed_tails() -> None:
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_exact(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar_exact(500_000, 0) == 0.0
    with pytest.raises(FeatclError, match="not negative"):
        mcnemar_exact(-1, 2)


def test_two_models_on_the_same_items() -> None:
    before, after = np.array([1.0] * 8 + [0.0] * 2), np.array([1.0] * 3 + [0.0] * 5 + [1.0, 0.0])
    found = compare_items(before, after)
    assert (found.items, found.right_to_wrong, found.wrong_to_right) == (10, 5, 1)
    assert found.difference.value == pytest.approx(-0.4)
    assert found.p_value == mcnemar_exact(5, 1)
    assert found.difference.low < -0.4 < found.difference.high


def test_pairing_finds_what_two_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.5).astype(float)
    after = before.copy()
    after[rng.choice(np.flatnonzero(before == 1), 20, replace=False)] = 0.0
    assert compare_items(before, after).difference.high < 0
    unpaired = compare_items(before, rng.permutation(after)).difference
    assert unpaired.low < 0 < unpaired.high


def test_items_that_one_was_not_asked_leave_the_pairs() -> None:
    before, after = np.array([1.0, math.nan, 1.0]), np.array([0.0, 1.0, math.nan])
    found = compare_items(before, after)
    assert (found.items, found.right_to_wrong, found.difference.value) == (1, 1, -1.0)
    counts = count_flips(before, after)
    assert (int(counts.unknown), int(counts.unchanged)) == (2, 0)


def test_numbers_that_are_not_right_or_wrong_have_no_exact_test() -> None:
    found = compare_items(np.array([0.2, 0.9]), np.array([0.3, 0.5]))
    assert math.isnan(found.p_value)
    assert (found.right_to_wrong, found.wrong_to_right) == (1, 1)
    with pytest.raises(FeatclError, match="same items"):
        count_flips(np.zeros(2), np.zeros(3))


scores = arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.sampled_from([0.0, 1.0, math.nan]))


@settings(deadline=None)
@given(scores, st.data())
def test_many_pairs_at_once_are_each_as_alone_and_every_item_is_somewhere(before: np.ndarray, data) -> None:
    after = data.draw(arrays(float, before.shape, elements=st.sampled_from([0.0, 1.0, math.nan])))
    together = count_flips(before, after)
    total = together.right_to_wrong + together.wrong_to_right + together.unchanged + together.unknown
    assert (total == before.shape[1]).all()
    order = data.draw(st.permutations(range(before.shape[1])))
    for place in range(len(before)):
        alone = count_flips(before[place][order], after[place][order])
        assert alone.right_to_wrong == together.right_to_wrong[place]
        back = count_flips(after[place], before[place])
        assert back.wrong_to_right == together.right_to_wrong[place]


def test_guessing_is_nothing_and_all_right_is_one() -> None:
    np.testing.assert_allclose(chance_adjusted([0.25, 1.0, 0.0, 0.625], 0.25), [0.0, 1.0, -1 / 3, 0.5])
    assert np.isnan(chance_adjusted([0.5], [math.nan])).all()
    with pytest.raises(FeatclError, match="below 1"):
        chance_adjusted([0.5], 1.0)


def test_a_guesser_scores_zero_on_average_whatever_the_options() -> None:
    rng = np.random.default_rng(0)
    options = rng.integers(2, 6, size=20_000)
    right = (rng.random(20_000) < 1 / options).astype(float)
    assert chance_adjusted(right, 1 / options).mean() == pytest.approx(0.0, abs=0.02)
    assert right.mean() > 0.25
