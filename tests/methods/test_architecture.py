"""The architecture group in a learner: tasks, versions, checkpoints and answers, with every kind of adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.adapters import constrain
from featcl.adapters.full import constrain_full
from featcl.adapters.mixture import constrain_mixture
from featcl.errors import FeatclError
from featcl.learning import Learner
from featcl.methods.method import Method
from featcl.methods.persona_and_task import PersonaAndTask
from featcl.methods.progressive import Progressive
from featcl.methods.routed import START, Routed
from featcl.streams import Trajectory
from tests.conftest import tiny_model, tiny_tokenizer
from tests.methods.coins import same_tensors
from tests.objectives.conftest import directions

ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: constrain(model, directions(4), kind="none"),
    "write": lambda model: constrain(model, directions(4), kind="write"),
    "full": constrain_full,
    "mixture": lambda model: constrain_mixture(model, layers=[0, 1], rank=2),
}
LR = {"full": 1e-3, "write": 3e-2}


def said(task: str, number: int, content: str, reply: str) -> Trajectory:
    asked = {"role": "user", "content": content}
    return Trajectory(f"{task}{number}", task=task, messages=(asked, {"role": "assistant", "content": reply}))


TASKS = {
    "low": [said("low", n, "abcdefghabcdefgh"[n:], "it is red") for n in range(3)],
    "digits": [said("digits", n, "0123456701234567"[n:], "no idea") for n in range(3)],
}


def learner_of(kind: str, method: Method | None, family: str = "olmo2", **options: Any) -> Learner:
    model = tiny_model(family, n_layers=2)
    methods = () if method is None else (method,)
    settings = {"lr": LR.get(kind, 1e-2), "methods": methods, **options}
    return Learner(model, tiny_tokenizer(family), ADAPTERS[kind](model), **settings)


def learn_(learner: Learner, task: str, *, rounds: int = 2) -> None:
    learner.begin_task(task, upcoming=TASKS[task])
    for _ in range(rounds):
        for trajectory in TASKS[task]:
            learner.observe(trajectory)
    learner.end_task(task, TASKS[task])


@torch.no_grad()
def logits(learner: Learner, task: str) -> Tensor:
    scorer = learner.student.scorer
    batches = [batch for each in TASKS[task] for batch in learner._experience(each)[0].batches]
    return torch.cat([scorer.head(scorer.hidden(batch)) for batch in batches])


def loss(learner: Learner, task: str) -> float:
    batches = [batch for each in TASKS[task] for batch in learner._experience(each)[0].batches]
    return float(torch.nn.functional.cross_entropy(logits(learner, task), torch.cat([b.targets for b in batches])))


def everything(learner: Learner) -> dict[str, Tensor]:
    """All that a version is."""
    last = learner.present
    return {**last.coordinates, **last.moments, **last.tensors}


@pytest.mark.parametrize("kind", ["full", "mixture"])
@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_a_learner_learns_with_these_kinds_and_returns_exactly(kind: str, family: str) -> None:
    learner = learner_of(kind, None, family)
    before, base = loss(learner, "low"), logits(learner, "low")
    learner.observe(TASKS["low"][0])
    version, held, here = learner.version, everything(learner), logits(learner, "low")
    for _ in range(6):
        learner.observe(TASKS["low"][1])
    assert loss(learner, "low") < before - 0.3
    assert learner.adapter.delta_norm() > 0
    with learner.adapter.disabled():
        assert torch.equal(logits(learner, "low"), base)
    learner.rollback(version)
    assert same_tensors(everything(learner), held)
    assert torch.equal(logits(learner, "low"), here)


@pytest.mark.parametrize("kind", ["full", "mixture"])
def test_the_trust_region_and_the_anchor_hold_with_these_kinds(kind: str) -> None:
    free = learner_of(kind, None).observe(TASKS["low"][0])
    bounded = learner_of(kind, None, max_kl_per_update=free.kl / 10).observe(TASKS["low"][0])
    assert 0.0 < bounded.kl <= free.kl / 10
    assert bounded.step_scale < 1.0
    anchored = learner_of(kind, None, objective=[{"name": "sft"}, {"name": "kl_to_base", "weight": 1.0}])
    first, *_, last = [anchored.observe(TASKS["low"][0]) for _ in range(3)]
    (name,) = (name for name in first.losses if "base" in name)
    assert abs(first.losses[name]) < 1e-6  # the model is its own base
    assert last.losses[name] > 1e-4


@pytest.mark.parametrize("kind", ["full", "mixture"])
def test_a_checkpoint_of_these_kinds_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole, part = learner_of(kind, None), learner_of(kind, None)
    for learner in (whole, part):
        learner.observe(TASKS["low"][0])
    part.save(tmp_path)
    model = tiny_model(n_layers=2)
    loaded = Learner.load(tmp_path, model, tiny_tokenizer(), ADAPTERS[kind](model))
    for learner in (whole, loaded):
        learner.observe(TASKS["digits"][0])
    assert same_tensors(everything(loaded), everything(whole))


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_with_the_oracle_a_learner_of_any_kind_forgets_nothing(kind: str) -> None:
    found = {}
    for method in (Routed(router="oracle"), None):
        learner = learner_of(kind, method)
        base = logits(learner, "low")
        learn_(learner, "low")
        at_end = logits(learner, "low")
        learn_(learner, "digits")
        own = everything(learner)
        asked = [TASKS[task][0].messages[:1] for task in ("low", "digits", "low")]
        groups = learner.answering().grouped(asked, ["low", "digits", "another"])
        if method is not None:
            states = dict(groups)
            assert set(states) == {(0,), (1,), (2,)}
            with states[0,]:
                assert torch.equal(logits(learner, "low"), at_end)
            with states[2,]:
                assert torch.equal(logits(learner, "low"), base)
            with learner.answering().grouped(asked[:1], ["low"])[0][1]:
                found["routed"] = logits(learner, "low") - at_end
        else:
            assert [places for places, _ in groups] == [(0, 1, 2)]
            found["plain"] = logits(learner, "low") - at_end
        assert same_tensors(everything(learner), own)
    assert not found["routed"].any()
    assert float(found["plain"].abs().max()) > 0.05  # negative control


@pytest.mark.parametrize("router", ["nearest", "learned"])
def test_a_learner_sends_questions_to_the_task_that_they_look_like(router: str) -> None:
    learner = learner_of("none", Routed(router=router))
    learn_(learner, "low")
    at_end = logits(learner, "low")
    learn_(learner, "digits")
    asked = [({"role": "user", "content": text},) for text in ("hgfedcbahgfedc", "76543210765432", "cdefghabcdef")]
    groups = dict(learner.answering().grouped(asked))
    assert set(groups) == {(0, 2), (1,)}
    with groups[0, 2]:
        assert torch.equal(logits(learner, "low"), at_end)
    cost = learner.cost()["routed"]
    coordinates = sum(tensor.nbytes for tensor in learner.adapter.coordinates().values())
    assert cost.stored_bytes == 3 * coordinates + 6 * 32 * 4  # the start, two tasks, six vectors
    assert cost.forward_tokens == sum(
        len(learner.student.chat.prompt(each.messages[:1])) for task in TASKS.values() for each in task
    )


@pytest.mark.parametrize("made", [lambda: Routed(router="learned"), Progressive, PersonaAndTask])
def test_methods_are_saved_resumed_and_rolled_back_with_the_learner(made: Callable[[], Method], tmp_path: Path) -> None:
    whole, part = learner_of("none", made()), learner_of("none", made())
    for learner in (whole, part):
        learn_(learner, "low")
    held, version, state = everything(part), part.version, part.methods.state()
    part.begin_task("digits")
    part.observe(TASKS["digits"][0])
    assert part.methods.state() != state
    part.rollback(version)  # beyond the beginning of the task
    assert same_tensors(everything(part), held)
    assert part.methods.state() == state
    part.save(tmp_path)
    model = tiny_model(n_layers=2)
    loaded = Learner.load(tmp_path, model, tiny_tokenizer(), ADAPTERS["none"](model), methods=(made(),))
    for learner in (whole, loaded):
        learn_(learner, "digits")
    assert same_tensors(everything(loaded), everything(whole))
    assert loaded.methods.state() == whole.methods.state()
    assert loaded.cost() == whole.cost()
    assert whole.cost()[whole.methods[0].name].stored_bytes > 0


def test_what_is_frozen_stays_while_a_learner_goes_on() -> None:
    for method in (Progressive(), PersonaAndTask()):
        learner = learner_of("none", method)
        learn_(learner, "low")
        at_end = logits(learner, "low")
        learner.begin_task("digits")
        assert torch.allclose(logits(learner, "low"), at_end, atol=1e-4)
        kept = {name: t for name, t in learner.adapter.coordinates().items() if ".kept_" in name}
        assert learner.cost()[method.name].stored_bytes == sum(tensor.nbytes for tensor in kept.values()) > 0
        for trajectory in TASKS["digits"]:
            learner.observe(trajectory)
        assert not torch.allclose(logits(learner, "low"), at_end, atol=1e-3)
        now = learner.adapter.coordinates()
        assert same_tensors({name: now[name] for name in kept}, kept)
        assert learner.present.moments  # the optimizer started anew, on the new LoRA


@pytest.mark.parametrize("kind", ["full", "mixture"])
@pytest.mark.parametrize("method", [Progressive(), PersonaAndTask()])
def test_a_learner_without_lora_is_refused(kind: str, method: Method) -> None:
    with pytest.raises(FeatclError, match=f"{method.name}: kind '{kind}' is no LoRA"):
        learner_of(kind, method)


def test_a_layer_that_is_not_there_is_refused_when_the_learner_is_made() -> None:
    with pytest.raises(FeatclError, match="layer 7 is out of range"):
        learner_of("none", Routed(layer=7))


def test_without_a_task_the_oracle_leaves_the_present_adapter() -> None:
    learner = learner_of("none", Routed(router="oracle"))
    learn_(learner, "low")
    method, asked = learner.methods[0], TASKS["digits"][0].messages[:1]
    assert method.route(asked, None, learner.view()) is None
    assert method.route(asked, "low", learner.view()) is None
    assert method.route(asked, "digits", learner.view()) == START
