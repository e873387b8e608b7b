"""Metrics against hand-computed values, and what must hold for every matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featcl.errors import FeatclError
from featcl.evaluation.metrics import FORMULAS, column_forgetting, known_mean, metric_arrays, stream_metrics

NAN = math.nan

# Three formulas of "forgetting" on one matrix. Task 1 dips after it was learned and comes back higher; task 2 rises.
DISAGREEING = [
    [0, 0, 0],
    [40, 0, 0],
    [70, 60, 0],
    [80, 70, 50],
]
# A matrix in the middle of life: task 1 was best in the base model, task 2 peaks before it is trained.
MIXED = [
    [0.9, 0.1, 0.2, 0.95],
    [0.8, 0.7, 0.2, 0.85],
    [0.5, 0.6, 0.4, 0.75],
    [0.6, 0.3, 0.9, 0.70],
]


def test_three_formulas_of_forgetting_are_told_apart() -> None:
    metrics = stream_metrics(DISAGREEING)
    assert metrics.forgetting_mammoth == 0
    assert metrics.forgetting_avalanche == -25
    assert metrics.forgetting_chaudhry == -10
    assert metrics.bwt == 25


def test_golden_values_of_a_matrix_with_a_probe() -> None:
    metrics = stream_metrics(MIXED, reference=[0.9, 0.9, 0.8])
    expected = {
        "acc": (0.6 + 0.3 + 0.9) / 3,
        "bwt": ((0.6 - 0.8) + (0.3 - 0.6)) / 2,
        "fwt": ((0.7 - 0.1) + (0.4 - 0.2)) / 2,
        "forgetting_max_past": ((0.9 - 0.6) + (0.7 - 0.3)) / 2,
        "forgetting_chaudhry": ((0.8 - 0.6) + (0.7 - 0.3)) / 2,
        "forgetting_since_learned": ((0.8 - 0.6) + (0.6 - 0.3)) / 2,
        "forgetting_mammoth": ((0.8 - 0.6) + (0.7 - 0.3)) / 2,
        "forgetting_avalanche": ((0.8 - 0.6) + (0.6 - 0.3)) / 2,
        "learning_accuracy": (0.8 + 0.6 + 0.9) / 3,
        "intransigence": ((0.9 - 0.8) + (0.9 - 0.6) + (0.8 - 0.9)) / 3,
        "general_change": 0.70 - 0.95,
        "first_task_survival": 0.6 / 0.8,
    }
    assert set(expected) == set(FORMULAS)
    for name, value in expected.items():
        assert getattr(metrics, name) == pytest.approx(value, abs=1e-12), name
    assert (metrics.tasks, metrics.probes, metrics.missing) == (3, 1, 0)


def test_golden_values_of_lopez_paz_and_ranzato_on_two_tasks() -> None:
    metrics = stream_metrics([[0.5, 0.5], [0.9, 0.4], [0.6, 0.8]])
    assert (metrics.acc, metrics.bwt, metrics.fwt) == pytest.approx((0.7, -0.3, -0.1))


def gem(R: np.ndarray) -> dict[str, float]:
    """ACC, BWT and FWT as equations 2 to 4 of Lopez-Paz & Ranzato, term by term; R[i - 1] is their row i."""
    T = len(R) - 1
    acc = sum(R[T][j] for j in range(T)) / T
    bwt = sum(R[T][i] - R[i + 1][i] for i in range(T - 1)) / (T - 1)
    fwt = sum(R[i][i] - R[0][i] for i in range(1, T)) / (T - 1)
    return {"acc": acc, "bwt": bwt, "fwt": fwt}


def chaudhry(R: np.ndarray) -> float:
    """F_k of Chaudhry et al., equation 3: mean over j < k of max over l in 1..k-1 of a_{l,j} - a_{k,j}."""
    k = len(R) - 1
    return sum(max(R[row][j] - R[k][j] for row in range(1, k)) for j in range(k - 1)) / (k - 1)


def mammoth(R: np.ndarray) -> float:
    """As `forgetting` of mammoth's utils/metrics.py: the last row is among those of which it takes the maximum."""
    rows = np.array(R)[1:]
    return float(np.mean([rows[:, j].max() - rows[-1, j] for j in range(len(rows) - 1)]))


def avalanche(R: np.ndarray) -> float:
    """As Avalanche's StreamForgetting: for each experience but the last, first score after it minus last score."""
    T = len(R) - 1
    return float(np.mean([R[j + 1][j] - R[T][j] for j in range(T - 1)]))


def test_a_negative_score_has_no_share_that_survives() -> None:
    assert math.isnan(stream_metrics([[-5.0, -5.0], [-2.0, -4.0], [-3.0, -1.0]]).first_task_survival)
    assert stream_metrics([[0.0, 0.0], [0.5, 0.0], [0.25, 0.5]]).first_task_survival == 0.5


def test_one_task_has_no_past_to_forget() -> None:
    metrics = stream_metrics([[0.1, 1.0, 0.8], [0.7, 0.6, 0.6]])
    assert (metrics.acc, metrics.learning_accuracy) == (0.7, 0.7)
    assert metrics.general_change == pytest.approx(-0.3)
    for name in ("bwt", "fwt", "forgetting_max_past", "forgetting_chaudhry", "intransigence"):
        assert math.isnan(getattr(metrics, name)), name


def test_a_missing_cell_takes_only_its_task_out_of_the_mean() -> None:
    broken = [row[:] for row in MIXED]
    broken[3][0] = NAN
    metrics = stream_metrics(broken)
    assert metrics.acc == pytest.approx((0.3 + 0.9) / 2)
    assert metrics.forgetting_max_past == pytest.approx(0.7 - 0.3)
    assert metrics.missing == 1
    without_row = stream_metrics([MIXED[0], [None] * 4, *MIXED[2:]])
    assert without_row.forgetting_max_past == pytest.approx(((0.9 - 0.6) + (0.6 - 0.3)) / 2)
    assert math.isnan(without_row.first_task_survival)


