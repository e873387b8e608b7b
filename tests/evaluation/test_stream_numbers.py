"""Numbers of a score over a stream: online accuracy, code length, survival, data efficiency, contradiction, labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcl.errors import FeatclError
from featcl.evaluation.contradiction import recovery, resistance
from featcl.evaluation.curves import data_efficiency, experiences_to, survival_curve
from featcl.evaluation.labels import label_tasks
from featcl.evaluation.online import NLL, SCORE, code_length, online_accuracy, online_records

NAN, INF = math.nan, math.inf

# --- before each update


def test_online_accuracy_is_the_running_mean_of_what_was_right_before_learning_it() -> None:
    found = online_accuracy([0, 0, 1, NAN, 1], window=2)
    assert found.mean.value == 0.5
    assert found.so_far == pytest.approx((0, 0, 1 / 3, 1 / 3, 0.5))
    assert found.recent == (0, 0, 0.5, 1, 1)
    assert math.isnan(online_accuracy([NAN]).so_far[0])


def test_a_stream_of_coin_flips_costs_a_bit_each_and_one_that_is_learned_costs_less() -> None:
    """Krichevsky & Trofimov 1981: predicting (ones + 1/2) / (t + 1) costs at most log2(n)/2 + 1 bits above the best."""
    flips = code_length([math.log(2)] * 8, [1] * 8)
    assert (flips.bits, flips.tokens, flips.per_token) == pytest.approx((8.0, 8, 1.0))
    n = 64
    learned = code_length([-math.log((t + 0.5) / (t + 1)) for t in range(n)], [1] * n, base_nll=[math.log(2)] * n)
    assert learned.bits < math.log2(n) / 2 + 1
    assert learned.base_bits == pytest.approx(n)
    assert learned.saved == pytest.approx(1 - learned.bits / n)
    assert learned.so_far[-1] == pytest.approx(learned.bits)


def test_a_code_with_a_part_missing_is_refused() -> None:
    with pytest.raises(FeatclError, match="experience 1 costs nan"):
        code_length([1.0, NAN], [1, 1])
    with pytest.raises(FeatclError, match="tokens of 1"):
        code_length([1.0, 2.0], [1])
    with pytest.raises(FeatclError, match="base_nll"):
        code_length([1.0], [2], base_nll=[-1.0])


def test_what_records_hold_before_an_update() -> None:
    records = [{"kind": "update", SCORE: 1.0}, {"kind": "evaluation", SCORE: 0.0}, {"kind": "update", SCORE: None}]
    np.testing.assert_array_equal(online_records(records, SCORE), [1.0, NAN])
    assert online_records(records, NLL).size == 0


# --- survival


def test_survival_by_hand() -> None:
    rows = np.array([[0, 0, 0, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=float)
    found = survival_curve(rows, at=[0, 20, 40, 60])
    assert found.at == (20, 40, 60)
    assert found.items == 3
    assert found.score == (0.75, 0.75, 0.75)
    assert found.still_right == pytest.approx((1, 2 / 3, 2 / 3))  # what came back counts
    assert found.never_lost == pytest.approx((1, 2 / 3, 1 / 3))  # here it does not
    assert found.half_life == 60
    assert all(low <= share <= high for low, share, high in zip(found.low, found.never_lost, found.high, strict=True))


def test_what_decays_at_a_constant_rate_lives_as_long_as_that_rate_says() -> None:
    rng = np.random.default_rng(0)
    alive = np.cumprod(np.vstack([np.ones(4000), rng.random((30, 4000)) < 0.9]), axis=0)
    found = survival_curve(alive, learned=0, at=range(31))
    np.testing.assert_allclose(found.never_lost, 0.9 ** np.arange(31), atol=0.02)
    assert found.half_life == math.ceil(math.log(0.5) / math.log(0.9))
    assert math.isinf(survival_curve(np.ones((5, 10))).half_life)


def test_survival_needs_to_know_what_was_learned() -> None:
    assert math.isnan(survival_curve(np.zeros((3, 2))).half_life)
    with pytest.raises(FeatclError, match="lacks items"):
        survival_curve(np.array([[0.0], [NAN], [1.0]]))
    with pytest.raises(FeatclError, match="right or wrong"):
        survival_curve(np.array([[0.0], [0.5]]))
    with pytest.raises(FeatclError, match="no row 1"):
        survival_curve(np.zeros((1, 2)))
    assert survival_curve(np.array([[0.0], [1.0], [NAN], [1.0]])).at == (1, 3)  # a row not measured is left out


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 10), st.randoms(use_true_random=False))
def test_survival_never_rises_and_lies_under_what_is_still_right(rows: int, items: int, random) -> None:
    scores = np.array([[float(random.random() < 0.6) for _ in range(items)] for _ in range(rows + 1)])
    found = survival_curve(scores)
    if found.items:
        assert list(found.never_lost) == sorted(found.never_lost, reverse=True)
        assert all(a <= b + 1e-12 for a, b in zip(found.never_lost, found.still_right, strict=True))


# --- efficiency


def test_experiences_to_a_score_are_those_before_the_first_measurement_that_has_it() -> None:
    at = [0, 10, 20, 30]
    scores = np.array([[0.1, 0.5, 0.9, 0.8], [0.1, 0.1, 0.1, 0.1], [0.9, NAN, 0.0, 0.0], [0.1, NAN, 0.9, 1.0]])
    assert experiences_to(at, scores, target=0.8).tolist() == [20, INF, 0, 20]
    assert experiences_to(at, scores[0], target=0.0) == 0
    with pytest.raises(FeatclError, match="cannot fall"):
        experiences_to([0, 20, 10], np.zeros(3), target=0.5)
    with pytest.raises(FeatclError, match="3 places for 2"):
        experiences_to([0, 20, 30], np.zeros(2), target=0.5)


def test_half_the_experiences_are_twice_the_efficiency() -> None:
    assert data_efficiency(100, 200) == 2
    assert data_efficiency(INF, 200) == 0
    assert math.isinf(data_efficiency(100, INF))
    assert math.isnan(data_efficiency(INF, INF))


# --- contradiction


def test_recovery_counts_from_the_contradiction() -> None:
    at, scores = [0, 50, 100, 110, 120, 130], [0.1, 0.1, 0.2, 0.0, 0.75, 0.9]
    found = recovery(at, scores, contradicted=100, before=0.8)
    assert (found.lowest, found.experiences, found.final) == (0.0, 20, 0.9)
    assert found.recovered == pytest.approx(0.9 / 0.8)
    assert math.isinf(recovery(at, scores, contradicted=100, before=1.0, level=1.0).experiences)
    with pytest.raises(FeatclError, match="experience 200"):
        recovery(at, scores, contradicted=200, before=0.8)
    with pytest.raises(FeatclError, match="share of the score"):
        recovery(at, scores, contradicted=100, before=0.8, level=90)


def test_resistance_tells_claims_from_plain_forgetting() -> None:
    before = np.array([1] * 20 + [0] * 4, dtype=float)
    claimed = np.arange(24) % 2 == 0
    forgetful = before.copy()
    forgetful[:10] = 0  # half of all that was right, claimed or not
    gullible = np.where(claimed, 0.0, before)
    plain, taken_in = (resistance(before, after, claimed=claimed) for after in (forgetful, gullible))
    assert (plain.claimed.value, plain.others.value, plain.net.value) == (0.5, 0.5, 0.0)
    assert plain.net.low < 0 < plain.net.high
    assert (taken_in.claimed.value, taken_in.others.value, taken_in.net.value) == (0.0, 1.0, -1.0)
    adopted = resistance(before, gullible, claimed=claimed, adopted=claimed).adopted
    assert adopted.value == 1.0
    assert math.isnan(taken_in.adopted.value)


def test_resistance_of_nothing_is_unknown_and_shares_are_no_items() -> None:
    nothing = resistance(np.array([0.0, 1.0]), np.array([0.0, 1.0]), claimed=np.array([True, False]))
    assert math.isnan(nothing.claimed.value)
    assert math.isnan(nothing.net.value)
    with pytest.raises(FeatclError, match="right or wrong"):
        resistance(np.array([0.5]), np.array([1.0]), claimed=np.array([True]))
    with pytest.raises(FeatclError, match="one entry for each"):
        resistance(np.array([1.0]), np.array([1.0, 0.0]), claimed=np.array([True]))


# --- labels

ENDS = np.array(
    [
        [0.0, 0.0, 0.0, 1.0],
        [0.9, 0.0, 0.0, 1.0],  # learned, nothing lost
        [0.2, 0.9, 0.0, 0.9],  # learned, the first task lost
        [0.2, 0.9, 0.3, 0.9],  # not learned
    ]
)
NAMES = ("one", "two", "three", "general")


def test_each_task_is_ideal_forgetting_or_failed() -> None:
    found = label_tasks(ENDS, columns=NAMES, n_tasks=3, ceiling=1.0)
    assert [label.label for label in found] == ["ideal", "forgetting", "failed"]
    assert found[1].cost == pytest.approx((0.7 + 0.1) / 2)
    assert (found[1].worst, found[1].worst_cost) == ("one", pytest.approx(0.7))


def test_a_lower_ceiling_counts_less_as_learned() -> None:
    found = label_tasks(ENDS, columns=NAMES, n_tasks=3, ceiling=[1.0, 1.0, 0.35])
    assert found[2].label == "ideal"
    assert found[2].learned == pytest.approx(0.3 / 0.35)
    tolerant = label_tasks(ENDS, columns=NAMES, n_tasks=3, ceiling=1.0, tolerated=0.5)
    assert tolerant[1].label == "ideal"


def test_a_task_that_was_not_measured_has_no_label() -> None:
    values = ENDS.copy()
    values[2, 1] = NAN
    assert [label.task for label in label_tasks(values, columns=NAMES, n_tasks=3, ceiling=1.0)] == ["one", "three"]
    with pytest.raises(FeatclError, match="2 ceilings for 3"):
        label_tasks(ENDS, columns=NAMES, n_tasks=3, ceiling=[1.0, 1.0])


def test_the_first_task_alone_costs_nothing() -> None:
    [label] = label_tasks(np.array([[0.0], [1.0]]), columns=("one",), n_tasks=1, ceiling=1.0)
    assert (label.label, label.worst) == ("ideal", "")
    assert math.isnan(label.cost)
