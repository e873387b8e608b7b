"""What a run measures, part by part: experiences before they are learned, costs, tiers, segments, relations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from featcl.adapters import constrain
from featcl.errors import FeatclError
from featcl.evaluation.cost import CostMeter
from featcl.evaluation.harness import HarnessResult, HarnessTier
from featcl.evaluation.measures import (
    EVALUATION,
    LEARNING,
    BeforeLearning,
    HarnessMeasure,
    LeakMeasure,
    Measures,
    Place,
    ShiftMeasure,
    Spending,
    ability,
)
from featcl.evaluation.measures.before import _runs
from featcl.evaluation.relations import Relations, lab_relations
from featcl.evaluation.scoring import heldout_nll
from featcl.features import Directions
from featcl.lab.streams import STREAMS
from featcl.lab.tasks import CHANGES, TASKS
from featcl.streams import Encoded, Trajectory
from tests.evaluation import toys

BASE, FIRST, LAST = Place("base", 0, last=False), Place("a", 1, last=False), Place("b", 2, last=True)


def adapted(network: Any, *, size: float = 0.0) -> Any:
    adapter = constrain(network, Directions.from_vectors(torch.eye(32)[:4], layer=1), kind="both")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return adapter


# --- before learning


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any, list[Trajectory]]:
    """A model that answers two questions, and three conversations: both right, the second reply wrong, both wrong."""
    chat = toys.chat()
    known = [toys.item("0", "w0 w1", "w2 w3"), toys.item("1", "w4", "w5 w6 w7")]
    network = toys.teach(toys.model(), chat, known)
    said = {"right": ("w2 w3",), "other": ("w5 w6",), "wrong": ("w9 w8",)}
    experiences = []
    for name, (reply,) in said.items():
        messages = ({"role": "user", "content": "w0 w1"}, {"role": "assistant", "content": reply})
        experiences.append(Trajectory(name, source="s", task="t", messages=messages))
    return network, chat, experiences


def before(adapter: Any, chat: Any, tasks: dict[str, Sequence[Trajectory]], **more: Any) -> BeforeLearning:
    settings: dict[str, Any] = {"length": 64, "max_windows": 8, "mask": "assistant", "answering": lambda: None}
    return BeforeLearning(adapter, chat, tasks, **{**settings, **more})


def test_an_experience_is_scored_by_its_replies_and_by_its_likelihood(taught: Any) -> None:
    network, chat, experiences = taught
    adapter = adapted(network)
    found = {each.id: before(adapter, chat, {"t": experiences}).score(each, "t") for each in experiences}
    assert [found[name]["online/score"] for name in ("right", "other", "wrong")] == [1.0, 0.0, 0.0]
    for each in experiences:
        encoded = chat.encode(each.messages)
        [nll] = heldout_nll(network, [encoded])
        assert found[each.id]["online/nll"] == pytest.approx(nll, rel=1e-5)
        assert found[each.id]["online/base_nll"] == pytest.approx(nll, rel=1e-5), "nothing was learned yet"
        assert found[each.id]["online/tokens"] == sum(encoded.loss_mask)
    assert found["right"]["online/nll"] < found["wrong"]["online/nll"]
    adapter.remove()


def test_the_base_model_stays_what_it_was_while_the_model_learns(taught: Any) -> None:
    network, chat, experiences = taught
    adapter = adapted(network)
    scorer = before(adapter, chat, {"t": experiences})
    first = scorer.score(experiences[0], "t")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    moved = [each.score(experiences[0], "t") for each in (scorer, before(adapter, chat, {"t": experiences}))]
    assert moved[0] == moved[1], "resumed in the middle of a task, it says the same"
    assert moved[0]["online/base_nll"] == first["online/base_nll"]
    assert abs(moved[0]["online/nll"] - first["online/nll"]) > 0.01
    adapter.remove()


def test_two_replies_count_one_by_one_and_text_has_none(taught: Any) -> None:
    network, chat, experiences = taught
    adapter = adapted(network)
    right, wrong = experiences[0].messages, experiences[2].messages
    both = Trajectory("both", source="s", task="t", messages=(*wrong, *right))
    text = Trajectory("text", source="s", task="t", text="w1 w2 w3")
    scorer = before(adapter, chat, {"t": [both, text]})
    found = scorer.score(both, "t")
    window = chat.encode(both.messages)
    assert len(_runs(window.loss_mask)) == 2
    assert sum(_runs(window.loss_mask)) == found["online/tokens"]
    assert found["online/score"] in (0.0, 0.5)  # the second is right where the first does not mislead
    assert "online/score" not in scorer.score(text, "t")
    assert scorer.score(text, "t")["online/nll"] > 0
    environment = before(adapter, chat, {"t": [both]}, mask="environment").score(both, "t")
    assert "online/score" not in environment, "what others say is no reply"
    adapter.remove()


def test_an_episode_that_was_played_has_its_reward(taught: Any) -> None:
    network, chat, experiences = taught
    adapter = adapted(network)
    scorer = before(adapter, chat, {"t": []})
    played = Trajectory("p", source="s", task="t", messages=experiences[0].messages, reward=0.25)
    assert scorer.score(played, "t") == {"online/score": 0.25}
    assert scorer.score(experiences[0], "t") == {}
    adapter.remove()


class InFront:
    """A method that says the answer in front, and one that acts around the forward pass."""

    def __init__(self, messages: Sequence[Any]) -> None:
        self.messages, self.entered = tuple(messages), 0

    def asked(self, messages: Sequence[Any], task: str | None = None) -> Sequence[Any]:
        return (*self.messages, *messages)

    def grouped(self, conversations: Sequence[Any], tasks: Sequence[Any]) -> list[Any]:
        return [((0,), self.around())]

    @contextmanager
    def around(self) -> Iterator[None]:
        self.entered += 1
        yield


def test_methods_have_their_say(taught: Any) -> None:
    network, chat, experiences = taught
    adapter = adapted(network)
    method = InFront(experiences[1].messages)
    plain = before(adapter, chat, {"t": experiences}).score(experiences[0], "t")
    found = before(adapter, chat, {"t": experiences}, answering=lambda: method).score(experiences[0], "t")
    assert method.entered == 1
    assert found["online/tokens"] == plain["online/tokens"], "what stands in front is no target"
    assert found["online/nll"] != plain["online/nll"]
    assert found["online/base_nll"] == plain["online/base_nll"], "the base model has no methods"
    adapter.remove()


@pytest.mark.parametrize(
    ("mask", "runs"),
    [([0, 1, 1, 0, 1], [2, 1]), ([1, 1, 0, 0], [1]), ([1, 0, 0], []), ([0, 1, 1, 1], [3]), ([0, 0, 1], [1])],
)
def test_runs_of_targets(mask: list[int], runs: list[int]) -> None:
    assert _runs([bool(each) for each in mask]) == runs


# --- costs


def step(adapter: Any) -> None:
    adapter.model(input_ids=torch.arange(8)[None], use_cache=False).logits.logsumexp(-1).sum().backward()


def interrupted(adapter: Any) -> None:
    step(adapter)
    raise KeyboardInterrupt


def test_costs_are_told_once_and_what_fails_costs_nothing() -> None:
    adapter = adapted(toys.model())
    with CostMeter(adapter.model) as meter:
        spending = Spending(meter)
        with spending.phase(LEARNING):
            step(adapter)
        first = spending.spent()
        assert first["cost/read_tokens"] == 8
        assert first["cost/backward_flops"] > 0
        assert set(spending.spent().values()) == {0}, "it was told already"
        with spending.phase(EVALUATION), torch.no_grad():
            adapter.model(input_ids=torch.arange(8)[None], use_cache=False)
        assert set(spending.spent().values()) == {0}, "evaluation is no learning"
        before = dict(meter.costs)
        with pytest.raises(KeyboardInterrupt), spending.phase(LEARNING):
            interrupted(adapter)
        assert meter.costs == before
        totals = spending.totals()
        assert totals["cost/train_flops"] == first["cost/forward_flops"] + first["cost/backward_flops"]
        assert totals["cost/evaluation_flops"] == first["cost/forward_flops"]
        assert set(spending.summary()[LEARNING]) == {"tokens", "passes", "flops"}, "what the same seed repeats"
        again = Spending(meter)
        again.load_(spending.to_dict())
        assert set(again.spent().values()) == {0}
        with pytest.raises(FeatclError, match="no cost that was saved"):
            again.load_({"learning": {}})


# --- tiers, segments


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """(tier, state) of every call, in the place of the harness."""
    calls: list[tuple[str, str | None]] = []

    def evaluate(_model: Any, _tokenizer: Any, tier: HarnessTier, *, state: str | None, **_: Any) -> HarnessResult:
        calls.append((tier.name, state))
        return HarnessResult(tier.name, {"t": {"acc": 0.5}}, {}, {}, "")

    monkeypatch.setattr(ability, "evaluate_harness", evaluate)
    monkeypatch.setattr(ability, "require_tasks", lambda *_: None)
    return calls


def test_every_tier_has_its_occasions(asked: list[tuple[str, str | None]], tmp_path: Any) -> None:
    adapter = adapted(toys.model())
    tiers = [HarnessTier(name) for name in ("smoke", "quick", "full")]
    harness = HarnessMeasure(adapter, None, tiers, cache=tmp_path)
    measures = Measures(LeakMeasure(adapter, toys.chat().tokenizer, ["w1 w2 w3"]), [harness])
    reading = measures.at_row(BASE)
    assert [tier for tier, _ in asked] == ["smoke", "quick", "full"]
    assert {"general/smoke/t/acc", "general/quick/t/acc", "general/full/t/acc"} <= set(reading.record)
    assert "seconds/harness" in reading.record
    measures.at_row(FIRST)
    assert measures.smoke() == {"general/smoke/t/acc": 0.5}
    measures.at_row(LAST)
    assert [tier for tier, _ in asked[3:]] == ["quick", "smoke", "quick", "full"]
    assert {state for _, state in asked} == {None}, "the base model's results are those of the base model"
    with torch.no_grad():
        adapter.parameters()[0].add_(1.0)
    measures.at_row(FIRST)
    assert asked[-1][1] is not None
    only = HarnessMeasure(adapter, None, [HarnessTier("full")])
    assert Measures(measures.leak, [only]).smoke() == {}
    assert only.at_row(FIRST).record == {}


def segment(first: int, count: int = 4) -> list[Encoded]:
    return [Encoded([1, first + n, first + n + 1, 5], [False, True, True, True]) for n in range(count)]


def test_a_row_has_the_distance_of_its_own_task() -> None:
    adapter = adapted(toys.model())
    segments = {"a": segment(10), "b": segment(20), "c": segment(30)}
    shift = ShiftMeasure(adapter.model, segments)
    start = shift.at_row(BASE)
    assert start.record == {}
    columns, rows = start.tables["shift"]
    assert [row[:2] for row in rows] == [["a", "b"], ["b", "c"]]
    assert shift.at_row(FIRST).record == {}, "nothing came before the first task"
    found = shift.at_row(LAST).record
    assert found["shift/gradient"] == rows[0][list(columns).index("gradient")] > 0.05
    resumed = ShiftMeasure(adapter.model, segments)
    resumed.resume_(["base", "a"], lambda _: [list(row) for row in rows])
    assert resumed.at_row(LAST).record == found
    assert resumed.known == shift.known
    with pytest.raises(FeatclError, match=r"tables/shift\.json of this run is missing"):
        ShiftMeasure(adapter.model, segments).resume_(["base"], lambda _: [])
    same = ShiftMeasure(adapter.model, {"a": segment(10), "b": segment(10)})
    same.at_row(BASE)
    assert same.known.gradient == 0.0, "control: the same segment twice"


def test_what_cannot_be_compared_is_known_before() -> None:
    model = adapted(toys.model()).model
    for segments, layers, message in (
        ({"a": segment(1)}, None, "1 segment"),
        ({"a": segment(1), "b": segment(1, 1)}, None, "'b' has 1 sequence"),
        ({"a": segment(1), "b": segment(2)}, [5], "layer 5 is out of range"),
        ({"a": segment(1), "b": segment(2)}, [], "list is empty"),
    ):
        with pytest.raises(FeatclError, match=message):
            ShiftMeasure(model, segments, layers=layers)


# --- relations of the laboratory


def test_relations_name_columns_of_their_streams() -> None:
    found: dict[str, Relations] = {}
    for name, (tasks, probes) in STREAMS.items():
        found[name] = lab_relations((*tasks, *probes))
        found[name].check((*tasks, *probes))
    assert found["lab/labels"].across == {"labels_across": ("labels_first", "labels_last")}
    assert found["lab/related"].related == (("related_first", "related_second"),)
    assert found["lab/changes"].contradicts == {"facts_changed": "home_facts", "library_changed": "code_library"}
    assert set(found["lab/composition"].composed) == set(STREAMS["lab/composition"][1])
    assert len(found["lab/composition"].named) == 2
    assert found["lab/home"] == Relations()
    everything = lab_relations((*TASKS, *CHANGES))
    for part in ("composed", "named", "across", "related", "contradicts"):
        own = [getattr(each, part) for each in found.values() if getattr(each, part)]
        assert own == [getattr(everything, part)], "every relation is one of a stream's"
    without = lab_relations([name for name in (*TASKS, *CHANGES) if name != "home_facts"])
    assert "style_and_fact" not in without.composed
    assert "facts_changed" not in without.contradicts
