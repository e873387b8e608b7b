"""Talking with a learner: replies, judgements, learning from them, the journal, and two learners on one model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl.adapters import adapters_of, constrain, only
from featcl.errors import FeatclError
from featcl.features import Directions, FeatureEncoder
from featcl.learning import Learner
from featcl.learning.conversations import Conversation, Conversations, Reply
from featcl.learning.journal import Journal
from featcl.learning.judging import unusable
from featcl.learning.live import Redone, Shown
from featcl.learning.weighing import as_weigher
from featcl.objectives.build import build_terms
from featcl.objectives.scoring import pack
from featcl.streams import Chat, Encoded

Make = Callable[..., Any]
ASK = [{"role": "user", "content": "what is it?"}]
KINDS = ("none", "write", "read", "both", "residual", "gated", "shift", "scale")


def says(learner: Learner, text: str) -> float:
    """Nats per token of a reply to ASK."""
    encoded = learner.student.chat.encode([*ASK, {"role": "assistant", "content": text}])
    batch = pack([encoded])[0]
    with learner.alone(), torch.no_grad():
        hidden = learner.student.scorer.hidden(batch)
        return float(torch.nn.functional.cross_entropy(learner.student.scorer.head(hidden), batch.targets))


def same(one: Learner, other: Learner) -> bool:
    mine, yours = one.adapter.coordinates(), other.adapter.coordinates()
    return one.version == other.version and all(torch.equal(mine[name], yours[name]) for name in mine)


# --- one learner -----------------------------------------------------------------------------------------------


def test_a_correction_is_learned_and_becomes_likely(rig: Make) -> None:
    learner = rig().learner(lr=3e-2)
    before = says(learner, "a cat")
    for number in range(6):
        reply = learner.chat(ASK, max_new_tokens=4)
        assert reply.id == f"chat-{number + 1}"
        learner.feedback(reply.id, correction="a cat")
        (stats,) = learner.learn()
        assert (stats.version, stats.trajectory, stats.source) == (number + 1, reply.id, "chat")
    assert says(learner, "a cat") < before - 0.5
    assert len(learner.learn()) == 0, "nothing is learned twice"
    assert learner.version == 6


def test_a_reply_is_a_string_that_knows_its_tokens(rig: Make) -> None:
    learner = rig().learner()
    reply = learner.chat(ASK, max_new_tokens=6, temperature=1.0)
    assert isinstance(reply, str)
    assert reply == learner.student.chat.decode_reply(reply.token_ids)
    assert 1 <= len(reply.token_ids) == len(reply.logprobs) <= 6
    assert reply.version == 0
    twin = copy.deepcopy(reply)
    assert (twin, twin.id, twin.token_ids) == (reply, reply.id, reply.token_ids)
    again = learner.chat([*ASK, {"role": "assistant", "content": reply}, *ASK], max_new_tokens=2)
    kept = learner.conversations[again.id]
    assert type(kept.messages[1]["content"]) is str
    json.dumps(kept.to_record())


def test_a_rewarded_reply_keeps_its_tokens_as_sampled(rig: Make) -> None:
    """Random tokens rarely are what their text would be split into; what is learned is what was sampled."""
    learner = rig().learner()
    reply = learner.chat(ASK, max_new_tokens=8, temperature=2.0)
    learner.feedback(reply.id, reward=1.0, text="fine")
    trajectory = learner.conversations[reply.id].trajectory()
    prompt = learner.student.chat.prompt(ASK)
    assert trajectory.token_ids == (*prompt, *reply.token_ids)
    assert trajectory.token_mask == (False,) * len(prompt) + (True,) * len(reply.token_ids)
    assert trajectory.logprobs is not None
    assert trajectory.logprobs[len(prompt) :] == reply.logprobs
    assert (trajectory.reward, trajectory.feedback, trajectory.adapter_version) == (1.0, "fine", 0)
    (stats,) = learner.learn()
    assert stats.tokens == len(reply.token_ids)
    assert stats.loss == pytest.approx(-sum(reply.logprobs) / len(reply.logprobs), abs=1e-4)


def test_a_correction_is_preferred_to_the_reply(rig: Make) -> None:
    learner = rig().learner()
    reply = learner.chat(ASK, max_new_tokens=4)
    learner.feedback(reply.id, reward=-1)
    learner.feedback(reply.id, correction="a dog")
    trajectory = learner.conversations[reply.id].trajectory("ada")
    assert (trajectory.chosen, trajectory.rejected) == ("a dog", str(reply))
    assert trajectory.messages[-1] == {"role": "assistant", "content": "a dog"}
    assert trajectory.token_ids is None, "the correction was not sampled"
    assert trajectory.reward is None, "the reward was about the reply"
    assert trajectory.meta["rejected"]["token_ids"] == reply.token_ids
    assert trajectory.user == "ada"


@pytest.mark.parametrize(
    ("objective", "judgement", "reason"),
    [
        ("sft", {"reward": 1.0}, None),
        ("sft", {"reward": -1.0}, "imitates"),
        ("sft", {"feedback": "hm"}, "imitates"),
        ("sft", {"reward": -1.0, "correction": "x"}, None),
        ("preference", {"reward": 1.0}, "correction to prefer"),
        ("preference", {"correction": "x"}, None),
        ("policy", {"reward": -1.0}, None),
        ("policy", {"feedback": "hm"}, "needs a reward"),
        ("policy", {"correction": "x"}, "needs a reward"),
        ({"name": "policy", "samples": 2, "reward": "match"}, {"correction": "x"}, None),
        ("self_distillation", {"reward": -1.0}, "better than the reply"),
        ("self_distillation", {"reward": -1.0, "feedback": "shorter"}, None),
        ({"name": "self_distillation", "context": "demonstration"}, {"reward": -1.0, "feedback": "x"}, "better than"),
        ({"name": "self_distillation", "context": "feedback"}, {"reward": 1.0}, "needs a text"),
        ("recover", {"reward": -1.0}, None),
        (["sft", {"name": "policy", "missing": "skip"}], {"correction": "x"}, None),
        (["sft", "policy"], {"correction": "x"}, "needs a reward"),
        (["kl_to_base", {"name": "policy", "missing": "skip"}], {"correction": "x"}, "needs a reward"),
    ],
)
def test_what_an_objective_cannot_use_is_not_learned(objective: Any, judgement: dict, reason: str | None) -> None:
    said = Conversation("chat-1", (), "hi", (), (1,), (0.0,), 0)
    judged = said.judged(**{"reward": None, "correction": None, "feedback": None, **judgement})
    found = unusable(judged, build_terms(objective))
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("objective", "judgement"),
    [
        ("preference", {"correction": "a dog"}),
        ("policy", {"reward": -1.0}),
        ("self_distillation", {"correction": "a dog"}),
        ({"name": "self_distillation", "context": "feedback"}, {"text": "it is a dog"}),
        ("predict", {"reward": -1.0}),
        ([{"name": "sft"}, {"name": "preference", "missing": "skip"}], {"reward": 1}),
    ],
)
def test_every_objective_learns_from_what_it_can_use(rig: Make, objective: Any, judgement: dict) -> None:
    """A step that moves the model, made from a judged reply; a bad reward makes the reply less likely."""
    learner = rig().learner(objective=objective, lr=1e-2)
    reply = learner.chat(ASK, max_new_tokens=6, temperature=1.0)
    learner.feedback(reply.id, **judgement)
    (stats,) = learner.learn()
    assert stats.kl > 0
    if objective == "policy":
        encoded = Encoded([*learner.student.chat.prompt(ASK), *reply.token_ids],
                          [False] * len(learner.student.chat.prompt(ASK)) + [True] * len(reply.token_ids))  # fmt: skip
        batch = pack([encoded])[0]
        with torch.no_grad():
            head = learner.student.scorer.head(learner.student.scorer.hidden(batch))
        now = -float(torch.nn.functional.cross_entropy(head, batch.targets))
        assert now < sum(reply.logprobs) / len(reply.logprobs)


def test_a_bad_reply_waits_until_it_is_corrected(rig: Make) -> None:
    learner = rig().learner()
    reply = learner.chat(ASK, max_new_tokens=3)
    learner.feedback(reply.id, reward=-1)
    done = learner.learn()
    assert (len(done), list(done.left), learner.version) == (0, [reply.id], 0)
    learner.feedback(reply.id, correction="yes")
    assert [stats.trajectory for stats in learner.learn()] == [reply.id]
    learner.feedback(reply.id, correction="no")  # judged anew: another experience
    assert [stats.trajectory for stats in learner.learn()] == [f"{reply.id}.2"]


def test_conversations_may_make_one_step_together(rig: Make, tmp_path: Path) -> None:
    learner = rig().learner(accumulate=2)
    first = learner.chat(ASK, max_new_tokens=3)
    learner.feedback(first.id, correction="one")
    assert [stats.version for stats in learner.learn()] == [0]
    learner.save(tmp_path)
    made = rig()
    loaded = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter)
    for each in (learner, loaded):
        second = each.chat(ASK, max_new_tokens=3)
        each.feedback(second.id, correction="two")
        assert [stats.version for stats in each.learn()] == [1]
    assert same(learner, loaded)


def test_an_error_is_raised_once_and_is_in_nobodys_way(rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = rig().learner()
    first, second = (learner.chat(ASK, max_new_tokens=3) for _ in range(2))
    for reply in (first, second):
        learner.feedback(reply.id, correction="yes")
    observe = Learner.observe

    def fails(self: Learner, trajectory: Any) -> Any:
        if trajectory.id == first.id:
            raise FeatclError("broken")
        return observe(self, trajectory)

    monkeypatch.setattr(Learner, "observe", fails)
    with pytest.raises(FeatclError, match="broken"):
        learner.learn()
    done = learner.learn()
    assert ([stats.trajectory for stats in done], dict(done.left)) == ([second.id], {first.id: "broken"})
    monkeypatch.undo()
    learner.feedback(first.id, correction="yes")
    assert len(learner.learn()) == 1


@pytest.mark.parametrize(
    ("judgement", "message"),
    [
        ({}, "needs a reward"),
        ({"reward": float("nan")}, "finite"),
        ({"reward": True}, "finite"),
        ({"reward": "good"}, "finite"),
        ({"correction": " "}, "correction must be"),
        ({"text": ""}, "text must be"),
    ],
)
def test_what_is_no_judgement_is_refused(rig: Make, judgement: dict, message: str) -> None:
    learner = rig().learner()
    reply = learner.chat(ASK, max_new_tokens=2)
    with pytest.raises(FeatclError, match=message):
        learner.feedback(reply.id, **judgement)
    with pytest.raises(FeatclError, match=r"no conversation 'chat-9'.*chat-1"):
        learner.feedback("chat-9", reward=1)
    assert not learner.conversations.waiting


def test_a_full_context_is_an_error_and_a_nearly_full_one_shortens_the_reply(rig: Make) -> None:
    learner = rig().learner()
    length = learner.student.scorer.causal.config.max_position_embeddings
    room = length - len(learner.student.chat.prompt([{"role": "user", "content": ""}]))
    with pytest.raises(FeatclError, match="context is full"):
        learner.chat([{"role": "user", "content": "x" * room}])
    reply = learner.chat([{"role": "user", "content": "x" * (room - 2)}], max_new_tokens=50)
    assert len(reply.token_ids) <= 2


def test_replies_differ_when_sampled_and_repeat_from_the_same_state(rig: Make) -> None:
    one, other = rig().learner(), rig().learner()
    first = [one.chat(ASK, max_new_tokens=8, temperature=1.0) for _ in range(2)]
    assert first[0] != first[1], "another reply to the same question"
    torch.manual_seed(99)
    assert [other.chat(ASK, max_new_tokens=8, temperature=1.0) for _ in range(2)] == first


def test_the_shown_pieces_are_the_reply(rig: Make) -> None:
    learner = rig().learner()
    for temperature in (0.0, 1.0, 1.5, 2.0):
        pieces: list[str] = []
        reply = learner.chat(ASK, max_new_tokens=24, temperature=temperature, on_text=pieces.append)
        assert "".join(pieces) == reply
        assert len(pieces) > 1
    quiet = rig().learner()
    assert quiet.chat(ASK, max_new_tokens=24) == rig().learner().chat(ASK, max_new_tokens=24, on_text=pieces.append)


def test_half_a_character_waits(tiny: Make) -> None:
    chat = Chat(tiny()[1])
    pieces: list[str] = []
    shown = Shown(chat, pieces.append)
    for token in chat.tokenizer("a é b ", add_special_tokens=False)["input_ids"]:
        shown(0, token)
    shown.finish("a é b")
    assert "".join(pieces) == "a é b"
    assert len(pieces) == 3, "a, é, b: no half é, no white space alone"


# --- kept ------------------------------------------------------------------------------------------------------


def test_what_waits_survives_saving_and_going_back(rig: Make, tmp_path: Path) -> None:
    learner = rig().learner()
    taught = learner.chat(ASK, max_new_tokens=3)
    learner.feedback(taught.id, correction="one")
    learner.learn()
    waiting = learner.chat(ASK, max_new_tokens=3)
    learner.feedback(waiting.id, correction="two")
    learner.save(tmp_path)
    made = rig()
    loaded = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter)
    assert loaded.conversations.waiting == learner.conversations.waiting
    learner.learn()
    loaded.learn()
    assert same(learner, loaded)
    learner.rollback(1)
    assert learner.conversations.waiting == (), "what was taken back is not learned again by itself"
    assert learner.chat(ASK, max_new_tokens=2).id == "chat-3", "ids are never used twice"


def test_only_the_last_few_are_kept_but_all_that_wait() -> None:
    kept = Conversations(keep=3)
    for number in range(10):
        said = Conversation(kept.next_id, (), "hi", (), (1,), (0.0,), 0)
        kept.add_(said)
        if number < 2:
            kept.judge_(said.id, reward=1.0, correction=None, feedback=None)
    assert [c.id for c in kept.waiting] == ["chat-1", "chat-2"]
    assert len(kept) == 3
    assert kept.last is not None
    assert kept.last.id == "chat-10"
    again = Conversations()
    again.load_state_(json.loads(json.dumps(kept.state())))
    assert again.state() == kept.state()
    assert again["chat-10"] == kept["chat-10"]


def acts(learner: Learner) -> list[Callable[[], Any]]:
    """A fixed talk, act by act."""
    return [
        lambda: learner.chat(ASK, max_new_tokens=4, temperature=1.0),
        lambda: learner.feedback("chat-1", reward=1),
        lambda: learner.learn(),
        lambda: learner.chat(ASK, max_new_tokens=4, temperature=1.0),
        lambda: learner.feedback("chat-2", correction="no"),
        lambda: learner.learn(),
        lambda: learner.undo(),
        lambda: learner.chat(ASK, max_new_tokens=4),
    ]


@pytest.mark.parametrize("saved", [0, 4])
def test_save_and_journal_together_lose_nothing(rig: Make, tmp_path: Path, saved: int) -> None:
    """A crash after any act: loaded from the last save, with the journal, the learner is where it was, bit for bit."""
    for done in range(saved, 9):
        place = tmp_path / str(done)
        learner = rig().learner()
        assert learner.record(place / "chat.jsonl") == Redone()
        for act in acts(learner)[:saved]:
            act()
        learner.save(place)
        for act in acts(learner)[saved:done]:
            act()

        made = rig()
        found = Learner.load(place, made.model, made.tokenizer, made.adapter)
        redone = found.record(place / "chat.jsonl")
        assert redone.records == done - saved
        assert len(redone.updates) == sum(number in (2, 5) for number in range(saved, done))
        assert redone.errors == ()
        assert same(found, learner)
        assert found.conversations.state() == learner.conversations.state()
        for act in acts(found)[done:]:
            act()
        whole = rig().learner()
        for act in acts(whole):
            act()
        assert same(found, whole), "as if nothing had happened"
        assert found.conversations.state() == whole.conversations.state()


def test_a_journal_is_not_another_learners(rig: Make, tmp_path: Path) -> None:
    learner = rig().learner()
    learner.record(tmp_path / "a.jsonl")
    learner.chat(ASK, max_new_tokens=2)
    with pytest.raises(FeatclError, match="not this learner's journal"):
        learner.record(tmp_path / "b.jsonl")


def test_a_longer_journal_of_somebody_else_is_not_done(rig: Make, tmp_path: Path) -> None:
    """What another user said must not be learned: the number of records alone does not tell whose they are."""
    for name, text in (("ada", "a cat"), ("bob", "a dog")):
        learner = rig().learner()
        learner.record(tmp_path / f"{name}.jsonl")
        reply = learner.chat(ASK, max_new_tokens=3)
        learner.feedback(reply.id, correction=text)
        learner.save(tmp_path / name)
        learner.learn()
    made = rig()
    found = Learner.load(tmp_path / "ada", made.model, made.tokenizer, made.adapter)
    with pytest.raises(FeatclError, match=r"bob\.jsonl holds 3 records, .* not this learner's journal"):
        found.record(tmp_path / "bob.jsonl")
    assert found.version == 0
    assert found.record(tmp_path / "ada.jsonl").records == 1, "the control"
    assert found.version == 1


def test_undo_goes_back_by_one_update_or_not_at_all(rig: Make, talk: Any) -> None:
    """A version that a guard holds may be far back: going there would lose more than the last update."""
    learner = rig().learner()
    learner.hold(0)
    for number in range(10):
        learner.observe(replace(talk, id=f"talk-{number}"))
    assert learner.undo() == 9
    learner.rollback(3)
    assert learner.versions == (0, 3)
    with pytest.raises(FeatclError, match="there is nothing to undo: of version 2, before the last update, nothing is"):
        learner.undo()
    assert learner.version == 3


def test_a_torn_line_is_cut_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    for number in range(3):
        journal.append_({"n": number, "text": "é\n"})
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = Journal(path)
        assert [record["n"] for record in found.records] == list(range(whole[:cut].count(b"\n")))
        found.append_({"n": 9})
        found.close()
        again = Journal(path)
        assert again.records[-1] == {"n": 9}
        again.close()
    path.write_bytes(whole.replace(b'"n": 1', b'"n": 7'))
    with pytest.raises(FeatclError, match=r"j\.jsonl:2: this line was damaged"):
        Journal(path)


@pytest.mark.parametrize("text", ['{"id": "a"}', "notes\n", "notes", '{"id": "a"}\n', "\0\0\n{}\n"])
def test_what_is_no_journal_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(FeatclError, match=r"mine\.jsonl:1: this line was damaged after it was written, or is of no"):
        Journal(path)
    assert path.read_text() == text
    path.write_bytes(b"\0\0")  # the control: of our own last line, a power cut may leave zeros
    assert len(Journal(path)) == path.stat().st_size == 0


def test_a_record_is_read_as_it_was_written_whatever_its_keys(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append_({"arguments": {10: (1, 2), 9: float("nan"), "\ud800": None}})
    journal.append_({"n": 1})
    journal.close()
    first, second = Journal(tmp_path / "j.jsonl").records
    assert first["arguments"]["10"] == [1, 2]
    assert second == {"n": 1}


@pytest.mark.parametrize("act", ["learn", "undo"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_was_interrupted_is_not_done_when_the_journal_is_done_again(
    rig: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, error: BaseException
) -> None:
    """Of two conversations the first is learned when Ctrl-C comes, or the disk is full; likewise with an undo."""
    learner = rig().learner()
    learner.record(tmp_path / "chat.jsonl")
    learner.save(tmp_path)
    for text in ("one", "two"):
        learner.feedback(learner.chat(ASK, max_new_tokens=3).id, correction=text)
    if act == "undo":
        learner.learn()
    observe = Learner.observe

    def failing(self: Learner, given: Any) -> Any:
        if act == "undo" or given.id == "chat-2":
            raise error
        return observe(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "observe" if act == "learn" else "rollback", failing)
        with pytest.raises(type(error)):
            getattr(learner, act)()
    learner.chat(ASK, max_new_tokens=2)
    made = rig()
    found = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter)
    found.record(tmp_path / "chat.jsonl")
    assert same(found, learner)
    assert found.version == (1 if act == "learn" else 2)
    assert found.conversations.state() == learner.conversations.state()
    assert [c.id for c in found.conversations.waiting] == (["chat-2"] if act == "learn" else [])
    for each in (learner, found):
        getattr(each, act)()
    assert same(found, learner), "and it can be done later"


def test_doing_again_can_be_interrupted_and_goes_on(rig: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = rig().learner()
    learner.record(tmp_path / "chat.jsonl")
    learner.save(tmp_path)
    for act in acts(learner)[:6]:
        act()
    made = rig()
    found = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter)
    observe = Learner.observe

    def interrupted(self: Learner, given: Any) -> Any:
        if given.id == "chat-2":
            raise KeyboardInterrupt
        return observe(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "observe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            found.record(tmp_path / "chat.jsonl")
    assert found.record(tmp_path / "chat.jsonl").records == 1, "the second time only what was left"
    assert same(found, learner)
    assert found.conversations.state() == learner.conversations.state()


def test_a_full_disk_leaves_journal_and_learner_as_they_were(
    rig: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = rig().learner()
    learner.record(tmp_path / "chat.jsonl")
    reply = learner.chat(ASK, max_new_tokens=2)
    before = (tmp_path / "chat.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        learner.feedback(reply.id, reward=1)
    with pytest.raises(OSError, match="No space"):
        learner.chat(ASK, max_new_tokens=2)
    monkeypatch.undo()
    assert (tmp_path / "chat.jsonl").read_bytes() == before
    assert not learner.conversations.waiting
    assert len(learner.conversations) == 1
    learner.feedback(reply.id, reward=1)
    assert len(Journal(tmp_path / "chat.jsonl")) == 2


# --- two learners on one model ---------------------------------------------------------------------------------


def encoded_directions(seed: int) -> Directions:
    """With an encoder, as `gated` needs it; most features fire on most tokens."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(4, 32, generator=generator)
    encoder = FeatureEncoder(
        W_enc=torch.randn(32, 4, generator=generator), b_enc=torch.zeros(4), b_dec=torch.zeros(32),
        threshold=torch.full((4,), 1e-3), activation="jumprelu", active=0, chosen=(0, 1, 2, 3),
    )  # fmt: skip
    return replace(Directions.from_vectors(vectors, layer=1), encoder=encoder)


