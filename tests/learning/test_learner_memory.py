"""A learner with a memory: what reads it, what writes it, and what goes back when an update does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl.adapters import constrain
from featcl.errors import FeatclError
from featcl.features import Directions
from featcl.learning import Learner
from featcl.learning.guard import GuardReading, Stopped
from featcl.learning.remembering import whole_ids
from featcl.learning.weighing import SignalWeigher
from featcl.memory.attach import attach_memory
from featcl.memory.neural import NeuralMemory
from featcl.streams import Trajectory

Make = Callable[..., Any]


def remembering(rig: Any, *, layer: int = 1, **options: Any) -> Any:
    """A memory on the rig's model whose gate is open, as after training."""
    memory = NeuralMemory(32, heads=2, chunk_size=4, **options)
    attached = attach_memory(rig.model, memory, layer=layer)
    with torch.no_grad():
        attached.branch.gate.fill_(0.3)
    return attached


def told(number: int, answer: str = "good day") -> Trajectory:
    messages = ({"role": "user", "content": f"hello {number}"}, {"role": "assistant", "content": answer})
    return Trajectory(f"told-{number}", source="home", task="greeting", messages=messages)


def held(learner: Learner) -> Any:
    assert learner._remembering is not None
    return learner._remembering.held


@torch.no_grad()
def logits(learner: Learner, text: str = "what now?") -> torch.Tensor:
    ids = torch.tensor([learner.student.chat.encode_text(text).input_ids])
    with learner.alone():
        return learner.adapter.model(input_ids=ids).logits


def same_state(one: Any, other: Any) -> bool:
    return (one is None and other is None) or (one is not None and other is not None and one.equal(other))


# --- what is written -------------------------------------------------------------------------------------------------


def test_what_was_learned_is_read_once_more_and_kept(rig: Make) -> None:
    made = rig()
    attached = remembering(made)
    learner = made.learner(memory=attached)
    slow = attached.tensors()
    assert attached.state is None
    stats = learner.observe(told(1))
    written: Any = attached.state
    ids = whole_ids(told(1), learner.student.chat)
    with attached.using(None):
        with torch.no_grad(), attached.writing():
            made.model(input_ids=torch.tensor([ids]))
        found: Any = attached.memory.settle(attached.state)
        assert found.equal(written)
    assert stats.measures["memory/norm"] == written.norms()[0]["weights"] > 0
    assert int(written.count.sum()) == 0, "the open chunk is closed: all of it can be read"
    assert all(torch.equal(slow[name], tensor) for name, tensor in attached.tensors().items())
    assert not any(parameter.requires_grad for parameter in attached.parameters())
    learner.observe(told(2))
    assert not held(learner).equal(written)


def test_only_learning_writes(rig: Make, talk: Trajectory) -> None:
    made = rig()
    attached = remembering(made)
    learner = made.learner(
        memory=attached, objective=[{"name": "self_distillation", "max_new_tokens": 4}, {"name": "recover"}],
        max_kl_per_update=1e-3,
    )  # fmt: skip
    learner.observe(talk)
    before, written = logits(learner), attached.state
    learner.chat(talk.messages[:2], max_new_tokens=4)
    reply = learner.chat([{"role": "user", "content": "hi"}], max_new_tokens=4, temperature=1.0)
    learner.feedback(reply.id, reward=1.0)
    learner.adapter.model(input_ids=torch.arange(3)[None])
    assert attached.state is written
    assert torch.equal(logits(learner), before)
    with attached.writing():  # also where somebody else would have passes written
        learner.chat(talk.messages[:2], max_new_tokens=4)
        assert attached.state is written


def test_the_memory_is_read_while_learning(rig: Make) -> None:
    """The loss is the held state's; with the gate shut the same learner has another."""
    made = rig()
    attached = remembering(made)
    learner = made.learner(memory=attached)
    learner.observe(told(1))
    [batch] = learner._experience(told(2))[0].batches
    with torch.no_grad():
        scores = learner.adapter.model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    expected = float(torch.nn.functional.cross_entropy(scores, batch.targets))
    with attached.disabled(), torch.no_grad():
        scores = learner.adapter.model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    assert learner.observe(told(2)).loss == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(torch.nn.functional.cross_entropy(scores, batch.targets)), rel=1e-3)


