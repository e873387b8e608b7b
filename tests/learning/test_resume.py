"""Saved and loaded, a learner goes on bit for bit."""

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
from featcl.learning.denoising import Denoising
from featcl.learning.optimizers import build_optimizer, load_moments_, moments
from featcl.learning.randomness import derived_generator
from featcl.learning.versions import load_snapshot, load_versions
from featcl.objectives.scoring import Scorer
from featcl.streams import Trajectory

Make = Callable[..., Any]
OBJECTIVE = [{"name": "self_distillation", "skip": 1}, {"name": "sft", "weight": 0.3}]


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "sgd"])
def test_resumed_equals_uninterrupted(rig: Make, talk: Trajectory, tmp_path: Path, optimizer: str) -> None:
    stream = [replace(talk, id=f"talk-{n}") for n in range(6)]
    through = rig().learner(objective=OBJECTIVE, optimizer=optimizer, weight_decay=0.01, seed=3)
    expected = [replace(through.observe(t), seconds=0.0) for t in stream]

    first = rig().learner(objective=OBJECTIVE, optimizer=optimizer, weight_decay=0.01, seed=3)
    for t in stream[:3]:
        first.observe(t)
    first.save(tmp_path)
    made = rig()
    torch.manual_seed(12345)  # global randomness must not matter
    second = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter)
    assert (second.version, second.versions, second.tokens) == (3, (0, 1, 2, 3), first.tokens)
    found = [replace(second.observe(t), seconds=0.0) for t in stream[3:]]
    assert found == expected[3:]
    for name, value in through.adapter.coordinates().items():
        assert torch.equal(second.adapter.coordinates()[name], value)