def two_users(tiny: Make, kinds: tuple[str, str]) -> tuple[Any, Learner, Learner]:
    model, tokenizer = tiny("olmo2", n_layers=2)
    made = [
        constrain(model, encoded_directions(seed), kind=kind, name=name)
        for seed, (name, kind) in enumerate(zip(("ada", "bob"), kinds, strict=True))
    ]
    ada, bob = (
        Learner(model, tokenizer, adapter, lr=3e-2, objective=[{"name": "sft"}, {"name": "kl_to_base"}])
        for adapter in made
    )
    return model, ada, bob


@torch.no_grad()
def logits_of(learner: Learner) -> torch.Tensor:
    ids = torch.tensor([learner.student.chat.encode([*ASK, {"role": "assistant", "content": "a cat"}]).input_ids])
    with learner.alone():
        return learner.adapter.model(input_ids=ids, use_cache=False).logits


def taught(learner: Learner, text: str) -> tuple[Reply, Any]:
    reply = learner.chat(ASK, max_new_tokens=6, temperature=1.0)
    learner.feedback(reply.id, correction=text)
    (stats,) = learner.learn()
    return reply, stats


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_user_teaches_leaves_the_others_logits_bit_equal(tiny: Make, kind: str) -> None:
    """Interleaved on one base model, each learner is bit for bit the learner that it would be alone."""
    model, ada, bob = two_users(tiny, (kind, kind))
    said: dict[str, list[Any]] = {"ada": [], "bob": []}
    for number in range(3):
        for learner, other, text in ((ada, bob, f"a cat {number}"), (bob, ada, f"a dog {number}")):
            before = logits_of(other)
            coordinates = other.adapter.coordinates()
            reply, stats = taught(learner, text)
            said[learner.adapter.name] += [reply.token_ids, reply.logprobs, stats.loss, stats.kl, stats.losses]
            assert torch.equal(logits_of(other), before)
            assert all(torch.equal(value, coordinates[name]) for name, value in other.adapter.coordinates().items())
            assert not torch.equal(logits_of(learner), before)
    together = model_logits(model)
    assert not torch.equal(together, logits_of(ada)), "control: without `alone`, both act"
    for name, learner, seed in (("ada", ada, 0), ("bob", bob, 1)):
        alone = lone_user(tiny, kind, name, seed)
        found: list[Any] = []
        for number in range(3):
            reply, stats = taught(alone, f"a {'cat' if name == 'ada' else 'dog'} {number}")
            found += [reply.token_ids, reply.logprobs, stats.loss, stats.kl, stats.losses]
        assert found == said[name]
        assert torch.equal(logits_of(alone), logits_of(learner))


