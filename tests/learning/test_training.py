"""The adapter's ablations and changes of directions, in the learner's hands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import Directions
from featcl.learning import Learner
from featcl.streams import Trajectory

Make = Callable[..., Any]
TRAININGS = ("coordinates", "train_both_factors", "project_update", "penalty", "project_gradient")


def other_directions(k: int = 3) -> Directions:
    return Directions.from_vectors(torch.randn(k, 32, generator=torch.Generator().manual_seed(9)), layer=1)


def matrices(learner: Learner) -> torch.Tensor:
    return torch.cat([(b @ a).flatten() for site in learner.adapter.sites for a, b in [site.factors()]])


@pytest.mark.parametrize("training", TRAININGS)
def test_every_training_learns_and_leaks_as_it_says(rig: Make, talk: Trajectory, training: str) -> None:
    learner = rig("olmo2", constraint={"training": training}).learner()
    stats = [learner.observe(replace(talk, id=f"t{i}")) for i in range(8)]
    assert stats[-1].losses["sft/nll"] < stats[0].losses["sft/nll"]
    assert ("anchor/outside_span" in stats[-1].losses) == (training == "penalty")
    ids = torch.arange(40).view(2, 20)
    leak = learner.adapter.leak(ids).leak
    held = training in ("coordinates", "train_both_factors", "project_update")
    assert leak <= 1e-6 if held else leak > 1e-3


@pytest.mark.parametrize("training", TRAININGS)
def test_every_training_resumes_and_rolls_back_exactly(
    rig: Make, talk: Trajectory, tmp_path: Path, training: str
) -> None:
    whole = rig("olmo2", constraint={"training": training}).learner(max_kl_per_update=0.5)
    for i in range(3):
        whole.observe(replace(talk, id=f"t{i}"))
    whole.save(tmp_path)
    expected = [whole.observe(replace(talk, id=f"t{i}")).loss for i in (3, 4)]
    fresh = rig("olmo2", constraint={"training": training})
    resumed = Learner.load(tmp_path, fresh.model, fresh.tokenizer, fresh.adapter)
    assert [resumed.observe(replace(talk, id=f"t{i}")).loss for i in (3, 4)] == expected
    assert torch.equal(matrices(resumed), matrices(whole))
    whole.rollback(3)
    assert [whole.observe(replace(talk, id=f"t{i}")).loss for i in (3, 4)] == expected


def test_the_penalty_is_part_of_the_loss(rig: Make, talk: Trajectory) -> None:
    learner = rig("llama", constraint={"training": "penalty", "penalty": 5.0}).learner()
    learner.observe(talk)
    stats = learner.observe(replace(talk, id="again"))
    assert stats.loss == pytest.approx(sum(stats.losses.values()))
    assert stats.losses["anchor/outside_span"] > 0


def test_a_change_of_directions_is_a_version_and_forgets_earlier_ones(rig: Make, talk: Trajectory) -> None:
    learner = rig("olmo2").learner()
    for i in range(3):
        learner.observe(replace(talk, id=f"t{i}"))
    before = matrices(learner)
    change = learner.change_directions(other_directions())
    assert (learner.version, learner.versions, change.kept) == (4, (4,), True)
    assert float((matrices(learner) - before).norm() / before.norm()) <= 1e-6
    after = learner.observe(replace(talk, id="t3"))
    assert learner.adapter.leak(torch.arange(40).view(2, 20)).leak <= 1e-6
    learner.rollback(4)
    torch.testing.assert_close(matrices(learner), before, atol=1e-6, rtol=0)
    assert learner.observe(replace(talk, id="t3")).loss == after.loss
    with pytest.raises(FeatclError, match="version 2 is not kept"):
        learner.rollback(2)


def test_a_learner_saved_after_a_change_asks_for_the_same_change(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    """The coordinates mean the new directions; shapes alone could not tell (here k is the same)."""
    learner = rig("olmo2").learner()
    learner.observe(talk)
    learner.change_directions(other_directions(4))
    learner.observe(replace(talk, id="t1"))
    learner.save(tmp_path)
    expected = learner.observe(replace(talk, id="t2")).loss
    fresh = rig("olmo2")
    with pytest.raises(FeatclError, match="saved after 1 changes of directions"):
        Learner.load(tmp_path, fresh.model, fresh.tokenizer, fresh.adapter)
    fresh.adapter.change_directions(other_directions(4))
    resumed = Learner.load(tmp_path, fresh.model, fresh.tokenizer, fresh.adapter)
    assert resumed.observe(replace(talk, id="t2")).loss == expected


def test_consolidating_keeps_what_was_learned_and_goes_on_from_zero(
    rig: Make, talk: Trajectory, tmp_path: Path
) -> None:
    learner = rig("olmo2").learner()
    for i in range(3):
        learner.observe(replace(talk, id=f"t{i}"))
    before = matrices(learner)
    learner.consolidate()
    assert float((matrices(learner) - before).norm() / before.norm()) <= 1e-6
    learner.observe(replace(talk, id="t3"))
    learner.save(tmp_path)
    fresh = rig("olmo2")
    resumed = Learner.load(tmp_path, fresh.model, fresh.tokenizer, fresh.adapter)
    assert torch.equal(matrices(resumed), matrices(learner))
    assert learner.observe(replace(talk, id="t4")).loss == resumed.observe(replace(talk, id="t4")).loss


@pytest.mark.parametrize("kind", ["residual", "shift"])
def test_the_hook_kinds_change_their_directions_in_the_learners_hands_too(
    rig: Make, talk: Trajectory, kind: str
) -> None:
    learner = rig("llama", kind=kind).learner()
    learner.observe(talk)
    change = learner.change_directions(other_directions(), remainder="drop")
    assert 0 < change.carried < change.before
    assert not change.kept
    assert learner.versions == (2,)
    assert learner.observe(replace(talk, id="t1")).delta_norm > 0
    assert learner.adapter.leak(torch.arange(40).view(2, 20)).leak <= 1e-6