def test_another_seed_samples_otherwise(rig: Make, talk: Trajectory) -> None:
    losses = [rig().learner(objective="self_distillation", seed=seed).observe(talk).loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_saving_twice_gives_the_same_bytes(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    for name in ("a", "b"):
        learner = rig().learner()
        learner.observe(talk)
        learner.save(tmp_path / name)
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_what_does_not_fit_is_refused(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match="no saved learner"):
        rig().learner().restore_(tmp_path)
    learner = rig(kind="write").learner()
    learner.observe(talk)
    learner.save(tmp_path)
    with pytest.raises(FeatclError, match="another adapter"):
        rig(kind="read").learner().restore_(tmp_path)
    (tmp_path / "learner.safetensors").write_bytes(b"junk")
    with pytest.raises(FeatclError, match="not a saved learner"):
        rig().learner().restore_(tmp_path)


def test_moments_are_copied_and_put_back() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer("adamw", [weight], lr=0.1)
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    saved = moments(optimizer)
    optimizer.step()
    assert not torch.equal(saved["0/exp_avg"], moments(optimizer)["0/exp_avg"])
    load_moments_(optimizer, saved)
    assert all(torch.equal(value, saved[name]) for name, value in moments(optimizer).items())
    with pytest.raises(FeatclError, match="does not fit"):
        load_moments_(optimizer, {"0/exp_avg": torch.zeros(4)})


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_is_decoupled(name: str) -> None:
    weight = torch.nn.Parameter(torch.full((2,), 5.0))
    optimizer = build_optimizer(name, [weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((2,), 5.0 * (1 - 0.1 * 0.5)))


def test_generators_depend_on_all_three() -> None:
    draws = {
        torch.rand((), generator=derived_generator(*key)).item()
        for key in ((0, "a", "x"), (1, "a", "x"), (0, "b", "x"), (0, "a", "y"))
    }
    assert len(draws) == 4
    again = [torch.rand(3, generator=derived_generator(0, "a", "x")) for _ in range(2)]
    assert torch.equal(*again)


def test_a_resumed_learner_can_roll_back_as_far(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    """Version 0 is held, the last eight are kept; both survive on disk, with their moments."""
    first = rig().learner()
    first.hold(0)
    states = {}
    for number in range(12):
        first.observe(replace(talk, id=f"talk-{number}"))
        states[first.version] = (first.adapter.coordinates(), moments(first.optimizer))
    first.save(tmp_path)
    second = rig().learner()
    second.restore_(tmp_path)
    assert second.versions == first.versions == (0, *range(5, 13))
    second.rollback(7)
    coordinates, optimizer = states[7]
    assert all(torch.equal(value, coordinates[name]) for name, value in second.adapter.coordinates().items())
    assert all(torch.equal(value, optimizer[name]) for name, value in moments(second.optimizer).items())
    assert not torch.equal(optimizer["0/exp_avg"], states[12][1]["0/exp_avg"]), "negative control: they differ"
    with pytest.raises(FeatclError, match="version 12 is not kept; there are 0, 5, 6, 7"):
        second.rollback(12)
    second.hold()
    assert second.versions == (0, 5, 6, 7)


def test_versions_are_held_and_let_go() -> None:
    from featcl.learning.versions import Snapshot, Versions

    versions = Versions(2)
    for number in range(3):
        versions.add_(Snapshot(number, {}, {}, "sgd", {}))
    assert versions.numbers == (1, 2)
    versions.hold_(1)
    for number in range(3, 6):
        versions.add_(Snapshot(number, {}, {}, "sgd", {}))
    assert (versions.numbers, versions.held) == ((1, 4, 5), (1,))
    with pytest.raises(FeatclError, match="version 2 is not kept"):
        versions.hold_(2)
    versions.insert_(Snapshot(3, {}, {}, "sgd", {}))
    assert versions.numbers == (1, 3, 4, 5)
    assert versions.cut_(3).version == versions.last.version == 3
    assert versions.numbers == (1, 3)


@pytest.mark.parametrize("after", ["fails", "saved"])
def test_a_change_of_optimizer_holds_before_anything_is_learned_with_it(
    rig: Make, talk: Trajectory, tmp_path: Path, after: str
) -> None:
    learner = rig().learner(lr=1e-3)
    learner.observe(talk)
    learner.reconfigure(optimizer="sgd")
    if after == "fails":
        with pytest.raises(FeatclError, match="no token to learn from"):
            learner.observe(Trajectory("empty", messages=({"role": "user", "content": "hi"},)))
        hidden = Scorer.hidden
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scorer, "hidden", lambda *args: hidden(*args) * float("nan"))
            with pytest.raises(FeatclError, match="nll is nan"):
                learner.observe(talk)
    else:
        learner.save(tmp_path)
        made = rig()
        learner = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter)
    assert learner.settings.optimizer == "sgd"
    assert moments(learner.optimizer) == {}, "not those of AdamW"


class FullDisk:
    """A ledger whose disk is full."""

    def append(self, *args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    rolled_back = reverted = append


@pytest.mark.parametrize("act", ["observe", "rollback", "revert"])
def test_what_the_ledger_cannot_write_did_not_happen(rig: Make, talk: Trajectory, tmp_path: Path, act: str) -> None:
    learner = rig().learner()
    for number in range(10):
        learner.observe(replace(talk, id=f"talk-{number}"))
    learner.hold(4)
    learner.save(tmp_path / "before")
    learner.ledger = FullDisk()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        learner.observe(talk) if act == "observe" else getattr(learner, act)(8)
    learner.save(tmp_path / "after")
    before, after = (tmp_path / name / "learner.safetensors" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes(), "coordinates, moments, and every version that is kept"
    snapshot, _ = load_snapshot(tmp_path / "after")
    assert all(torch.equal(value, snapshot.coordinates[name]) for name, value in learner.adapter.coordinates().items())
    learner.ledger = None
    learner.rollback(8)
    assert learner.version == 8, "the control: with room, it does"


def test_what_no_version_changed_is_saved_with_each(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    """A revert leaves the update before it as it is: one tensor in two versions, which safetensors refuses."""
    spans = [
        Directions.from_vectors(torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)), layer=1)
        for seed in (5, 6)
    ]
    heldout = [replace(talk, id=f"held-{number}") for number in range(2)]
    learner = rig().learner(denoising=Denoising(spans, heldout, every=100))
    for number in range(3):
        learner.observe(replace(talk, id=f"talk-{number}"))
    learner.revert(1)
    learner.save(tmp_path)
    found, kept = load_versions(tmp_path, keep=8)[0], learner.present
    assert found.numbers == (0, 1, 2, 3, 4)
    assert kept.tensors
    assert all(torch.equal(found[v].tensors[name], value) for v in (3, 4) for name, value in kept.tensors.items())
