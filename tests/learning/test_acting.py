"""A learner that acts: on-policy, leaves no trace, and a resumed stream goes on as if it had never stopped."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch

import featcl
from featcl.errors import FeatclError
from featcl.learning import Learner
from featcl.learning.acting import Rounds, play_round
from featcl.methods.in_context import InContext
from featcl.streams import Trajectory
from featcl.streams.environments import Planned, Step

SHORT: dict[str, Any] = {"max_turns": 3, "max_new_tokens": 4}
SAID = ({"role": "user", "content": "seven?"}, {"role": "assistant", "content": "seven is a number"})


@dataclass
class Echo:
    """Two requests; the reward is the share of replies with an `e` in them."""

    tools: tuple[Any, ...] = ()
    task: str = "echo"
    context: str = "say e"
    heard: list[str] = field(default_factory=list)

    def reset(self, seed: int) -> tuple[dict[str, Any], ...]:
        self.heard = []
        return ({"role": "user", "content": f"say {seed}"},)

    def step(self, reply: str) -> Step:
        self.heard.append(reply)
        reward = sum("e" in heard for heard in self.heard) / 2
        done = len(self.heard) == 2
        return Step(() if done else ({"role": "user", "content": "again"},), reward, done)


@dataclass(frozen=True)
class Task:
    seeds: tuple[int, ...] = tuple(range(100, 112))

    def make(self) -> Echo:
        return Echo()


def environments(number: int = 3) -> list[Echo]:
    return [Echo() for _ in range(number)]


def stream(learner: Learner, **options: Any) -> Any:
    return featcl.environment_stream(learner, environments(), **{"seeds": count(), **SHORT, **options})


def coordinates(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.adapter.coordinates().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def own_logprobs(model: Any, trajectory: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
    """Logged and recomputed log-probabilities of the model's own tokens."""
    ids, own = torch.tensor([trajectory.token_ids]), torch.tensor(trajectory.token_mask)[1:]
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return torch.tensor(trajectory.logprobs)[1:][own], scores[own]


def test_the_present_version_acts(rig: Callable[..., Any], talk: Trajectory) -> None:
    learner = rig().learner(lr=0.3)
    learner.observe(talk)
    played = learner.act(environments(), [4, 5], **SHORT)
    assert [t.adapter_version for t in played] == [1, 1]
    for trajectory in played:
        logged, now = own_logprobs(learner.adapter.model, trajectory)
        torch.testing.assert_close(logged, now, atol=1e-4, rtol=1e-5)
        with learner.adapter.disabled():
            _, base = own_logprobs(learner.adapter.model, trajectory)
        assert (logged - base).abs().max() > 1e-2, "control: the base model is another one"


def test_acting_changes_nothing_and_repeats_itself(rig: Callable[..., Any], talk: Trajectory) -> None:
    learner = rig().learner()
    learner.observe(talk)
    before, state = coordinates(learner), torch.random.get_rng_state()
    first = learner.act(environments(), range(4), **SHORT)
    assert [t.to_record() for t in learner.act(environments(1), range(4), **SHORT)] != [], "any number of environments"
    assert [t.to_record() for t in learner.act(environments(), range(4), **SHORT)] == [t.to_record() for t in first]
    assert equal(before, coordinates(learner))
    assert torch.equal(state, torch.random.get_rng_state())
    assert learner.version == 1
    other = learner.act(environments(), range(4), purpose="another", **SHORT)
    assert [t.token_ids for t in other] != [t.token_ids for t in first]


def test_what_is_learned_from_are_the_sampled_tokens(rig: Callable[..., Any]) -> None:
    """The first loss is the mean surprise of the model's own tokens, at the probabilities that were logged."""
    learner = rig().learner()
    [played] = learner.act(environments(1), [7], **SHORT)
    own = [p for p, mine in zip(played.logprobs or (), played.token_mask or (), strict=True) if mine]
    assert learner.observe(played).loss == pytest.approx(-sum(own) / len(own), abs=1e-4)


def test_samples_of_one_opening_know_each_others_rewards(rig: Callable[..., Any]) -> None:
    played = rig().learner().act(environments(), [1, 1, 1, 2], **SHORT)
    rewards = [t.reward for t in played]
    assert [t.meta["group_rewards"] for t in played] == [rewards[:3]] * 3 + [rewards[3:]]
    assert played[0].meta["context"] == "say e"
    assert len({t.token_ids for t in played[:3]}) > 1


def test_a_stream_is_at_most_one_round_old(rig: Callable[..., Any]) -> None:
    learner = rig().learner()
    seen = []
    for trajectory in islice(stream(learner), 8):
        seen.append((trajectory.adapter_version, learner.version))
        learner.observe(trajectory)
    assert seen == [(0, 0), (0, 1), (0, 2), (3, 3), (3, 4), (3, 5), (6, 6), (6, 7)]


