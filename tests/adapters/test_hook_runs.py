"""The hook kinds end to end: `featcl run` learns with them and is resumed to the same numbers; no PEFT export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import featcl
from featcl.build import build
from featcl.config import RunConfig
from featcl.errors import FeatclError
from tests.adapters.gates import KINDS
from tests.test_run import config as config
from tests.test_run import home as home
from tests.test_run import interrupt_at, untimed

pytest.importorskip("sae_lens", reason="sae-lens is not installed")

SHORT = ("phases=null", "stream.limit=6")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_with_a_hook_kind(config: Callable[..., RunConfig], kind: str) -> None:
    result = featcl.run(config(f"adapter.kind={kind}", "learner.steps=4", "learner.lr=0.05", *SHORT))
    values = result.matrix.values
    assert values[1, 0] < values[0, 0], "what was learned became more likely"
    assert result.summary["leak"]["leak"] <= 1e-6
    assert result.summary["delta_norm"] > 1e-2
    assert {path.name for path in (result.path / "adapter").iterdir()} == {
        "hook_adapter.json", "hook_adapter.safetensors",
    }  # fmt: skip
    model, _ = featcl.load_model(config().model)
    loaded = featcl.load_adapter(result.path / "adapter", model)
    assert loaded.delta_norm() == pytest.approx(result.summary["delta_norm"], rel=1e-9)
    report = (result.path / "report.html").read_text()
    assert "writes" in report
    if kind != "shift":
        assert "reads" in report


def test_an_interrupted_run_is_resumed_to_the_same_numbers(
    config: Callable[..., RunConfig], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("adapter.kind=gated", "stream.limit=6")
    whole = featcl.run(config(*overrides, f"output={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            featcl.run(config(*overrides))
    resumed = featcl.run(config(*overrides))
    assert untimed(resumed.path) == untimed(whole.path)
    assert resumed.summary == whole.summary
    for name in ("hook_adapter.json", "hook_adapter.safetensors"):
        assert (resumed.path / "adapter" / name).read_bytes() == (whole.path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("basis", ["random", "pca", "random_features"])
def test_control_bases_keep_the_chosen_features_as_the_gate(config: Callable[..., RunConfig], basis: str) -> None:
    chosen = build(config("adapter.kind=gated", *SHORT)).adapter.sites[0]  # type: ignore[attr-defined]
    experiment = build(config("adapter.kind=gated", f"adapter.basis={basis}", *SHORT))
    site = experiment.adapter.sites[0]  # type: ignore[attr-defined]
    assert site.encoder.W_enc.equal(chosen.encoder.W_enc)
    assert site.plan.gate.feature_ids == chosen.plan.directions.feature_ids
    assert site.plan.directions.selector == basis
    assert not site.write_basis.equal(chosen.write_basis)


def test_anchors_work_on_hook_kinds(config: Callable[..., RunConfig]) -> None:
    objectives = "learner.objectives=[{name: sft}, {name: kl_to_base}, {name: l2_to_base, weight: 0.1}]"
    result = featcl.run(config("adapter.kind=residual", objectives, *SHORT))
    updates = [line for line in untimed(result.path) if line["kind"] == "update"]
    assert updates[0]["anchor/l2_to_base"] == 0.0
    assert updates[-1]["anchor/l2_to_base"] > 0.0


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_exporting_a_hook_kind_is_refused_with_the_reason(config: Callable[..., RunConfig], form: str) -> None:
    from featcl.studies.export import export_run

    result = featcl.run(config("adapter.kind=shift", *SHORT))
    with pytest.raises(FeatclError, match="kind 'shift'"):
        export_run(result.path, form=form)


def test_a_learner_goes_on_after_its_features_change(config: Callable[..., RunConfig]) -> None:
    """The change is a version; rolling back to it gives the same coordinates, what is kept included."""
    experiment = build(config("adapter.kind=gated", *SHORT))
    learner, adapter = experiment.learner, experiment.adapter
    trajectories = experiment.material.tasks[0].trajectories
    learner.observe(trajectories[0])
    others = build(config("adapter.kind=gated", "features.selector=ids", "features.feature_ids=[1,2,3]", *SHORT))
    change = learner.change_directions(others.directions)
    assert change.remainder > 0
    assert change.kept
    version, before = learner.version, adapter.coordinates()
    assert any("kept" in name for name in before)
    learner.observe(trajectories[1])
    learner.rollback(version)
    assert all(before[name].equal(tensor) for name, tensor in adapter.coordinates().items())
    with pytest.raises(FeatclError, match="kept from earlier directions"):
        adapter.load_coordinates_({name: tensor for name, tensor in before.items() if "kept" not in name})
