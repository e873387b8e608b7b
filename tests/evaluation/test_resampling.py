"""R resampled by item: the same numbers as the matrix, pairs that stay pairs, and limits that cover."""

from __future__ import annotations

import numpy as np
import pytest

from featcl.errors import FeatclError
from featcl.evaluation.matrix import ScoreMatrix
from featcl.evaluation.metrics import FORMULAS, metric_arrays
from featcl.evaluation.resampling import metric_intervals, resample

# Shares of right answers of a run: three tasks and a column of general ability.
SHARES = np.array([[0.1, 0.1, 0.1, 0.95], [0.9, 0.2, 0.1, 0.8], [0.7, 0.85, 0.2, 0.8], [0.6, 0.7, 0.9, 0.7]])


def drawn_matrix(shares: np.ndarray, *, items: int = 48, seed: int = 0) -> ScoreMatrix:
    rng = np.random.default_rng(seed)
    columns = tuple("abcdefgh"[: shares.shape[1]])
    right = (rng.random((*shares.shape, items)) < shares[..., None]).astype(float)
    made = {c: {f"{c}{n}": tuple(right[:, j, n]) for n in range(items)} for j, c in enumerate(columns)}
    return ScoreMatrix(columns, len(shares) - 1, "accuracy", ("base", *columns[: len(shares) - 1]), made)


def test_every_metric_is_that_of_the_matrix_and_lies_within_its_limits() -> None:
    matrix = drawn_matrix(SHARES)
    found = metric_intervals(matrix, reference=[0.9, 0.9, 0.9], resamples=300)
    assert set(found) == set(FORMULAS)
    for name, interval in found.items():
        assert interval.value == getattr(matrix.metrics(reference=[0.9, 0.9, 0.9]), name)
        assert interval.low < interval.value < interval.high, name
    assert found == metric_intervals(matrix, reference=[0.9, 0.9, 0.9], resamples=300)


def test_limits_cover_the_true_numbers_as_often_as_they_say() -> None:
    truth = {name: float(value) for name, value in metric_arrays(SHARES).items()}
    names = ("acc", "bwt", "forgetting_max_past", "general_change", "first_task_survival")
    inside = dict.fromkeys(names, 0)
    for seed in range(100):
        found = metric_intervals(drawn_matrix(SHARES, seed=seed), resamples=200, seed=seed)
        for name in names:
            inside[name] += truth[name] in found[name]
    assert all(88 <= count <= 100 for count in inside.values()), inside


def test_more_items_narrow_the_limits_by_their_square_root() -> None:
    few, many = (metric_intervals(drawn_matrix(SHARES, items=n), resamples=400)["acc"] for n in (50, 800))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4.0, rel=0.2)


def test_a_reference_on_the_same_items_stays_paired_whatever_the_order_of_its_items() -> None:
    matrix = drawn_matrix(SHARES)
    turned = {column: dict(reversed(list(items.items()))) for column, items in matrix.items.items()}
    same = ScoreMatrix(matrix.columns, 3, "accuracy", matrix.rows, turned)
    drawn = resample(matrix, references={"joint": same}, resamples=100)
    assert drawn.rows == ("base", "a", "b", "c", "joint")
    gap = drawn.interval(lambda cells: cells[..., 3, 0] - cells[..., 4, 0])
    assert (gap.low, gap.value, gap.high) == (0, 0, 0)
    other = resample(matrix, references={"joint": drawn_matrix(SHARES, seed=1)}, resamples=100)
    wide = other.interval(lambda cells: cells[..., 3, 0] - cells[..., 4, 0])
    assert wide.high - wide.low > 0.1  # a model that answers otherwise


def test_a_task_learned_alone_counts_as_it_was_just_after() -> None:
    matrix, alone = drawn_matrix(SHARES), drawn_matrix(SHARES, seed=3)
    drawn = resample(matrix, references={"single": alone, "rival": alone}, resamples=10)
    np.testing.assert_allclose(drawn.values[4, :3], np.diag(alone.values[1:, :3]))
    np.testing.assert_allclose(drawn.values[5], alone.values[-1])


def test_what_a_reference_does_not_have_is_unknown() -> None:
    matrix = drawn_matrix(SHARES)
    part = ScoreMatrix(("a",), 1, "accuracy", matrix.rows, {"a": matrix.items["a"]})
    drawn = resample(matrix, references={"joint": part}, resamples=10)
    assert np.isnan(drawn.values[4, 1:]).all()
    assert np.isnan(drawn.samples[:, 4, 1:]).all()
    assert drawn.values[4, 0] == matrix.values[-1, 0]


def test_other_items_or_another_measure_are_refused() -> None:
    matrix = drawn_matrix(SHARES)
    with pytest.raises(FeatclError, match="'joint' has other items in 'a': 'a47' is only in this run"):
        resample(matrix, references={"joint": drawn_matrix(SHARES, items=47)})
    nll = ScoreMatrix(matrix.columns, 3, "nll", matrix.rows, matrix.items)
    with pytest.raises(FeatclError, match="holds nll, this run accuracy"):
        resample(matrix, references={"joint": nll})
    assert resample(nll, resamples=5).values[0, 3] == -matrix.values[0, 3]  # higher is better
