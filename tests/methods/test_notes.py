"""A notes adapter: what it trains on, and that later facts reach no weight."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.notes import ASK, Notes
from featcl.streams import Trajectory
from tests.methods.replaying import Bench, ask, reloaded, resumes, same_state
from tests.methods.test_in_context import system_of

pytest.importorskip("bm25s", reason="BM25 comes from the package bm25s, which is not installed")


def fact(number: int) -> Trajectory:
    return ask(number, meta={"context": f"number {number} is {number * 7 % 10}."})


def begun(bench: Bench, method: Notes, *trajectories: Trajectory, task: str = "a") -> Notes:
    method.begin_task_(task, bench.view())
    for trajectory in trajectories:
        bench.observe(trajectory, method)
    return method


def test_reading_is_trained_with_the_own_note_among_others() -> None:
    bench = Bench()
    method = begun(bench, Notes(k=3), *[fact(n) for n in range(6)])
    learned = method.learned(fact(9), bench.view())
    shown = system_of(learned.messages).split("\n")
    assert len(shown) == 3
    assert shown[-1] == "number 9 is 3."
    assert set(shown[:-1]) < {f"number {n} is {n * 7 % 10}." for n in range(6)}
    assert learned.messages[1:] == fact(9).messages


def test_writing_is_trained_on_the_note_alone() -> None:
    bench = Bench()
    method = begun(bench, Notes(write_share=0.75))
    [exercise] = method.beside(bench.encode(fact(3)), bench.view())
    assert exercise.weight == 3.0
    messages = exercise.trajectory.messages
    assert [message["content"] for message in messages[-2:]] == [ASK, "number 3 is 1."]
    [batch] = exercise.batches
    target = bench.student.chat.reply_ids("number 3 is 1.")
    assert batch.targets.tolist() == target
    [whole] = bench.encode(fact(3)).batches  # negative control: the conversation's own target is another
    assert whole.targets.tolist() != target


def test_facts_of_later_tasks_reach_no_weight() -> None:
    bench, method = Bench(), Notes(training_tasks=1, max_new_tokens=16)
    start = bench.adapter.coordinates()
    begun(bench, method, fact(1), fact(2))
    trained = bench.adapter.coordinates()
    assert any(not torch.equal(start[name], trained[name]) for name in start)  # negative control: it did train
    begun(bench, method, fact(3), fact(4), task="b")
    assert all(torch.equal(trained[name], now) for name, now in bench.adapter.coordinates().items())
    later = [each.text for each in method.texts.kept if each.source in ("t3", "t4")]
    assert later == list(dict.fromkeys(text for n in (3, 4) if (text := method.write(fact(n), bench.view()))))
    assert "number 3 is 1." not in later  # what the model wrote, not what it should have written


def test_the_written_notes_are_read_where_they_fit() -> None:
    bench, method = Bench(), Notes(k=1)
    begun(bench, method, *[fact(n) for n in range(5)])
    asked = [{"role": "user", "content": "tell me about number 3"}]
    assert system_of(method.context(asked, bench.view())) == "number 3 is 1."


def test_a_model_learns_to_write_notes_of_facts_never_trained() -> None:
    """A copying task that a tiny model can learn: the note is the answer's letter, whichever it is."""

    def letter(which: str, number: int) -> Trajectory:
        said = ({"role": "user", "content": "?"}, {"role": "assistant", "content": which * 3})
        return Trajectory(f"{which}{number}", messages=said, meta={"context": which})

    bench, method = Bench(kind="none", lr=5e-3, layers=[0, 1, 2]), Notes(write_share=0.9, max_new_tokens=4)
    before = method.write(letter("a", 0), bench.view())
    begun(bench, method, *[letter(which, number) for number in range(12) for which in "ab"])
    assert before not in ("a", "b")
    assert method.write(letter("a", 99), bench.view()) in ("a", "b")


def test_notes_resume_to_the_same_bits() -> None:
    assert resumes(lambda: Notes(k=2), [fact(n) for n in range(6)], cut=4, task=True)
    bench, method = Bench(), Notes(max_new_tokens=8)
    begun(bench, method, fact(1))
    begun(bench, method, fact(2), task="b")
    other = reloaded(method, Notes(max_new_tokens=8))
    assert same_state(method, other)
    assert other.frozen is True  # type: ignore[attr-defined]
    assert Notes().frozen is False


def test_bad_settings_are_refused() -> None:
    for given, message in (
        ({"training_tasks": 0}, "training_tasks must be"),
        ({"write_share": 1.0}, "share must be"),
        ({"k": 0}, "k must be"),
    ):
        with pytest.raises(FeatclError, match=message):
            Notes(**given)
    bench = Bench()
    with pytest.raises(FeatclError, match="raw text"):
        begun(bench, Notes(), Trajectory("r", text="some text"))