def test_a_stream_ends_with_its_seeds_and_groups_its_samples(rig: Callable[..., Any]) -> None:
    played = list(stream(rig().learner(), seeds=range(4), samples=2))
    assert [t.meta["seed"] for t in played] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(len(t.meta["group_rewards"]) == 2 for t in played)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(
    rig: Callable[..., Any], tmp_path: Path, stop: int
) -> None:
    def go(learner: Learner, source: Any, number: int) -> None:
        for trajectory in islice(source, number):
            learner.observe(trajectory)

    whole = rig().learner(lr=0.1)
    go(whole, stream(whole, folder=tmp_path / "whole"), 8)
    first = rig().learner(lr=0.1)
    go(first, stream(first, folder=tmp_path / "a"), stop)
    first.save(tmp_path / "state")

    def resumed(folder: Path | None) -> Learner:
        fresh = rig()
        learner = Learner.load(tmp_path / "state", fresh.model, fresh.tokenizer, fresh.adapter)
        go(learner, stream(learner, folder=folder, position=stop), 8 - stop)
        return learner

    assert equal(coordinates(resumed(tmp_path / "a")), coordinates(whole))
    inside_a_round = stop % 3 != 0
    assert equal(coordinates(resumed(None)), coordinates(whole)) is not inside_a_round, (
        "control: without the folder, a round that was begun is played again by a later version"
    )


def test_rounds_are_read_back_exactly_and_foreign_ones_are_refused(rig: Callable[..., Any], tmp_path: Path) -> None:
    learner = rig().learner()
    played = play_round(learner, environments(), [1, 2], name="r", folder=tmp_path, **SHORT)
    learner.version = 5  # would draw otherwise
    assert play_round(learner, environments(), [1, 2], name="r", folder=tmp_path, **SHORT) == played
    with pytest.raises(FeatclError, match="other episodes"):
        play_round(learner, environments(), [1, 3], name="r", folder=tmp_path, **SHORT)
    (tmp_path / "r.jsonl").write_text("{torn")
    with pytest.raises(FeatclError, match=r"r\.jsonl: not a round"):
        play_round(learner, environments(), [1, 2], name="r", folder=tmp_path, **SHORT)
    assert [Trajectory.from_record(t.to_record()) for t in played] == played


def test_rounds_of_a_run(rig: Callable[..., Any], tmp_path: Path) -> None:
    learner = rig().learner()
    rounds = Rounds(learner, {"echo": Task()}, tmp_path, at_once=4, samples=2, source="lab", **SHORT)
    first = [rounds.trajectory(Planned("echo", index)) for index in range(4)]
    assert [t.meta["seed"] for t in first] == [100, 100, 101, 101]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["echo-0-000000.jsonl"]
    later = rounds.trajectory(Planned("echo", 6), phase=1)
    assert later.meta["seed"] == 103
    assert (tmp_path / "echo-1-000001.jsonl").is_file()
    lines = (tmp_path / "echo-0-000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [t.id for t in first]


@dataclass
class Liking:
    """Likes small letters: the reward is their share of six. With `noise` it is drawn at random, in each its own."""

    noise: int | None = None
    tools: tuple[Any, ...] = ()

    def reset(self, seed: int) -> tuple[dict[str, Any], ...]:
        self.rng = random.Random(f"{seed}/{self.noise}")
        return ({"role": "user", "content": f"say {seed % 10}"},)

    def step(self, reply: str) -> Step:
        share = sum(letter in string.ascii_lowercase for letter in reply) / 6
        return Step((), share if self.noise is None else self.rng.random(), True)


@pytest.mark.slow
def test_what_is_rewarded_is_done_more_often(rig: Callable[..., Any]) -> None:
    """Measured: 0.12 before, 0.39 after 320 updates; with random rewards 0.09."""

    def learned(noise: bool) -> tuple[float, float]:
        learner = rig(kind="none").learner(lr=3e-2, objective={"name": "policy", "kl_weight": 0})
        played = featcl.environment_stream(
            learner,
            [Liking(place if noise else None) for place in range(8)],
            seeds=count(),
            samples=8,
            max_new_tokens=6,
        )
        before = liked(learner)
        for trajectory in islice(played, 320):
            learner.observe(trajectory)
        return before, liked(learner)

    def liked(learner: Learner) -> float:
        played = learner.act([Liking() for _ in range(64)], range(1000, 1064), max_new_tokens=6, purpose="test")
        return sum(t.reward or 0.0 for t in played) / len(played)

    before, after = learned(noise=False)
    assert after > 2 * before
    assert learned(noise=True)[1] < 1.5 * before, "control: rewards that say nothing teach nothing"


def test_bad_settings(rig: Callable[..., Any]) -> None:
    learner = rig().learner()
    with pytest.raises(FeatclError, match="no setting 'turns'"):
        learner.act(environments(), [0], turns=3)
    with pytest.raises(FeatclError, match="samples"):
        stream(learner, samples=0)
    with pytest.raises(FeatclError, match="temperature"):
        stream(learner, temperature=-1.0)
    with pytest.raises(FeatclError, match="at least one environment"):
        featcl.environment_stream(learner, [], seeds=[0])


def test_it_acts_with_what_methods_put_in_front_and_records_the_conversation(rig: Callable[..., Any]) -> None:
    def played(*methods: Any) -> Trajectory:
        learner = rig().learner(methods=methods)
        learner.observe(Trajectory("told", messages=SAID))
        [trajectory] = learner.act([Echo()], [7], temperature=0.0, **SHORT)
        assert trajectory.task == "echo"
        assert trajectory.meta["context"] == "say e"
        return trajectory

    memory = InContext()
    with_it, without = played(memory), played(InContext(frozen=True, tokens=1))
    assert [message["content"] for message in with_it.messages[:1]] == ["say 7"]
    assert [message["role"] for message in with_it.messages] == ["user", "assistant", "user", "assistant"]
    assert with_it.token_ids is not None
    assert without.token_ids is not None
    text = rig().tokenizer.decode(list(with_it.token_ids))
    assert "seven is a number" in text
    assert "seven is a number" not in rig().tokenizer.decode(list(without.token_ids))  # negative control