def lone_user(tiny: Make, kind: str, name: str, seed: int) -> Learner:
    model, tokenizer = tiny("olmo2", n_layers=2)
    adapter = constrain(model, encoded_directions(seed), kind=kind, name=name)
    return Learner(model, tokenizer, adapter, lr=3e-2, objective=[{"name": "sft"}, {"name": "kl_to_base"}])


@torch.no_grad()
def model_logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[256, 1, 2, 3, 4, 5, 6]])
    return model(input_ids=ids, use_cache=False).logits


def test_what_looks_at_a_learner_sees_its_adapter_alone(tiny: Make) -> None:
    """Weigher and guard work inside an update: for them too, the model is that of one user."""

    class Looks:
        max_kl = None

        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def after_update(self, learner: Learner, stats: Any) -> None:
            self.seen.append(model_logits(learner.student.scorer.causal))

        def state(self) -> dict[str, Any]:
            return {}

        def load_state_(self, state: Any) -> None: ...

    def weigh(_: Any) -> float:
        weighed.append(model_logits(found.student.scorer.causal))
        return 1.0

    def looked(learner: Learner) -> tuple[list[torch.Tensor], Looks]:
        weighed.clear()
        learner.guard = guard = Looks()  # type: ignore[assignment]
        learner.weigher = as_weigher(weigh)
        taught(learner, "a cat")
        return list(weighed), guard

    weighed: list[torch.Tensor] = []
    _, found, bob = two_users(tiny, ("both", "both"))
    taught(bob, "a dog")
    beside, guarded = looked(found)
    found = lone_user(tiny, "both", "ada", 0)
    alone, guarded_alone = looked(found)
    assert len(beside) == len(alone) == len(guarded.seen) == 1
    assert torch.equal(beside[0], alone[0])
    assert torch.equal(guarded.seen[0], guarded_alone.seen[0])
    assert not torch.equal(beside[0], guarded.seen[0])


