"""Replay, rehearsal and a persona's answers, through updates of a tiny model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.method import Method
from featcl.methods.persona import Persona
from featcl.methods.rehearsal import Rehearsal, read_material
from featcl.methods.replay import SELECTIONS, Replay, build_selection
from featcl.methods.tokens import packed, unpacked
from featcl.streams import Trajectory
from tests.methods.replaying import Bench, ask, forgotten, reloaded, resumes, run, same_state


def gradients(bench: Bench, *trajectories: tuple[Trajectory, float]) -> dict[str, torch.Tensor]:
    """Σ weight · gradient."""
    total: dict[str, torch.Tensor] = {}
    for trajectory, weight in trajectories:
        for name, value in bench.gradient(bench.encode(trajectory)).items():
            total[name] = total.get(name, 0.0) + weight * value
    return total


class Watch(Method):
    """Sees the gradient of the whole update."""

    def project_(self, view: Any) -> None:
        self.seen = {name: p.grad.clone() for name, p in view.parameters.items() if p.grad is not None}


# --- replay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "factor"), [(0.5, 1.0), (0.8, 4.0)])
def test_a_share_of_the_update_is_replay(share: float, factor: float) -> None:
    bench, replay, watch = Bench(lr=0.0), Replay(budget=2, share=share, count=2), Watch()
    bench.move_()
    bench.observe(ask(1), replay, watch)
    alone = gradients(bench, (ask(1), 1.0))
    assert all(torch.equal(watch.seen[name], alone[name]) for name in alone)  # nothing to replay yet
    bench.observe(ask(2), replay, watch, weight=0.5)
    bench.observe(ask(3), replay, watch)
    expected = gradients(bench, (ask(3), 1.0), (ask(1), factor / 2), (ask(2), 0.5 * factor / 2))
    for name in expected:
        torch.testing.assert_close(watch.seen[name], expected[name], atol=1e-6, rtol=1e-5)
    wrong = gradients(
        bench, (ask(3), 1.0), (ask(1), factor / 2), (ask(2), factor / 2)
    )  # negative control: trust forgotten
    assert any(not torch.allclose(watch.seen[name], wrong[name], rtol=1e-3) for name in wrong)


def test_replay_keeps_what_the_plain_learner_forgets() -> None:
    plain = forgotten()
    assert plain > 1.0  # negative control: there is something to forget
    assert forgotten(Replay(budget=50, count=2)) < 0.3 * plain


@pytest.mark.parametrize("select", list(SELECTIONS))
def test_every_selection_resumes_to_the_same_bits(select: str) -> None:
    assert resumes(lambda: Replay(budget=3, select=select), [ask(n) for n in range(9)], cut=6)


def test_a_mapped_replay_resumes_to_the_same_bits(tmp_path: Path) -> None:
    names = iter(["whole", "broken", "broken"])
    make = lambda: Replay(budget=3, codec="zlib", file=tmp_path / f"{next(names)}.bin")  # noqa: E731
    assert resumes(make, [ask(n) for n in range(9)], cut=6)


def test_a_state_that_is_lost_is_noticed() -> None:
    bench, replay = Bench(), Replay(budget=3)
    run(bench, [ask(n) for n in range(6)], replay)
    assert same_state(replay, reloaded(replay, Replay(budget=3)))
    assert not same_state(replay, Replay(budget=3))


def test_a_trajectory_is_kept_once() -> None:
    bench, replay = Bench(), Replay(budget=10)
    run(bench, [ask(1), ask(2), ask(1), ask(1)], replay)
    assert [entry.id for entry in replay.buffer.entries] == ["t1", "t2"]


def test_compressed_text_is_smaller_and_the_same() -> None:
    long = Trajectory("long", text="the cat sat on the mat. " * 40, meta={"a": [1, {"b": None}]}, reward=0.25)
    assert unpacked(packed(long, "zlib"), "zlib") == unpacked(packed(long, "text"), "text") == long
    assert len(packed(long, "zlib")) < 0.3 * len(packed(long, "text"))
    with pytest.raises(FeatclError, match="no JSON"):
        packed(Trajectory("odd", text="ab", meta={"a": object()}), "text")


def test_replay_counts_what_it_costs() -> None:
    bench, replay = Bench(), Replay(budget=10)
    bench.observe(ask(1), replay)
    assert replay.cost().forward_tokens == 0
    bench.observe(ask(2), replay)
    read = sum(batch.input_ids.numel() for batch in bench.encode(ask(1)).batches)
    assert (replay.cost().forward_tokens, replay.cost().backward_tokens) == (read, read)
    assert replay.cost().stored_bytes == replay.buffer.held_bytes > len(packed(ask(1), "text"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0}, "budget must be a whole number"),
        ({}, "one of the two"),
        ({"budget": 3, "share": 1.0}, "share must be above 0 and below 1"),
        ({"budget": 3, "count": 0}, "count must be a whole number"),
        ({"budget": 3, "select": "resevoir"}, "did you mean 'reservoir'"),
        ({"budget": 3, "select": {"name": "importance", "scor": "loss"}}, "did you mean 'score'"),
        ({"budget": 3, "codec": "gzip"}, "codec 'gzip'"),
    ],
)
def test_bad_replay_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatclError, match=message):
        Replay(**given)
    assert build_selection({"name": "importance", "score": "gradient_norm"}).name == "importance"


# --- rehearsal ---------------------------------------------------------------------------------------------------


def test_rehearsal_draws_from_its_material_alone() -> None:
    bench, watch = Bench(lr=0.0), Watch()
    bench.move_()
    text = Trajectory("fox", text="the quick brown fox")
    bench.observe(ask(1), Rehearsal(material=[text], share=0.5), watch)
    expected = gradients(bench, (ask(1), 1.0), (text, 1.0))
    for name in expected:
        torch.testing.assert_close(watch.seen[name], expected[name], atol=1e-6, rtol=1e-5)


def test_rehearsal_reads_files(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("one line\n" * 200)
    blocks = read_material(tmp_path / "plain.txt")
    assert len(blocks) > 1
    assert "".join(block.text or "" for block in blocks).replace("\n", "") == "one line" * 200
    (tmp_path / "chat.jsonl").write_text('{"id": "x", "text": "hello there"}\n')
    assert Rehearsal.of_file(tmp_path / "chat.jsonl").material[0].text == "hello there"
    with pytest.raises(FeatclError, match="no material"):
        Rehearsal(material=[])
    with pytest.raises(FeatclError, match="one id"):
        Rehearsal(material=[ask(1), ask(1)])


def test_rehearsal_resumes_to_the_same_bits() -> None:
    material = [Trajectory(f"m{n}", text=f"material number {n}") for n in range(5)]
    assert resumes(lambda: Rehearsal(material=material), [ask(n) for n in range(6)], cut=3)


# --- persona -----------------------------------------------------------------------------------------------------


def test_critical_answers_come_in_turn() -> None:
    bench, answers = Bench(), [ask(n) for n in range(5)]
    persona, seen = Persona(answers=answers, count=2), Counter()
    for _ in range(5):
        seen.update(each.trajectory.id for each in persona.beside(bench.encode(ask(9)), bench.view()))
    assert seen == {answer.id: 2 for answer in answers}


def test_the_stream_adds_critical_answers_and_none_is_dropped() -> None:
    bench, persona = Bench(), Persona(answers=[ask(1)], budget=2)
    run(bench, [ask(2), ask(3, meta={"critical": True}), ask(3, meta={"critical": True})], persona)
    assert [answer.id for answer in persona.answers] == ["t1", "t3"]
    with pytest.raises(FeatclError, match="none of them may be dropped"):
        bench.observe(ask(4, meta={"critical": True}), persona)
    with pytest.raises(FeatclError, match="budget must be a whole number"):
        Persona(budget=0)
    with pytest.raises(FeatclError, match="none of them may be dropped"):
        Persona(answers=[ask(1), ask(2)], budget=1)


def test_a_persona_resumes_to_the_same_bits() -> None:
    stream = [ask(n, meta={"critical": n % 2 == 0}) for n in range(8)]
    assert resumes(lambda: Persona(answers=[ask(9)], count=2), stream, cut=5)