def test_a_text_longer_than_the_context_is_written_whole(rig: Make) -> None:
    made = rig()
    attached = remembering(made)
    learner = made.learner(memory=attached, max_windows=1)
    long = Trajectory("long", source="home", text="abcdefgh" * 100)
    learner.observe(long)
    ids, written = whole_ids(long, learner.student.chat), attached.state
    assert len(ids) == 800 > learner.student.max_length
    with attached.using(None):
        with torch.no_grad(), attached.writing():
            for piece in (ids[:512], ids[512:]):
                made.model(input_ids=torch.tensor([piece]))
        assert attached.memory.settle(attached.state).equal(written)


def test_without_a_memory_nothing_is_different(rig: Make) -> None:
    """An untrained one leaves the learner bit-equal."""
    plain, made = rig(), rig()
    attached = attach_memory(made.model, NeuralMemory(32, heads=2, chunk_size=4), layer=1)
    one, two = plain.learner(), made.learner(memory=attached)
    for number in range(3):
        one.observe(told(number))
        two.observe(told(number))
    for name, tensor in one.adapter.coordinates().items():
        assert torch.equal(tensor, two.adapter.coordinates()[name])
    assert torch.equal(logits(one), logits(two))


# --- what goes back --------------------------------------------------------------------------------------------------


def test_rollback_takes_the_memory_back_too(rig: Make) -> None:
    made = rig()
    learner = made.learner(memory=remembering(made))
    seen = [(learner.memory.state, logits(learner))]
    for number in range(3):
        learner.observe(told(number))
        seen.append((learner.memory.state, logits(learner)))
    assert not torch.equal(seen[2][1], seen[3][1])
    for version in (2, 0):
        learner.rollback(version)
        assert same_state(learner.memory.state, seen[version][0])
        assert torch.equal(logits(learner), seen[version][1])
    learner.observe(told(0))
    assert learner.memory.state.equal(seen[1][0])


def test_revert_takes_back_weights_only(rig: Make) -> None:
    made = rig()
    learner = made.learner(memory=remembering(made))
    learner.observe(told(0))
    learner.observe(told(1))
    written = learner.memory.state
    learner.revert(2)
    assert learner.memory.state.equal(written)


def test_what_is_quarantined_is_not_written(rig: Make) -> None:
    made = rig()
    learner = made.learner(memory=remembering(made), weigher=lambda trajectory: float("1" in trajectory.id))
    learner.observe(told(1))
    written = learner.memory.state
    assert learner.observe(told(2)).quarantined
    assert learner.memory.state.equal(written)


