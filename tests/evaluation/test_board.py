"""What is scored after every task, against scoring it piece by piece."""

from __future__ import annotations

import numpy as np
import pytest

from featcl.errors import FeatclError
from featcl.evaluation import ScoreMatrix, heldout_nll
from featcl.evaluation.board import GradedBoard, LikelihoodBoard, without_columns
from featcl.features.provenance import text_blocks
from featcl.lab.items import Item
from featcl.streams import Chat


def items(task: str, n: int) -> list[Item]:
    return [Item(f"{task}/{i}", task, ({"role": "user", "content": f"{task} {i}?"},), f"{i}") for i in range(n)]


def test_graded_columns(tiny) -> None:
    model, tokenizer = tiny("olmo2")
    scores = GradedBoard(Chat(tokenizer), {"a": items("a", 3), "empty": [], "b": items("b", 2)}).score(model)
    assert {column: list(found) for column, found in scores.items()} == {
        "a": ["a/0", "a/1", "a/2"],
        "b": ["b/0", "b/1"],
    }
    assert {value for found in scores.values() for value in found.values()} <= {0.0, 1.0}
    with pytest.raises(FeatclError, match="'a/0' occurs twice"):
        GradedBoard(Chat(tokenizer), {"a": [*items("a", 1), *items("a", 1)]})


def test_likelihood_columns_are_means_over_the_tokens_of_all_windows(tiny) -> None:
    model, tokenizer = tiny("olmo2")
    chat = Chat(tokenizer)
    short, long = chat.encode_text("abc"), chat.encode_text("a much longer text than that")
    scores = LikelihoodBoard({"x": {"both": [short, long], "one": [short]}, "y": {"long": [long]}}).score(model)
    nll = heldout_nll(model, [short, long])
    sizes = [sum(window.loss_mask) for window in (short, long)]
    assert scores["x"]["one"] == pytest.approx(nll[0], rel=1e-5)
    assert scores["y"]["long"] == pytest.approx(nll[1], rel=1e-5)
    assert scores["x"]["both"] == pytest.approx(np.average(nll, weights=sizes), rel=1e-5)
    with pytest.raises(FeatclError, match="nothing is held out"):
        LikelihoodBoard({"x": {}})


def test_columns_left_out_do_not_count_as_general_ability() -> None:
    matrix = ScoreMatrix(("task", "probe", "general"), 1)
    matrix = matrix.with_row("base", {"task": {"t": 0.0}, "probe": {"p": 0.0}, "general": {"g": 1.0}})
    matrix = matrix.with_row("task", {"task": {"t": 1.0}, "probe": {"p": 1.0}, "general": {"g": 0.0}})
    assert matrix.metrics().general_change == 0.0, "negative control: a gain on the probe hides the loss"
    assert without_columns(matrix, ["probe"]).metrics().general_change == -1.0


def test_blocks_are_whole_lines_and_lose_nothing() -> None:
    text = "\n".join(f"line {i} " + "x" * (i % 90) for i in range(300))
    blocks = text_blocks(text)
    assert "\n".join(blocks) == text
    assert all(len(block) < 1200 + 120 for block in blocks)
    assert len(blocks) > 5
