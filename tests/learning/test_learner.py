"""One update: what it learns from, what it equals, what it measures, and that failures change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from featcl.errors import FeatclError
from featcl.learning import Learner
from featcl.objectives.scoring import Scorer
from featcl.streams import Trajectory

Make = Callable[..., Any]


def state(learner: Learner) -> dict[str, torch.Tensor]:
    from featcl.learning.optimizers import moments

    return {**learner.adapter.coordinates(), **moments(learner.optimizer)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_sft_update_equals_the_naive_one(rig: Make, talk: Trajectory, family: str) -> None:
    own, plain = rig(family), rig(family)
    learner = own.learner(weight_decay=0.1)
    stats = [learner.observe(talk) for _ in range(3)]
    encoded = learner.student.chat.encode(talk.messages)
    ids, mask = torch.tensor([encoded.input_ids]), torch.tensor(encoded.loss_mask)[1:]
    optimizer = torch.optim.AdamW(plain.adapter.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        loss = F.cross_entropy(plain.adapter.model(ids).logits[0, :-1][mask], ids[0, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        assert stats[step].loss == pytest.approx(loss.item(), rel=1e-5)
        assert stats[step].tokens == mask.sum()
        optimizer.step()
    for name, value in plain.adapter.coordinates().items():
        torch.testing.assert_close(own.adapter.coordinates()[name], value, rtol=1e-3, atol=2e-5)
    assert stats[-1].loss < stats[0].loss


def test_the_record_has_the_logged_names(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(objective=["sft", {"name": "kl_to_base", "weight": 0.5}, {"name": "l2_to_base"}])
    learner.observe(talk)
    stats = learner.observe(talk)
    record = stats.record()
    assert {key: record[key] for key in ("trajectory", "source", "task", "version", "objective")} == {
        "trajectory": "talk-1", "source": "home", "task": "greeting", "version": 2,
        "objective": "sft+kl_to_base+l2_to_base",
    }  # fmt: skip
    parts = [record[name] for name in ("sft/nll", "anchor/kl_to_base", "anchor/l2_to_base")]
    assert all(part > 0 for part in parts)
    assert record["train/loss"] == pytest.approx(parts[0] + 0.5 * parts[1] + parts[2])
    assert record["anchor/l2_to_base"] == pytest.approx(
        learner.rollback(1) or learner.adapter.delta_norm() ** 2, rel=1e-4
    )
    assert record["optim/lr"] == 1e-2
    assert record["constraint/delta_norm"] > 0
    assert record["update/kl"] > 0
    assert record["tokens_left_out"] == 0


def test_kl_is_that_of_the_whole_models(rig: Make, talk: Trajectory) -> None:
    from featcl.objectives import kl_divergence

    made = rig("gemma2")
    learner = made.learner()
    encoded = learner.student.chat.encode(talk.messages)
    ids, mask = torch.tensor([encoded.input_ids]), torch.tensor([encoded.loss_mask])[:, 1:]
    with torch.no_grad():
        before = made.adapter.model(ids).logits[:, :-1]
        stats = learner.observe(talk)
        after = made.adapter.model(ids).logits[:, :-1]
    assert stats.kl == pytest.approx(kl_divergence(after, before, mask=mask, alpha=0.0).item(), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("limit", [1e-3, 1e-6])
def test_the_trust_region_holds_and_is_used(rig: Make, talk: Trajectory, limit: float) -> None:
    free, held = rig().learner(lr=0.1), rig().learner(lr=0.1, max_kl_per_update=limit)
    assert free.observe(talk).kl > 10 * limit, "the control: without it the step is too far"
    for _ in range(4):
        stats = held.observe(talk)
        assert 0.3 * limit < stats.kl <= limit
        assert 0 < stats.step_scale < 1
    wide = rig().learner(lr=0.1, max_kl_per_update=1e3)
    assert wide.observe(talk).step_scale == 1.0
    assert same(state(wide), {**state(wide), **free.adapter.coordinates()})


@pytest.mark.parametrize("objective", ["recover", "l2_to_base", ["recover", {"name": "policy", "missing": "skip"}]])
def test_it_also_holds_where_the_trajectory_is_not_what_is_learned_from(
    rig: Make, talk: Trajectory, objective: Any
) -> None:
    """Brakes alone read no token of the trajectory: the update is still measured there, and bounded."""
    limit = 1e-6
    for bounded in (None, limit):
        learner = rig().learner(lr=0.1, objective=objective, background=["some text"], max_kl_per_update=bounded)
        learner.adapter.load_coordinates_(
            {name: 0.3 * torch.ones_like(value) for name, value in learner.adapter.coordinates().items()}
        )
        learner._versions.add_(learner._snapshot())
        stats = learner.observe(talk)
        if bounded is None:
            assert stats.kl > 10 * limit, "the control"
        else:
            assert 0.3 * limit < stats.kl <= limit
            assert 0 < stats.step_scale < 1


@pytest.mark.parametrize("objective", ["sft", "self_distillation"])
def test_several_steps_are_one_version(rig: Make, talk: Trajectory, objective: str) -> None:
    learner = rig().learner(objective=objective, steps=3)
    once = rig().learner(objective=objective)
    stats = learner.observe(talk)
    assert (stats.version, learner.versions) == (1, (0, 1))
    assert stats.loss == once.observe(talk).loss
    if objective == "sft":
        once.observe(talk)
        once.observe(talk)
        assert same(state(learner), state(once))


def test_windows_accumulate_into_one_update(rig: Make) -> None:
    """A text longer than the context: the gradient is that of the mean over all windows' tokens."""
    text = Trajectory("t", text="abcdefgh" * 20)
    whole, cut = rig().learner(optimizer="sgd", lr=1.0), rig().learner(optimizer="sgd", lr=1.0)
    object.__setattr__(cut.student, "max_length", 64)
    stats = cut.observe(text)
    assert stats.tokens == whole.observe(text).tokens == 159
    assert stats.tokens_left_out == 0
    cut.reconfigure(max_windows=1)
    assert cut.observe(text).tokens_left_out == 160 - 64


