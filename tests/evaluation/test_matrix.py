"""The score matrix: rows from items, flips, and the file it is kept in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcl.errors import FeatclError
from featcl.evaluation.itemscores import ItemScores
from featcl.evaluation.matrix import ScoreMatrix


def example() -> ScoreMatrix:
    matrix = ScoreMatrix(("a", "b", "general/facts"), n_tasks=2)
    matrix = matrix.with_row(
        "base", {"a": {"a1": 0, "a2": 0}, "b": {"b1": 0, "b2": 1}, "general/facts": {"g1": 1, "g2": 1}}
    )
    matrix = matrix.with_row(
        "a", {"a": {"a1": 1, "a2": 1}, "b": {"b1": 0, "b2": 1}, "general/facts": {"g1": 1, "g2": 0}}
    )
    return matrix.with_row("b", {"b": {"b1": 1, "b2": 1}, "a": {"a2": 1, "a1": 0}, "general/facts": {"g1": 0, "g2": 1}})


def test_values_are_means_of_items_and_feed_the_metrics() -> None:
    matrix = example()
    assert matrix.values.tolist() == [[0, 0.5, 1], [1, 0.5, 0.5], [0.5, 1, 0.5]]
    metrics = matrix.metrics()
    assert (metrics.acc, metrics.bwt, metrics.forgetting_max_past, metrics.general_change) == (0.75, -0.5, 0.5, -0.5)
    assert matrix.forgetting() == {"a": 0.5, "b": -0.5, "general/facts": 0.5}


def test_flips_name_the_items_that_a_mean_hides() -> None:
    facts = example().flips(1, 2)[2]
    assert (facts.right_to_wrong, facts.wrong_to_right, facts.unchanged) == (("g1",), ("g2",), 0)
    assert example().flips()[0].wrong_to_right == ("a2",)


def test_the_file_gives_the_matrix_back_and_is_written_the_same_way_twice(tmp_path: Path) -> None:
    matrix = example().with_row("c", {"a": {"a1": 0.25, "a2": math.nan}})
    matrix.save(tmp_path / "R.json")
    again = ScoreMatrix.load(tmp_path / "R.json")
    assert again.to_json() == matrix.to_json()
    again.save(tmp_path / "again.json")
    assert (tmp_path / "R.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert '"a1": [0, 1, 0, 0.25]' in (tmp_path / "R.json").read_text()
    assert json.loads((tmp_path / "R.json").read_text())["values"][3] == [0.25, None, None]


def test_metrics_before_the_stream_is_through_leave_out_what_was_not_trained() -> None:
    matrix = ScoreMatrix(("a", "b", "p"), n_tasks=2)
    for name, value in (("base", 0), ("a", 1)):
        matrix = matrix.with_row(name, {column: {column: value} for column in matrix.columns})
    assert (matrix.metrics().tasks, matrix.metrics().acc, matrix.metrics().probes) == (1, 1.0, 1)


def test_lower_is_better_for_a_log_likelihood_loss() -> None:
    matrix = ScoreMatrix(("a", "b"), n_tasks=2, measure="nll")
    for name, a, b in (("base", 5.0, 5.0), ("a", 2.0, 4.5), ("b", 3.0, 1.0)):
        matrix = matrix.with_row(name, {"a": {"w": a}, "b": {"w": b}})
    assert matrix.metrics().forgetting_max_past == pytest.approx(1.0)
    assert matrix.metrics().fwt == pytest.approx(0.5)
    assert matrix.forgetting()["a"] == pytest.approx(1.0)
    with pytest.raises(FeatclError, match="right or wrong"):
        matrix.flips()


@pytest.mark.parametrize("items", [{"a1": 1}, {"a1": 1, "a3": 1}, {"a1": 1, "a2": 1, "a3": 1}])
def test_rows_with_other_items_are_refused(items: dict[str, float]) -> None:
    with pytest.raises(FeatclError, match=r"row 'x' of R, column 'a': item 'a[23]' is (missing|new); every row"):
        example().with_row("x", {"a": items})


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(FeatclError, match="unknown column 'z'"):
        example().with_row("x", {"z": {"z1": 1}})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text[: len(text) // 2], "not a score matrix"),
        (lambda text: text.replace('"a1": [0, 1, 0]', '"a1": [0, 1]'), "2 scores for 3 rows"),
        (lambda text: text.replace('"a1": [0, 1, 0]', '"a1": [0, 1, 1]'), "not the means"),
        (lambda text: text.replace('"measure"', '"measures"'), "not a score matrix"),
        (lambda text: text.replace("[0, 0.5, 1],", "[0, 0.5],"), "not a score matrix"),
        (lambda text: text.replace('"a1": [0, 1, 0]', '"a1": [0, {}, 0]'), "number or null"),
        (lambda text: text.replace('"general/facts": {', '"general/fact": {'), "no column of R"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, edit, words: str) -> None:
    path = tmp_path / "R.json"
    example().save(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(FeatclError, match=words) as caught:
        ScoreMatrix.load(path)
    assert "R.json" in str(caught.value)


@settings(deadline=None)
@given(st.permutations(["a1", "a2"]))
def test_the_order_of_items_does_not_matter(order: list[str]) -> None:
    scores = {"a1": 0.0, "a2": 1.0}
    matrix = ScoreMatrix(("a",), n_tasks=1).with_row("base", {"a": {name: scores[name] for name in order}})
    matrix = matrix.with_row("a", {"a": {"a2": 1, "a1": 1}})
    assert matrix.values.tolist() == [[0.5], [1.0]]
    assert matrix.flips()[0].wrong_to_right == ("a1",)


def test_a_cell_that_is_missing_in_the_file_is_unknown_and_leaves_the_means(tmp_path: Path) -> None:
    path = tmp_path / "R.json"
    example().with_row("c", {"a": {"a1": 0, "a2": 1}, "general/facts": {"g1": 1, "g2": 1}}).save(path)
    assert '"values": [\n    [0, 0.5, 1],' in path.read_text()
    assert "[0.5, null, 1]" in path.read_text()
    values = ScoreMatrix.load(path).values
    assert math.isnan(values[3, 1])
    assert values[3, 0] == 0.5


def test_guessing_is_zero_where_its_chance_is_known() -> None:
    matrix = ScoreMatrix(("a", "b"), 1, chance={"a": 0.25}).with_row("base", {"a": {"x": 1, "y": 0}, "b": {"z": 1}})
    np.testing.assert_allclose(matrix.chance_adjusted, [[1 / 3, math.nan]])
    with pytest.raises(FeatclError, match="holds nll"):
        _ = ScoreMatrix(("a",), 1, "nll").with_row("base", {"a": {"x": 1}}).chance_adjusted
    with pytest.raises(FeatclError, match="'z' is no column"):
        ScoreMatrix(("a",), 1, chance={"z": 0.5})


def test_the_chance_is_kept_in_the_file(tmp_path: Path) -> None:
    matrix = ScoreMatrix(("a",), 1, chance={"a": 0.25}).with_row("base", {"a": {"x": 1}})
    matrix.save(tmp_path / "R.json")
    assert ScoreMatrix.load(tmp_path / "R.json").chance == {"a": 0.25}
    assert "chance" not in example().to_json()


def test_items_are_a_mapping_over_one_array() -> None:
    scores = example().scores("a")
    assert dict(scores) == {"a1": (0, 1, 0), "a2": (0, 1, 1)}
    assert scores.array.tolist() == [[0, 0], [1, 1], [0, 1]]
    with pytest.raises(ValueError, match="read-only"):
        scores.array[0, 0] = 1
    assert scores == example().scores("a")
    assert scores != example().scores("b")
    with pytest.raises(FeatclError, match="'x' occurs twice"):
        ItemScores(("x", "x"), np.zeros((1, 2)))


def test_a_column_that_is_first_asked_late_is_unknown_before() -> None:
    matrix = ScoreMatrix(("a", "b"), 1).with_row("base", {"a": {"x": 1}}).with_row("a", {"a": {"x": 1}, "b": {"y": 0}})
    assert matrix.items["b"]["y"][1] == 0
    assert math.isnan(matrix.items["b"]["y"][0])