def test_the_matrix_is_not_changed() -> None:
    scores = np.array(MIXED)
    before = scores.copy()
    stream_metrics(scores, reference=np.ones(3))
    np.testing.assert_array_equal(scores, before)


def test_forgetting_per_column_counts_probes_and_every_earlier_row() -> None:
    np.testing.assert_allclose(column_forgetting(MIXED, 3), [0.3, 0.4, -0.5, 0.25])
    assert np.isnan(column_forgetting(MIXED, 0)).all()


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ([[1.0, 0.0]], "base model's row"),
        ([0.1, 0.2], "rows and columns"),
        ([[0.0], [0.1], [0.2]], "2 trained tasks but 1 columns"),
        ([[0.0, 0.1], [0.2]], "equal length"),
    ],
)
def test_a_matrix_of_the_wrong_form_is_refused(matrix: list, words: str) -> None:
    with pytest.raises(FeatclError, match=words):
        stream_metrics(matrix)


def test_a_short_reference_is_refused() -> None:
    with pytest.raises(FeatclError, match="3 tasks"):
        stream_metrics(MIXED, reference=[0.9])


matrices = st.tuples(st.integers(2, 6), st.integers(0, 3)).flatmap(
    lambda size: arrays(float, (size[0] + 1, size[0] + size[1]), elements=st.floats(0, 1, width=16))
)


@settings(deadline=None)
@given(matrices)
def test_bounds_and_order_of_the_formulas(scores: np.ndarray) -> None:
    metrics = stream_metrics(scores)
    assert 0 <= metrics.acc <= 1
    assert -1 <= metrics.bwt <= 1
    slack = 1e-12
    assert metrics.forgetting_max_past >= metrics.forgetting_chaudhry - slack
    assert metrics.forgetting_chaudhry >= metrics.forgetting_since_learned - slack
    assert metrics.forgetting_since_learned >= metrics.forgetting_avalanche - slack
    assert metrics.forgetting_mammoth >= max(0.0, metrics.forgetting_chaudhry) - slack


@settings(deadline=None)
@given(matrices, st.floats(-2, 2, width=16))
def test_a_constant_shift_moves_levels_and_no_difference(scores: np.ndarray, shift: float) -> None:
    before, after = stream_metrics(scores), stream_metrics(scores + shift)
    for name in ("bwt", "fwt", "forgetting_max_past", "forgetting_chaudhry", "forgetting_mammoth", "general_change"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-9, nan_ok=True), name
    assert after.acc == pytest.approx(before.acc + shift, abs=1e-9)
    assert after.learning_accuracy == pytest.approx(before.learning_accuracy + shift, abs=1e-9)


@settings(deadline=None)
@given(matrices)
def test_a_model_that_never_changes_forgets_nothing(scores: np.ndarray) -> None:
    metrics = stream_metrics(np.repeat(scores[:1], len(scores), axis=0))
    assert metrics.forgetting_max_past == metrics.forgetting_mammoth == metrics.bwt == metrics.fwt == 0


@settings(deadline=None)
@given(matrices)
def test_the_published_definitions_term_by_term(scores: np.ndarray) -> None:
    metrics = stream_metrics(scores)
    for name, value in gem(scores).items():
        assert getattr(metrics, name) == pytest.approx(value, abs=1e-12), name
    assert metrics.forgetting_chaudhry == pytest.approx(chaudhry(scores), abs=1e-12)
    assert metrics.forgetting_mammoth == pytest.approx(mammoth(scores), abs=1e-12)
    assert metrics.forgetting_avalanche == pytest.approx(avalanche(scores), abs=1e-12)


@settings(deadline=None)
@given(matrices, st.data())
def test_many_matrices_at_once_are_each_as_alone_missing_cells_included(scores: np.ndarray, data) -> None:
    holes = data.draw(arrays(bool, (3, *scores.shape)))
    stack = np.where(holes, np.nan, np.stack([scores, scores[::-1], scores * 0.5]))
    reference = np.linspace(0.2, 0.9, len(scores) - 1)
    together = metric_arrays(stack, reference=reference)
    for place, alone in enumerate(stack):
        one = stream_metrics(alone, reference=reference)
        for name, values in together.items():
            assert values[place] == pytest.approx(getattr(one, name), abs=1e-12, nan_ok=True), name
        assert one.missing == holes[place].sum()


@settings(deadline=None)
@given(matrices, st.randoms())
def test_probes_in_another_order_change_nothing_and_tasks_do(scores: np.ndarray, random) -> None:
    n_tasks = len(scores) - 1
    probes = list(range(n_tasks, scores.shape[1]))
    random.shuffle(probes)
    moved = stream_metrics(scores[:, [*range(n_tasks), *probes]])
    for name in FORMULAS:
        assert getattr(moved, name) == pytest.approx(getattr(stream_metrics(scores), name), abs=1e-12, nan_ok=True)
    swapped = [[1, 0, *range(2, 3)][j] for j in range(3)]
    assert stream_metrics(np.array(MIXED)[:, [*swapped, 3]]).bwt != stream_metrics(MIXED).bwt  # so this is no accident


def test_a_mean_of_nothing_is_unknown_and_of_something_leaves_out_the_rest() -> None:
    np.testing.assert_array_equal(known_mean(np.array([[NAN, NAN], [1.0, NAN], [1.0, 0.0]])), [NAN, 1.0, 0.5])
