"""Conversations that the model writes by itself, and their rehearsal."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.conversing import converse, opening, turn_end
from featcl.methods.generative import GenerativeReplay
from featcl.models import load_model
from featcl.objectives.experience import Student
from featcl.objectives.scoring import Scorer
from featcl.streams import Chat
from tests.conftest import FAMILIES
from tests.methods.replaying import Bench, ask, reloaded, resumes, same_state


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_opening_is_what_stands_before_a_users_words(family: str) -> None:
    chat = Bench(family).student.chat
    for system in (None, "be kind"):
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "b"}]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        ids, begin = chat.encode(messages, mask="none").input_ids, opening(chat, system)
        assert ids[: len(begin)] == begin
        rest = chat.tokenizer.decode(ids[len(begin) :])
        assert rest.lstrip(" ").startswith("hello")  # the plain form has a space in front
        after = len(begin) + len(rest.partition("hello")[0]) + len("hello")  # one token is one letter
        assert ids[after] == turn_end(chat)


def test_a_model_writes_what_it_was_trained_to_be_asked() -> None:
    """The laboratory's model: its own questions end, are many, and are answered as it answers them."""
    model, tokenizer = load_model("lab/olmo2")

    class Plain:  # an adapter that is not there
        def parameters(self) -> list:
            return []

    student = Student(Scorer(model), Plain(), Chat(tokenizer), 512)
    written = converse(student, [None] * 24, max_new_tokens=40, generator=drawn(0))
    questions = [messages[0]["content"] for messages in written.conversations]
    assert len(set(questions)) >= 20
    assert all(len(question.split()) < 35 and "<|" not in question for question in questions)
    again = converse(student, [None] * 24, max_new_tokens=40, generator=drawn(0))
    assert again == written
    about = converse(student, ["mira plays golf. mira has sister dirk."] * 24, max_new_tokens=40, generator=drawn(0))
    told = [messages for messages in about.conversations if "mira" in messages[0]["content"]]
    assert len(told) >= 6  # what stands in front is what is asked about
    assert sum("mira" in question for question in questions) <= 2  # negative control


def test_it_writes_at_the_start_of_a_task_and_every_so_many_updates() -> None:
    bench, method = Bench(), GenerativeReplay(samples=6, every=3, max_new_tokens=6)
    assert list(method.beside(bench.encode(ask(1)), bench.view())) == []
    method.begin_task_("a", bench.view())
    first = method.written
    assert len(first) == 6
    for number in range(3):
        assert method.written is first
        bench.observe(ask(number), method)
    assert [each.id for each in method.written] == [f"written/1/{n}" for n in range(6)]
    assert [each.messages for each in method.written] != [each.messages for each in first]
    assert method.cost().stored_bytes > 0
    assert method.cost().forward_tokens > method.cost().backward_tokens > 0


def test_what_was_written_is_replayed_with_its_share() -> None:
    bench, method = Bench(), GenerativeReplay(samples=4, share=0.75, count=2, max_new_tokens=6)
    method.begin_task_("a", bench.view())
    found = method.beside(bench.encode(ask(1)), bench.view())
    assert [each.weight for each in found] == [1.5, 1.5]
    assert {each.trajectory.id for each in found} < {each.id for each in method.written}


def test_generative_replay_resumes_to_the_same_bits() -> None:
    make = lambda: GenerativeReplay(samples=4, every=4, max_new_tokens=6)  # noqa: E731
    assert resumes(make, [ask(n) for n in range(7)], cut=5, task=True)
    bench, method = Bench(), make()
    method.begin_task_("a", bench.view())
    assert same_state(method, reloaded(method, make()))
    assert not same_state(method, make())


def test_bad_settings_are_refused() -> None:
    for given, message in (
        ({"samples": 0}, "samples must be"),
        ({"share": 0.0}, "share must be above 0"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"every": 0}, "every must be"),
    ):
        with pytest.raises(FeatclError, match=message):
            GenerativeReplay(**given)
    with pytest.raises(FeatclError, match="leaves no room"):
        converse(Bench().student, ["x" * 600], max_new_tokens=8, generator=drawn(0))
