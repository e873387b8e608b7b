"""Texts in front of the prompt: all that fits, and what the wiring of an outside method does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.in_context import InContext
from featcl.methods.outside import in_front
from featcl.methods.texts import Texts, pieces, question
from featcl.streams import Chat, Trajectory
from tests.conftest import tiny_tokenizer
from tests.methods.replaying import Bench, ask, reloaded, resumes, same_state

ASKED = [{"role": "user", "content": "what is number 3?"}]


def system_of(messages: Any) -> str:
    return messages[0]["content"] if messages[0]["role"] == "system" else ""


# --- what fits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmo2", "gemma2", "llama"])
@pytest.mark.parametrize("room", [20, 60, 61, 62, 63, 64, 200, 1000, 5000])
def test_as_many_texts_as_fit_and_not_one_more(family: str, room: int) -> None:
    chat = Chat(tiny_tokenizer(family))
    texts = [f"text {n} " + "x" * (n * 7 % 40) for n in range(40)]
    told = in_front(chat, ASKED, texts, room=room)
    lines = system_of(told).split("\n") if told is not ASKED else []
    assert lines == list(reversed(texts[: len(lines)]))  # the most wanted stands next to the question
    assert not lines or len(chat.prompt(told)) <= room
    if len(lines) < len(texts):
        more = chat.with_context(ASKED, "\n".join(reversed(texts[: len(lines) + 1])))
        assert len(chat.prompt(more)) > room
    else:
        assert room == 5000
    assert told[-1:] == ASKED


def test_nothing_to_say_leaves_the_messages_alone() -> None:
    chat = Chat(tiny_tokenizer())
    assert in_front(chat, ASKED, [], room=500) is ASKED
    assert in_front(chat, ASKED, ["much too long " * 50], room=100) is ASKED


# --- texts -------------------------------------------------------------------------------------------------------


def test_the_newest_different_texts_fit_the_budget() -> None:
    texts = Texts(budget_bytes=10, owner="x")
    for text in ("aaaa", "bbbb", "aaaa", "cc"):
        texts.add_([text], "t")
        assert texts.nbytes <= 10
    assert [each.text for each in texts.kept] == ["bbbb", "aaaa", "cc"]
    assert [each.number for each in texts.kept] == [1, 0, 2]  # one that comes again stays itself
    texts.add_(["ééé", ""], "t")  # six bytes
    assert [each.text for each in texts.kept] == ["cc", "ééé"]
    with pytest.raises(FeatclError, match="the budget is 10"):
        texts.add_(["x" * 11], "t")
    with pytest.raises(FeatclError, match="budget_bytes must be"):
        Texts(budget_bytes=0, owner="x")


def test_pieces_of_a_trajectory() -> None:
    talk = Trajectory(
        "t",
        messages=(
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "good day"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "hello"},
        ),
        feedback="too short",
        meta={"context": "a note"},
    )
    assert pieces(talk, "exchanges") == [
        "system: be kind\nuser: hi\nassistant: good day",
        "user: again\nassistant: hello",
    ]
    assert pieces(talk, "auto") == pieces(talk, "sentences") == ["a note"]
    spoken = Trajectory("s", text="One. Two!\nthree 1.5 six?")
    assert pieces(spoken, "sentences") == ["One.", "Two!", "three 1.5 six?"]
    plain = ["user: what is number 3?\nassistant: it is 1"]
    assert pieces(ask(3), "sentences") == pieces(ask(3), "exchanges") == plain
    assert pieces(talk, "feedback") == ["too short"]
    assert pieces(Trajectory("r", text="one\ntwo\n\nthree"), "exchanges") == ["one\ntwo", "three"]
    assert question(talk.messages) == "again"


# --- the method --------------------------------------------------------------------------------------------------


def test_weights_stand_still_and_the_context_holds_what_was_seen() -> None:
    bench, method = Bench(), InContext()
    start = bench.adapter.coordinates()
    assert method.context(ASKED, bench.view()) is ASKED
    for number in (3, 4):
        assert bench.observe(ask(number), method) == "in_context: kept outside the weights"
    assert all(torch.equal(start[name], now) for name, now in bench.adapter.coordinates().items())
    told = method.context(ASKED, bench.view())
    assert system_of(told) == (
        "user: what is number 3?\nassistant: it is 1\nuser: what is number 4?\nassistant: it is 8"
    )
    assert told[1:] == ASKED
    few = InContext(tokens=90)
    for number in (3, 4):
        bench.observe(ask(number), few)
    assert system_of(few.context(ASKED, bench.view())) == "user: what is number 4?\nassistant: it is 8"
    assert method.cost().stored_bytes == 2 * len("user: what is number 3?\nassistant: it is 1")


def test_beside_learning_it_stands_in_front_of_what_is_learned() -> None:
    bench, method = Bench(), InContext(frozen=False)
    assert bench.observe(ask(3), method) is None
    recorded = ask(4, token_ids=(1, 2, 3), logprobs=(0.0, 0.0, 0.0))
    learned = method.learned(recorded, bench.view())
    assert system_of(learned.messages).startswith("user: what is number 3?")
    assert (learned.token_ids, learned.logprobs, learned.id) == (None, None, "t4")
    raw = Trajectory("raw", text="some text")
    assert method.learned(raw, bench.view()) is raw
    plain = Bench()
    plain.observe(ask(3))
    plain.observe(ask(4))
    bench.observe(ask(4), method)
    name = next(iter(plain.adapter.coordinates()))
    assert not torch.equal(plain.adapter.coordinates()[name], bench.adapter.coordinates()[name])


def test_in_context_resumes_to_the_same_bits() -> None:
    assert resumes(lambda: InContext(frozen=False, budget_bytes=120), [ask(n) for n in range(6)], cut=4)
    bench, method = Bench(), InContext()
    bench.observe(ask(1), method)
    assert same_state(method, reloaded(method, InContext()))
    assert not same_state(method, InContext())


def test_bad_settings_are_refused() -> None:
    for given, message in (({"form": "turns"}, "form 'turns'"), ({"budget_bytes": 0}, "budget_bytes must be")):
        with pytest.raises(FeatclError, match=message):
            InContext(**given)  # type: ignore[arg-type]