def test_after_a_failure_the_memory_is_as_before(rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig()
    learner = made.learner(memory=remembering(made))
    learner.observe(told(1))
    written, before = learner.memory.state, logits(learner)
    with monkeypatch.context() as patch:
        patch.setattr(learner.student.teachers, "after_update_", _failing)  # after the memory was written
        with pytest.raises(FeatclError, match="on purpose"):
            learner.observe(told(2))
    assert learner.memory.state.equal(written)
    assert torch.equal(logits(learner), before)
    learner.reconfigure(lr=1e30)
    with pytest.raises(FeatclError, match="the weights were not changed"):
        learner.observe(told(2))
    assert learner.memory.state.equal(written)


def _failing(_: int) -> None:
    raise FeatclError("on purpose")


def test_experiences_that_wait_for_their_step_are_written_when_they_come(rig: Make) -> None:
    made = rig()
    learner = made.learner(memory=remembering(made), accumulate=3)
    learner.observe(told(1))
    first = learner.memory.state
    assert first is not None
    assert learner.version == 0
    learner.observe(told(2))
    second = learner.memory.state
    assert not second.equal(first)
    learner.flush()
    assert learner.memory.state.equal(second)
    assert learner.version == 1


class Watching:
    """A guard that acts after a given update."""

    max_kl, alarms = None, 0

    def __init__(self, at: int, act: Callable[[Any], None]) -> None:
        self.at, self.act = at, act

    def after_update(self, learner: Any, stats: Any) -> GuardReading | None:
        if learner.version != self.at:
            return None
        self.act(learner)
        return GuardReading(alarm="found")

    def state(self) -> dict[str, Any]:
        return {}

    def load_state_(self, state: Any) -> None:
        pass


def test_a_guard_that_rolls_back_takes_the_memory_back(rig: Make) -> None:
    made = rig()
    learner = made.learner(memory=remembering(made), guard=Watching(2, lambda learner: learner.rollback(1)))
    learner.observe(told(1))
    written = learner.memory.state
    learner.observe(told(2))
    assert learner.version == 1
    assert learner.memory.state.equal(written)


def test_a_guard_that_stops_leaves_what_was_accepted(rig: Make) -> None:
    def stop(_: Any) -> None:
        raise Stopped("enough")

    made = rig()
    learner = made.learner(memory=remembering(made), guard=Watching(2, stop))
    learner.observe(told(1))
    written = learner.memory.state
    with pytest.raises(Stopped):
        learner.observe(told(2))
    assert learner.version == 2
    assert not learner.memory.state.equal(written)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_goes_on_bit_equal(rig: Make, tmp_path: Path) -> None:
    def learner_of(seed: int = 0) -> Learner:
        made = rig()
        return made.learner(memory=remembering(made, seed=seed))

    one, two = learner_of(), learner_of()
    for number in range(2):
        one.observe(told(number))
    one.save(tmp_path)
    two.restore_(tmp_path)
    assert two.memory.state.equal(one.memory.state)
    for learner in (one, two):
        learner.observe(told(2))
    assert two.memory.state.equal(one.memory.state)
    assert torch.equal(logits(one), logits(two))
    two.rollback(1)
    one.rollback(1)
    assert two.memory.state.equal(one.memory.state), "earlier versions are saved with theirs"
    with pytest.raises(FeatclError, match="this one has other slow weights"):
        learner_of(seed=1).restore_(tmp_path)
    with pytest.raises(FeatclError, match="saved with a memory, and there is none"):
        rig().learner().restore_(tmp_path)
    made = rig()
    loaded = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter, memory=remembering(made))
    assert loaded.settings.lr == 1e-2


# --- several on one model --------------------------------------------------------------------------------------------


def shared(tiny: Make, *, names: tuple[str, str] = ("anna", "bob")) -> tuple[Any, Any, list[Any]]:
    model, tokenizer = tiny("olmo2", n_layers=2)
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    directions = Directions.from_vectors(vectors, layer=1)
    return model, tokenizer, [constrain(model, directions, name=name) for name in names]


def attached_to(model: Any, *, layer: int) -> Any:
    attached = attach_memory(model, NeuralMemory(32, heads=2, chunk_size=4), layer=layer)
    with torch.no_grad():
        attached.branch.gate.fill_(0.3)
    return attached


@pytest.mark.parametrize("how", ["one memory", "two memories", "no memory"])
def test_what_one_learns_the_other_does_not_see(tiny: Make, how: str) -> None:
    model, tokenizer, (first, second) = shared(tiny)
    memory = attached_to(model, layer=1)
    other = {"one memory": memory, "two memories": None, "no memory": None}[how]
    if how == "two memories":
        other = attached_to(model, layer=0)
    anna = Learner(model, tokenizer, first, lr=1e-2, memory=memory)
    bob = Learner(model, tokenizer, second, lr=1e-2, memory=other)
    if other is not None:
        bob.observe(told(9, "be quiet"))
    before, kept = logits(bob), None if other is None else held(bob)
    mine = logits(anna)
    for number in range(3):
        anna.observe(told(number))
        anna.chat([{"role": "user", "content": "hi"}], max_new_tokens=3)
    assert torch.equal(logits(bob), before)
    assert not torch.equal(logits(anna), mine)
    if other is not None:
        assert held(bob).equal(kept)
    now = logits(anna)
    bob.observe(told(4))
    assert torch.equal(logits(anna), now)
    anna.rollback(0)
    assert held(anna) is None
    assert torch.equal(logits(anna), mine)


