"""Scoring with methods: what stands in front is asked, each question by the adapter that answers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from featcl.evaluation.board import GradedBoard, Held, LikelihoodBoard
from featcl.evaluation.canaries import Canaries
from featcl.evaluation.scoring import ItemScorer, encode_item
from featcl.evaluation.segments import SegmentedAnswering, SegmentedBoard
from featcl.lab.items import Item
from featcl.streams import Chat
from tests.conftest import tiny_model, tiny_tokenizer

NOTE = {"role": "system", "content": "a note"}


class Answering:
    """Puts a note in front of what comes from `left`, and answers what comes from `right` with other weights."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.heard: list[str | None] = []

    def asked(self, messages: Sequence[Any], task: str | None = None) -> Sequence[Any]:
        return (NOTE, *messages) if task == "left" else messages

    def grouped(self, conversations: Sequence[Any], tasks: Sequence[str | None]) -> list[Any]:
        self.heard += tasks
        places = {key: tuple(p for p, task in enumerate(tasks) if (task == "right") == key) for key in (True, False)}
        return [(found, self._state(key)) for key, found in places.items() if found]

    @contextmanager
    def _state(self, other: bool) -> Iterator[None]:
        weight = self.model.lm_head.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(-1.0 if other else 1.0)
            yield
            weight.copy_(before)


class Same(Answering):
    """Has no say."""

    def asked(self, messages: Sequence[Any], task: str | None = None) -> Sequence[Any]:
        return messages

    def grouped(self, conversations: Sequence[Any], tasks: Sequence[str | None]) -> list[Any]:
        return [(tuple(range(len(tasks))), self._state(False))]


@pytest.fixture(scope="module")
def rig() -> tuple[Any, Chat]:
    return tiny_model("olmo2"), Chat(tiny_tokenizer("olmo2"))


def item(task: str, number: int) -> Item:
    return Item(f"{task}/{number}", task, ({"role": "user", "content": f"what is {number}?"},), str(number))


ITEMS = {task: [item(task, number) for number in range(3)] for task in ("left", "right", "general/facts")}


def likelihoods(chat: Chat) -> LikelihoodBoard:
    def held(each: Item) -> Held:
        return Held(
            each.messages, lambda asked: [encode_item(chat, Item(each.id, each.task, tuple(asked), each.answer))]
        )

    columns = {c: {i.id: [encode_item(chat, i)] for i in items} for c, items in ITEMS.items()}
    return LikelihoodBoard(columns, held={c: {i.id: held(i) for i in items} for c, items in ITEMS.items()})


def test_a_method_without_a_say_changes_no_number(rig: tuple[Any, Chat]) -> None:
    model, chat = rig
    flat = [each for items in ITEMS.values() for each in items]
    canaries = Canaries(model, chat, [*ITEMS["left"], *ITEMS["right"]], suites={"facts": ITEMS["general/facts"]})
    for score in (ItemScorer(chat, flat).score, GradedBoard(chat, ITEMS).score, likelihoods(chat).score,
                  canaries.score):  # fmt: skip
        assert score(model, Same(model)) == score(model)


def test_what_is_asked_and_who_answers(rig: tuple[Any, Chat]) -> None:
    model, chat = rig
    board, answering = likelihoods(chat), Answering(model)
    plain, found = board.score(model), board.score(model, answering)
    assert answering.heard == ["left"] * 3 + ["right"] * 3 + ["general/facts"] * 3, "the column it stands in"
    assert list(found) == list(plain)
    assert found["general/facts"] == pytest.approx(plain["general/facts"])
    noted = {
        each.id: [encode_item(chat, Item("x", "x", (NOTE, *each.messages), each.answer))] for each in ITEMS["left"]
    }
    assert found["left"] == pytest.approx(LikelihoodBoard({"left": noted}).score(model)["left"])
    assert found["left"] != pytest.approx(plain["left"]), "negative control"
    with answering._state(True):
        other = board.score(model)
    assert found["right"] == pytest.approx(other["right"])
    assert found["right"] != pytest.approx(plain["right"]), "negative control"
    assert board.score(model) == plain, "the block puts everything back"


def test_canaries_compare_with_the_base_that_saw_no_note(rig: tuple[Any, Chat]) -> None:
    model, chat = rig
    canaries = Canaries(model, chat, [*ITEMS["left"], *ITEMS["right"]], suites={"facts": ITEMS["general/facts"]})
    plain, found = canaries.score(model), canaries.score(model, Answering(model))
    assert plain.kl_to_base == {"tasks": 0.0, "general": 0.0}
    assert found.kl_to_base["tasks"] > 0.01
    assert found.kl_to_base["general"] == pytest.approx(0.0, abs=1e-6)
    board = likelihoods(chat).score(model, Answering(model))
    tokens = {c: [sum(encode_item(chat, i).loss_mask) for i in ITEMS[c]] for c in ("left", "right")}
    total = sum(n * s for c in tokens for n, s in zip(tokens[c], board[c].values(), strict=True))
    assert found.loss["tasks"] == pytest.approx(total / sum(map(sum, tokens.values())), rel=1e-5)


def test_segments_are_their_tasks_and_methods_hear_of_them(rig: tuple[Any, Chat]) -> None:
    model, chat = rig
    inner = likelihoods(chat)
    board = SegmentedBoard(inner, {"joint": ["left", "right"]})
    scores = board.score(model)
    assert scores["joint"] == {f"{c}/{i}": s for c in ("left", "right") for i, s in inner.score(model)[c].items()}
    assert board.targets("left/1") == inner.targets("left/1")
    answering = Answering(model)
    told = board.score(model, SegmentedAnswering(answering, {"left": "joint", "right": "joint"}))
    assert answering.heard == ["joint"] * 6 + ["general/facts"] * 3
    assert told["left"] == pytest.approx(scores["left"]), "nobody asks for the joint task's note"
