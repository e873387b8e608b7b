"""How questions are answered with methods: what is asked, under which adapter, and that all is put back after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.answering import Answering
from featcl.methods.ewc import EWC
from featcl.methods.in_context import InContext
from featcl.methods.method import Method, View
from featcl.methods.skill_file import SkillFile
from featcl.streams.messages import Message
from featcl.streams.rollouts import generate
from tests.methods.library import FIRST, LIBRARY, ask, first_task, learner_with

QUESTION: list[Message] = [{"role": "user", "content": "what is number 1?"}]


class Keys(Method):
    """Routes to the key that a question names, and writes down what happens."""

    name = "keys"

    def __init__(self, mark: str = "") -> None:
        self.mark, self.log = mark, []

    def route(self, messages: Sequence[Message], task: str | None, view: View) -> str | None:
        return task if task is not None else None

    @contextmanager
    def routed(self, key: str, view: View) -> Iterator[None]:
        self.log.append(f"{key} in")
        yield
        self.log.append(f"{key} out")


class Around(Method):
    """Acts around forward passes."""

    name = "around"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    @contextmanager
    def around(self, view: View) -> Iterator[None]:
        self.log.append("around in")
        yield
        self.log.append("around out")


class Says(Method):
    """Puts a word in front."""

    def __init__(self, word: str) -> None:
        self.name, self.word = f"says_{word}", word

    def context(self, messages: Sequence[Message], view: View) -> Sequence[Message]:
        return [{"role": "system", "content": self.word}, *messages]


def test_without_a_say_the_model_is_asked_as_it_is() -> None:
    view: Any = None
    for methods in ((), (EWC(),), (Method(),)):
        answering = Answering(methods, view)
        assert answering.plain
        assert answering.same_prompts
        assert answering.asked(QUESTION) is QUESTION
        [(places, state)] = answering.grouped([QUESTION] * 3, ["a", "b", "a"])
        assert places == (0, 1, 2)
        with state:
            pass
    assert not Answering([InContext()], view).plain  # negative control


def test_contexts_are_put_in_front_in_order() -> None:
    answering = Answering([Says("one"), EWC(), Says("two")], None)  # type: ignore[arg-type]
    assert [message["content"] for message in answering.asked(QUESTION)] == ["two", "one", QUESTION[0]["content"]]


def test_questions_are_grouped_by_the_adapter_that_answers_them() -> None:
    keys = Keys()
    answering = Answering([keys, Around(keys.log)], None)  # type: ignore[arg-type]
    groups = answering.grouped([QUESTION] * 4, ["a", None, "b", "a"])
    assert [places for places, _ in groups] == [(0, 3), (1,), (2,)]
    for places, state in groups:
        with state:
            keys.log.append(str(places))
    assert keys.log == [
        "a in", "around in", "(0, 3)", "around out", "a out",
        "around in", "(1,)", "around out",
        "b in", "around in", "(2,)", "around out", "b out",
    ]  # fmt: skip
    with pytest.raises(FeatclError, match="3 conversations and 1 tasks"):
        answering.grouped([QUESTION] * 3, ["a"])


def test_the_prefix_of_a_cartridge_acts_inside_and_is_gone_after() -> None:
    learner = first_task(learner_with(LIBRARY["cartridge"].make()))
    scorer, [batch] = learner.student.scorer, learner.view().encode(FIRST[0]).batches
    with torch.no_grad():
        before = scorer.hidden(batch)
        with learner.answering().of(QUESTION):
            inside = scorer.hidden(batch)
        with scorer.trunks_kept(), learner.answering().of(QUESTION):  # no kept trunk stands in for the prefix
            kept = scorer.hidden(batch)
        assert torch.equal(scorer.hidden(batch), before)
    assert not torch.allclose(inside, before, atol=1e-4)
    assert torch.equal(inside, kept)


def test_chat_is_asked_with_the_memory_in_front() -> None:
    learner = learner_with(InContext())
    learner.begin_task("a")
    stats = [learner.observe(trajectory) for trajectory in FIRST]
    assert [each.postponed for each in stats] == ["in_context: kept outside the weights"] * 3
    reply = learner.chat(QUESTION, max_new_tokens=8)
    causal, chat = learner.student.scorer.causal, learner.student.chat
    asked = learner.answering().asked(QUESTION)
    assert "it is 7" in asked[0]["content"]
    found, bare = (
        generate(causal, [chat.prompt(messages)], max_new_tokens=8, temperature=0.0, stop_ids=chat.stop_ids)
        for messages in (asked, QUESTION)
    )
    assert tuple(found.token_ids[0]) == reply.token_ids
    assert tuple(bare.token_ids[0]) != reply.token_ids  # negative control
    assert learner.conversations[reply.id].messages == tuple(QUESTION)


def test_what_was_taught_in_chat_is_remembered_and_can_be_taken_back() -> None:
    learner = learner_with(InContext(frozen=False))
    learner.chat(QUESTION, max_new_tokens=4)
    first = learner.chat(QUESTION, max_new_tokens=4)
    learner.feedback(first.id, correction="it is 7")
    assert len(learner.learn()) == 1
    [memory] = learner.methods
    assert isinstance(memory, InContext)
    assert [each.source for each in memory.texts.kept] == [first.id]
    learner.undo()
    assert memory.texts.kept == ()


def test_an_adapter_is_the_present_one_inside_alone() -> None:
    class Zero(Method):
        name = "zero"

        def route(self, messages: Sequence[Message], task: str | None, view: View) -> str | None:
            return "zero"

        @contextmanager
        def routed(self, key: str, view: View) -> Iterator[None]:
            own = view.student.adapter.coordinates()
            view.student.adapter.load_coordinates_({name: 0 * tensor for name, tensor in own.items()})
            yield
            view.student.adapter.load_coordinates_(own)

    learner = learner_with(Zero())
    learner.observe(ask(1))
    now = learner.adapter.coordinates()
    with learner.answering().of(QUESTION):
        assert learner.adapter.delta_norm() == 0.0
    assert all(torch.equal(now[name], tensor) for name, tensor in learner.adapter.coordinates().items())
    assert learner.adapter.delta_norm() > 0.0


def test_what_is_said_of_a_bad_reply_becomes_a_rule() -> None:
    def taught(*methods: Method) -> Any:
        learner = learner_with(*methods)
        reply = learner.chat(QUESTION, max_new_tokens=4)
        learner.feedback(reply.id, reward=-1.0, text="Always say the number first.")
        return learner, learner.learn()

    learner, done = taught(SkillFile())
    assert [update.postponed for update in done.updates] == ["skill_file: kept outside the weights"]
    assert "Always say the number first." in learner.answering().asked(QUESTION)[0]["content"]
    for methods in ((), (InContext(),)):  # negative control: nothing there can use it
        _, done = taught(*methods)
        assert not done.updates
        assert len(done.left) == 1
