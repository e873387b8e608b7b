"""Every objective with every kind of adapter, alone and in a weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.objectives.build import OBJECTIVES
from featcl.objectives.teachers import Teachers
from featcl.streams import Trajectory

Make = Callable[..., Any]

SPECS: dict[str, dict[str, Any]] = {
    "sft": {},
    "distillation": {"teacher": "ema", "context": "document", "max_new_tokens": 6},
    "self_distillation": {"context": "demonstration", "alpha": 0.5, "top_k": 8, "max_new_tokens": 6},
    "recover": {"texts": 2, "max_new_tokens": 6},
    "policy": {},
    "preference": {"teacher": "version:0"},
    "predict": {},
    "kl_to_base": {},
    "l2_to_base": {},
}


def test_every_objective_learns_with_every_kind(rig: Make, talk: Trajectory, kind: str) -> None:
    made = rig(kind=kind)
    made.move_(0.05)
    assert SPECS.keys() == OBJECTIVES.keys()
    for name, options in SPECS.items():
        start = made.adapter.coordinates()
        learner = made.learner(objective={"name": name, **options}, lr=3e-2)  # KL well above rounding
        stats = learner.observe(talk)
        assert stats.grad_norm > 0, name
        assert stats.kl > 0, name
        moved = [float((made.adapter.coordinates()[key] - value).abs().max()) for key, value in start.items()]
        assert max(moved) > 1e-4, name
        made.adapter.load_coordinates_(start)


def test_a_weighted_sum_is_the_sum_of_its_parts(rig: Make, talk: Trajectory, kind: str) -> None:
    """Losses and, through plain gradient descent, the update itself."""
    weights = {name: 0.1 * (place + 1) for place, name in enumerate(SPECS)}
    made = rig(kind=kind)
    made.move_(0.05)
    start = made.adapter.coordinates()

    def step(spec: list[dict[str, Any]]) -> tuple[dict[str, float], float, dict[str, torch.Tensor]]:
        made.adapter.load_coordinates_(start)
        stats = made.learner(objective=spec, optimizer="sgd", lr=1e-3).observe(talk)
        after = made.adapter.coordinates()
        return dict(stats.losses), stats.loss, {name: after[name] - start[name] for name in start}

    specs = {name: {"name": name, "weight": weights[name], **options} for name, options in SPECS.items()}
    parts = {name: step([spec]) for name, spec in specs.items()}
    losses, loss, update = step(list(specs.values()))
    assert loss == pytest.approx(sum(part[1] for part in parts.values()), rel=1e-4, abs=1e-6)
    assert len(losses) == len(SPECS), "each has a name of its own"
    assert loss == pytest.approx(
        sum(weights[name] * value for name, value in zip(SPECS, losses.values(), strict=True)), rel=1e-4, abs=1e-6
    )
    for name, moved in update.items():
        torch.testing.assert_close(moved, sum(part[2][name] for part in parts.values()), rtol=2e-3, atol=2e-7)


def test_a_moving_average_teaches_and_resumes(rig: Make, talk: Trajectory, tmp_path: Any) -> None:
    spec = {"name": "self_distillation", "teacher": "ema", "ema_decay": 0.5, "max_new_tokens": 6}
    learner = rig(kind="none").learner(objective=spec)
    assert isinstance(learner.student.teachers, Teachers)
    for step in range(3):
        learner.observe(replace(talk, id=str(step)))
    learner.save(tmp_path)
    expected = [learner.observe(replace(talk, id=str(step))).loss for step in (3, 4)]
    fresh = rig(kind="none")
    resumed = type(learner).load(tmp_path, fresh.model, fresh.tokenizer, fresh.adapter)
    assert [resumed.observe(replace(talk, id=str(step))).loss for step in (3, 4)] == expected
    learner.rollback(3)
    assert [learner.observe(replace(talk, id=str(step))).loss for step in (3, 4)] == expected
    present = rig(kind="none").learner(objective={**spec, "teacher": "self"})
    for step in range(3):
        present.observe(replace(talk, id=str(step)))
    others = [present.observe(replace(talk, id=str(step))).loss for step in (3, 4)]
    assert others != expected, "the control: the present weights teach otherwise"


def test_an_objective_that_makes_its_own_tokens_needs_no_reply_in_the_trajectory(rig: Make, talk: Trajectory) -> None:
    asked = replace(talk, messages=talk.messages[:1])
    for spec in ({"name": "self_distillation", "max_new_tokens": 4}, "preference", "predict"):
        assert rig().learner(objective=spec).observe(asked).tokens > 0
    with pytest.raises(FeatclError, match="no token to learn from"):
        rig().learner(objective=["sft", "predict"]).observe(replace(asked, chosen=None, rejected=None))


def test_a_mix_of_episodes_skips_what_an_episode_lacks(rig: Make, talk: Trajectory) -> None:
    spec = [{"name": name, "missing": "skip"} for name in ("policy", "preference")]
    learner = rig().learner(objective=spec)
    judged, chosen = replace(talk, chosen=None, rejected=None), replace(talk, reward=None)
    assert learner.observe(judged).losses["preference/dpo"] == 0.0
    assert learner.observe(chosen).losses["preference/dpo"] > 0.5
    with pytest.raises(FeatclError, match="nothing to learn from"):
        learner.observe(replace(judged, reward=None))