def test_two_kinds_side_by_side(tiny: Make) -> None:
    _, ada, bob = two_users(tiny, ("write", "gated"))
    before = logits_of(bob)
    taught(ada, "a cat")
    assert torch.equal(logits_of(bob), before)
    after = logits_of(ada)
    taught(bob, "a dog")
    assert torch.equal(logits_of(ada), after)


def test_an_error_inside_switches_the_others_on_again(tiny: Make) -> None:
    model, ada, bob = two_users(tiny, ("both", "both"))
    taught(ada, "a cat")
    taught(bob, "a dog")
    together = model_logits(model)
    reply = ada.chat(ASK, max_new_tokens=2)
    ada.feedback(reply.id, correction="x")
    ada.reconfigure(lr=1e30)
    with pytest.raises(FeatclError, match=r"not changed|is nan|is inf"):
        ada.learn()
    assert torch.equal(model_logits(model), together)
    assert all(parameter.requires_grad for parameter in bob.adapter.parameters())


def test_with_one_adapter_nothing_is_switched(rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig()
    monkeypatch.setattr(type(made.adapter), "_switched_off", lambda _: pytest.fail("a switch with nothing to switch"))
    with only(made.adapter), only(made.adapter):
        pass
    assert list(adapters_of(made.model)) == ["default"]


def test_ids_and_users_tell_two_learners_apart(tiny: Make) -> None:
    _, ada, bob = two_users(tiny, ("write", "write"))
    replies = [learner.chat(ASK, max_new_tokens=2) for learner in (ada, bob)]
    assert [reply.id for reply in replies] == ["ada-chat-1", "bob-chat-1"]
    with pytest.raises(FeatclError, match="no conversation 'ada-chat-1'"):
        bob.feedback(replies[0].id, reward=1)
    ada.feedback(replies[0].id, reward=1)
    assert ada.conversations[replies[0].id].trajectory("ada").user == "ada"