def test_a_memory_of_another_model_is_refused(rig: Make) -> None:
    one, other = rig(), rig()
    with pytest.raises(FeatclError, match="attached to another model"):
        one.learner(memory=remembering(other))
    attached = remembering(one)
    attached.detach()
    with pytest.raises(FeatclError, match="or detached"):
        one.learner(memory=attached)
    with pytest.raises(FeatclError, match=r"memory is a NeuralMemory; it takes what featcl\.attach_memory returns"):
        one.learner(memory=NeuralMemory(32, heads=2))


# --- talking, acting, weighing ---------------------------------------------------------------------------------------


def test_chat_reads_what_was_learned_and_keeps_nothing_of_the_conversation(rig: Make) -> None:
    """The same prompt has the same log-probabilities however often others are asked in between."""
    made = rig()
    learner = made.learner(memory=remembering(made), lr=1e-9)
    asked = [{"role": "user", "content": "hi"}]

    def logprobs() -> tuple[float, ...]:
        reply = learner.chat(asked, max_new_tokens=3)
        return tuple(learner.conversations[reply.id].logprobs)

    empty = logprobs()
    learner.chat([{"role": "user", "content": "something else"}], max_new_tokens=3)
    assert logprobs() == empty
    learner.observe(told(1))
    assert logprobs() != pytest.approx(empty, abs=1e-4), "lr is as good as 0: it is the memory"


def test_replies_of_a_batch_are_those_of_each_alone(rig: Make) -> None:
    """Rows that are padded, read together, and dropped when they have stopped, each with a memory of its own."""
    from featcl.streams.rollouts import generate

    made = rig()
    learner = made.learner(memory=remembering(made))
    learner.observe(told(1))
    chat = learner.student.chat
    prompts = [chat.prompt([{"role": "user", "content": "x" * length}]) for length in (3, 17, 3, 30)]
    with learner.alone():
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "stop_ids": set(range(0, 256, 3))}
        together = generate(made.model, prompts, **options)
        for row, prompt in enumerate(prompts):
            alone = generate(made.model, [prompt], **options)
            assert alone.token_ids[0] == together.token_ids[row]
            assert alone.logprobs[0] == pytest.approx(together.logprobs[row], abs=1e-4)


def test_a_known_text_surprises_the_memory_less(rig: Make) -> None:
    made = rig()
    attached = remembering(made)
    learner = made.learner(memory=attached, lr=1e-6, weigher=SignalWeigher(["memory"], memory=attached))
    first = learner.observe(told(1))
    again = learner.observe(replace(told(1), id="again"))
    name = "weight/log_memory_surprise"
    assert again.measures[name] < first.measures[name] - 0.1
    assert first.measures["weight/memory"] == 1.0, "nothing to compare the first with"
    with attached.disabled(), pytest.raises(FeatclError, match="switched off"):
        learner.observe(told(2))
    with pytest.raises(FeatclError, match="the signal memory needs `memory`"):
        SignalWeigher(["memory"])


def test_surprise_counts_every_token_of_every_window_once(rig: Make) -> None:
    """Two windows in one padded batch: the mean over tokens, not over rows, and nothing of the padding."""
    from featcl.learning.remembering import memory_surprise

    made = rig()
    attached = remembering(made)
    learner = made.learner(memory=attached)
    experience, _ = learner._experience(Trajectory("long", source="home", text="abcdefgh" * 80))
    rows = [[*row] for batch in experience.batches for row in batch.input_ids.tolist()]
    assert len(rows) == 2
    lengths = [512, len(rows[1]) - rows[1][::-1].index(next(i for i in rows[1][::-1] if i))]
    each = [float(attached.surprise(torch.tensor([row[:n]]))) for row, n in zip(rows, lengths, strict=True)]
    expected = sum(value * n for value, n in zip(each, lengths, strict=True)) / sum(lengths)
    assert memory_surprise(experience, attached) == pytest.approx(expected, rel=1e-5)