def test_nan_stops_before_anything_changes(rig: Make, talk: Trajectory) -> None:
    made = rig()
    learner = made.learner()
    learner.observe(talk)
    before, version = state(learner), learner.version
    weight = made.model.get_output_embeddings().weight
    kept = weight.data[0, 0].item()
    weight.data[0, 0] = float("nan")
    with pytest.raises(FeatclError, match=r"trajectory 'talk-1' \(greeting\): sft/nll is nan; the weights were not"):
        learner.observe(talk)
    weight.data[0, 0] = kept
    assert same(state(learner), before)
    assert learner.version == version
    assert learner.observe(talk).version == version + 1


def test_a_gradient_that_is_not_finite_stops_too(rig: Make, talk: Trajectory) -> None:
    made = rig()
    learner = made.learner()
    made.adapter.parameters()[0].register_hook(lambda gradient: gradient * float("inf"))
    before = state(learner)
    with pytest.raises(FeatclError, match="gradient norm"):
        learner.observe(talk)
    assert same(state(learner), before)


def test_a_step_into_nonsense_is_taken_back(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(lr=1e38, optimizer="sgd")
    before = state(learner)
    with pytest.raises(FeatclError, match="the weights were not changed"):
        learner.observe(talk)
    assert same(state(learner), before)


def test_an_interrupt_in_the_middle_leaves_the_last_version(rig: Make, talk: Trajectory, monkeypatch: Any) -> None:
    learner = rig().learner(steps=2)
    learner.observe(talk)
    before, calls = state(learner), []
    step = learner.optimizer.step

    def interrupted() -> None:
        calls.append(step())
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(learner.optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learner.observe(talk)
    assert same(state(learner), before)


def test_the_base_is_never_touched_and_comes_back(rig: Make, talk: Trajectory) -> None:
    made = rig("gemma2")
    ids = torch.arange(12)[None]
    frozen = {name: p.clone() for name, p in made.adapter.model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        base = made.model(ids).logits
    learner = made.learner(objective=["self_distillation", "kl_to_base", "recover"], background=["some text", "more"])
    for _ in range(3):
        learner.observe(talk)
    now = dict(made.adapter.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert {p for p in now.values() if p.requires_grad} == set(made.adapter.parameters())
    with torch.no_grad(), made.adapter.disabled():
        assert torch.equal(made.model(ids).logits, base)
    with torch.no_grad():
        assert not torch.equal(made.model(ids).logits, base)


def test_phases_change_settings_and_keep_moments(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner()
    learner.observe(talk)
    before = state(learner)
    learner.reconfigure(objective="self_distillation", lr=1e-3)
    assert same(state(learner), before)
    stats = learner.observe(talk)
    assert (stats.lr, stats.objective) == (1e-3, "self_distillation")
    assert learner.optimizer.param_groups[0]["lr"] == 1e-3
    for wrong, match in (
        ({"lrr": 1}, "no setting 'lrr'"),
        ({"objective": "stf"}, "did you mean 'sft'"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(FeatclError, match=match):
            learner.reconfigure(**wrong)
    assert learner.observe(talk).objective == "self_distillation"


def test_rollback_restores_exactly_and_repeats(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(objective="self_distillation")
    learner.observe(talk)
    middle = state(learner)
    later = [learner.observe(replace(talk, id=f"talk-{n}")).loss for n in range(2, 5)]
    end = state(learner)
    learner.rollback(1)
    assert same(state(learner), middle)
    assert learner.versions == (0, 1)
    assert [learner.observe(replace(talk, id=f"talk-{n}")).loss for n in range(2, 5)] == later
    assert same(state(learner), end)
    learner.rollback(0)
    assert all(float(value.abs().sum()) == 0 for value in learner.adapter.coordinates().values())
    with pytest.raises(FeatclError, match="version 9 is not kept"):
        learner.rollback(9)


def test_rollback_over_a_change_of_optimizer(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner()
    learner.observe(talk)
    before = state(learner)
    learner.reconfigure(optimizer="sgd")
    learner.observe(talk)
    learner.rollback(1)
    assert learner.settings.optimizer == "adamw"
    assert same(state(learner), before)


def test_old_versions_are_forgotten(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner()
    for _ in range(12):
        learner.observe(talk)
    assert learner.versions == tuple(range(5, 13))


def test_chat_learns_nothing(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner()
    before = state(learner)
    reply = learner.chat(talk.messages[:2], max_new_tokens=5)
    assert reply == learner.chat(talk.messages[:2], max_new_tokens=5)
    assert same(state(learner), before)


def test_what_is_not_there_is_said(rig: Make, tiny: Make) -> None:
    made = rig()
    with pytest.raises(FeatclError, match="is no method"):
        made.learner(methods=["x"])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"objective": "distilation"}, "did you mean 'distillation'"),
        ({"objective": {"name": "sft", "wieght": 2}}, "did you mean 'weight'"),
        ({"objective": "distillation"}, "needs a teacher"),
        ({"objective": []}, "no objective"),
        ({"objective": {"name": "self_distillation", "alpha": 2.0}}, "alpha"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'"),
        ({"lr": float("nan")}, "lr must be"),
        ({"max_kl_per_update": 0.0}, "max_kl_per_update"),
    ]
    for options, match in cases:
        with pytest.raises(FeatclError, match=match):
            made.learner(**options)


def test_a_teacher_with_another_vocabulary_is_refused(rig: Make, tiny: Make) -> None:
    teacher, _ = tiny("olmo2")
    teacher.resize_token_embeddings(270)
    with pytest.raises(FeatclError, match="one logit width"):
        rig().learner(objective="distillation", teacher=teacher)
    other = tiny("olmo2")[1]
    other.add_tokens(["zzz"])
    with pytest.raises(FeatclError, match="different tokenizers"):
        rig().learner(objective="distillation", teacher=(tiny("olmo2")[0], other))
    assert Scorer(teacher).logit_width == 270
