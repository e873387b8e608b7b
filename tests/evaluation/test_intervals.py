"""Intervals against published implementations, and against what they promise: coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcl.errors import FeatclError
from featcl.evaluation.intervals import (
    Interval,
    block_bootstrap_mean,
    bootstrap_mean,
    resampled_interval,
    resampled_mean,
    resampled_means,
    wilson,
)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (10, 10), (81, 263), (1, 1)])
def test_a_share_has_the_interval_of_statsmodels(right: int, total: int) -> None:
    reference = pytest.importorskip("statsmodels.stats.proportion", reason="statsmodels is not installed")
    low, high = reference.proportion_confint(right, total, method="wilson")
    found = wilson(right, total)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_a_share_of_nothing_is_unknown_and_an_impossible_one_refused() -> None:
    assert math.isnan(wilson(0, 0).value)
    with pytest.raises(FeatclError, match="3 of 2"):
        wilson(3, 2)
    with pytest.raises(FeatclError, match="coverage"):
        wilson(1, 2, level=95)


def test_published_share_of_agresti_and_coull() -> None:
    """0 of 10: Wilson's limits are 0 and 0.278 (Brown, Cai & DasGupta 2001 and every table since)."""
    assert (round(wilson(0, 10).low, 3), round(wilson(0, 10).high, 3)) == (0.0, 0.278)


def covered(make, truth: float, runs: int = 300) -> float:
    return float(np.mean([truth in make(seed) for seed in range(runs)]))


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    def of_items(seed: int) -> Interval:
        return bootstrap_mean((np.random.default_rng(seed).random(60) < 0.7).astype(float), resamples=500, seed=seed)

    def of_numbers(seed: int) -> Interval:
        return bootstrap_mean(np.random.default_rng(seed).exponential(size=100), resamples=500, seed=seed)

    assert 0.90 <= covered(of_items, 0.7) <= 0.99
    assert 0.88 <= covered(of_numbers, 1.0) <= 0.99
    assert covered(of_items, 0.75) < 0.90  # another number it does not cover as often


def test_seeds_that_differ_widen_the_interval() -> None:
    """Five seeds with means of their own: drawing items alone would be sure of what another seed would not give."""

    def of_seeds(seed: int) -> Interval:
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=(5, 200))
        return bootstrap_mean(values, resamples=300, seed=seed)

    def of_items_alone(seed: int) -> Interval:
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=(5, 200))
        return bootstrap_mean(values.mean(axis=0), resamples=300, seed=seed)

    assert covered(of_seeds, 0.0, runs=200) > 0.75  # five seeds are few; a bootstrap of them is known to be too narrow
    assert covered(of_items_alone, 0.0, runs=200) < 0.2


def test_two_ways_to_draw_the_same_items_agree() -> None:
    values = (np.random.default_rng(0).random(200) < 0.3).astype(float)
    quick = resampled_mean(values, resamples=20_000, rng=np.random.default_rng(1))
    plain = resampled_means(values[None], resamples=20_000, rng=np.random.default_rng(2))[:, 0]
    assert quick.mean() == pytest.approx(plain.mean(), abs=1e-3)
    assert quick.std() == pytest.approx(plain.std(), rel=0.03)
    assert quick.std() == pytest.approx(values.std() / math.sqrt(200), rel=0.03)


def test_of_very_many_items_the_limit_is_as_good_as_drawing_them() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(6000) < 0.2
    rows = np.stack([first, first & (rng.random(6000) < 0.7), np.ones(6000), np.zeros(6000)]).astype(float)
    limit = resampled_means(rows, resamples=20_000, rng=np.random.default_rng(1))
    drawn = resampled_mean(rows[0], resamples=20_000, rng=np.random.default_rng(2))
    shares = [0.025, 0.5, 0.975]
    np.testing.assert_allclose(np.quantile(limit[:, 0], shares), np.quantile(drawn, shares), atol=3e-4)
    items = np.corrcoef(rows[0], rows[1])[0, 1]
    assert np.corrcoef(limit[:, 0], limit[:, 1])[0, 1] == pytest.approx(items, abs=0.02)  # rows stay paired
    assert (limit[:, 2] == 1).all()
    assert (limit[:, 3] == 0).all()
    assert np.corrcoef(limit[:, 0], rng.permutation(limit[:, 1]))[0, 1] == pytest.approx(0, abs=0.05)


def test_items_that_were_not_measured_are_left_out() -> None:
    values = np.array([1.0, math.nan, 0.0, math.nan])
    assert bootstrap_mean(values).value == 0.5
    assert math.isnan(bootstrap_mean(np.array([math.nan])).value)
    means = resampled_means(
        np.array([[1.0, math.nan, 1.0], [0.0, 0.0, 0.0]]), resamples=50, rng=np.random.default_rng(0)
    )
    assert set(means[~np.isnan(means[:, 0]), 0]) == {1.0}
    assert set(means[:, 1]) == {0.0}


def test_rows_are_resampled_together() -> None:
    items = (np.random.default_rng(0).random(50) < 0.5).astype(float)
    means = resampled_means(np.stack([items, 1 - items]), resamples=200, rng=np.random.default_rng(0))
    np.testing.assert_allclose(means.sum(axis=1), 1.0, atol=1e-6)
    assert means[:, 0].std() > 0.01


def test_neighbours_that_are_alike_make_the_interval_of_a_series_wider() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=3000)
    series = np.zeros(3000)
    for t in range(1, 3000):
        series[t] = 0.9 * series[t - 1] + noise[t]
    plain, blocks = bootstrap_mean(series), block_bootstrap_mean(series)
    assert blocks.high - blocks.low > 2 * (plain.high - plain.low)
    shuffled = block_bootstrap_mean(rng.permutation(series))
    assert shuffled.high - shuffled.low == pytest.approx(plain.high - plain.low, rel=0.25)


def test_the_correction_takes_out_part_of_what_resampling_adds() -> None:
    samples = np.random.default_rng(0).normal(loc=0.5, size=4000)  # resamples that all lie too high
    found = resampled_interval(0.0, samples)
    plain = np.quantile(samples, [0.025, 0.975])
    assert found.low < plain[0]
    assert found.high < plain[1]
    centred = resampled_interval(0.5, samples)
    assert (centred.low, centred.high) == pytest.approx(tuple(plain), abs=0.1)


def test_infinity_can_be_a_limit_and_not_a_number_is_left_out() -> None:
    found = resampled_interval(10.0, np.array([10.0] * 60 + [math.inf] * 30 + [math.nan] * 10))
    assert found.low == 10.0
    assert math.isinf(found.high)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=30), st.randoms(), st.floats(-2, 2))
def test_order_changes_nothing_and_a_shift_moves_the_limits(items: list[float], random, shift: float) -> None:
    values = np.array(items)
    found, moved = bootstrap_mean(values, resamples=200), bootstrap_mean(values + shift, resamples=200)
    random.shuffle(items)
    assert bootstrap_mean(np.array(items), resamples=200) == found
    assert min(items) <= found.low <= found.value <= found.high <= max(items)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-6)
