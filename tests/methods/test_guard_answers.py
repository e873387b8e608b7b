"""The guard sees the model as it answers: by the adapter that a question is routed to, with what stands in front."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.evaluation.canaries import Canaries
from featcl.evaluation.pool import Pool, item_pool, text_pool
from featcl.lab.items import Item
from featcl.learning.guard import CanaryGuard
from featcl.methods.in_context import InContext
from featcl.methods.method import Method
from featcl.methods.routed import Routed
from featcl.streams.rollouts import generate
from tests.methods.test_architecture import TASKS, learner_of


def general(learner: Any, count: int = 1000) -> list[Item]:
    """Questions of no task, each with the first tokens that the base model would say."""
    chat, causal = learner.student.chat, learner.student.scorer.causal
    asked = [({"role": "user", "content": f"{n:03d} {n % 7}"},) for n in range(count)]
    said: list[list[int]] = []
    for start in range(0, count, 250):
        prompts = [chat.prompt(messages) for messages in asked[start : start + 250]]
        said += generate(causal, prompts, max_new_tokens=1, temperature=0.0).token_ids
    letters = ["".join(character for character in chat.decode_reply(ids) if character.isascii()) for ids in said]
    return [Item(f"g{n}", "general", asked[n], letters[n].strip() or "a") for n in range(count)]


def guarded(method: Method | None, **settings: Any) -> Any:
    """A wild learner with a guard on what the base model, which is sure of little, would say."""
    learner = learner_of("none", method, lr=0.3)
    pool = item_pool(learner.adapter.model, learner.student.chat, general(learner), measure="tokens")
    learner.guard = CanaryGuard(pool, **{"every": 1, "items": 64, "tolerance": 1e-4, **settings})
    return learner


def alarms(learner: Any) -> int:
    for task, trajectories in TASKS.items():
        learner.begin_task(task, upcoming=trajectories)
        for trajectory in trajectories * 3:
            learner.observe(trajectory)
        learner.end_task(task, trajectories)
    return learner.guard.alarms


def test_what_the_oracle_sends_to_the_start_raises_no_alarm() -> None:
    """General questions are answered as before anything was learned, whatever the present task's adapter would say."""
    assert alarms(guarded(None)) > 0, "negative control: without a router the same learning destroys them"
    routed = guarded(Routed(router="oracle"))
    assert alarms(routed) == 0
    pool, model, some = routed.guard.pool, routed.adapter.model, torch.arange(64)
    assert float(pool.losses(model, some, answering=routed.answering()).max()) < 1e-6
    assert float(pool.losses(model, some).mean()) > 1e-3, "negative control: the present weights are not what answers"


def test_what_stands_in_front_is_part_of_the_question() -> None:
    learner = guarded(InContext(reply_tokens=16), every=100)
    pool, model, some = learner.guard.pool, learner.adapter.model, torch.arange(64)
    assert float(pool.losses(model, some, answering=learner.answering()).max()) < 1e-6, "nothing is remembered yet"
    learner.begin_task("low")
    learner.observe(TASKS["low"][0])
    assert float(pool.losses(model, some, answering=learner.answering()).max()) > 1e-3
    assert float(pool.losses(model, some).max()) < 1e-6, "negative control: the weights stand still"


def test_nothing_stands_in_front_of_text() -> None:
    learner = learner_of("none", InContext(reply_tokens=16))
    blocks = ["".join(chr(97 + (n * 7 + m * m) % 26) for m in range(70)) for n in range(1000)]
    pool = text_pool(learner.adapter.model, learner.student.chat, blocks, count=1000)
    learner.begin_task("low")
    learner.observe(TASKS["low"][0])
    losses = pool.losses(learner.adapter.model, torch.arange(32), answering=learner.answering())
    assert float(losses.max()) < 1e-6


def test_a_pool_that_does_not_know_its_questions_says_so() -> None:
    learner = guarded(Routed(router="oracle"))
    bare = Pool(learner.adapter.model, learner.guard.pool.sequences, measure="tokens")
    with pytest.raises(FeatclError, match="no questions for them; give it `held`"):
        bare.losses(learner.adapter.model, torch.arange(4), answering=learner.answering())


def test_canaries_are_answered_by_their_own_task() -> None:
    learner = learner_of("none", Routed(router="oracle"), lr=0.1)
    items = general(learner, 8)
    canaries = Canaries(learner.adapter.model, learner.student.chat, suites={"general": items})
    learner.begin_task("low", upcoming=TASKS["low"])
    for trajectory in TASKS["low"]:
        learner.observe(trajectory)
    model = learner.adapter.model
    assert canaries.score(model, learner.answering()).kl_to_base["general"] == pytest.approx(0.0, abs=1e-9)
    assert canaries.score(model).kl_to_base["general"] > 0.01, "negative control"
