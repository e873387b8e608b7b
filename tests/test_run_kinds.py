"""Every kind of adapter and every way of training it, end to end: from the config to a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import featcl
from featcl.config import ConfigError, RunConfig
from featcl.errors import FeatclError
from featcl.features import load_sae
from tests.test_run import config, home, interrupt_at, untimed  # noqa: F401  (fixtures)

SHORT = ("phases=null", "learner.experiences=3", "evaluation.canaries=null")
KINDS = ("none", "write", "read", "both", "residual", "gated", "shift", "scale")
TRAININGS = ("train_both_factors", "project_update", "penalty", "project_gradient")
CASES = [
    *[(f"adapter.kind={kind}",) for kind in KINDS],
    *[(f"adapter.training={training}",) for training in TRAININGS],
    ("adapter.rank=3", "adapter.kind=both"),
    ("adapter.kind=none", "adapter.alpha=16.0"),
    ("adapter.kind=gated", "adapter.basis=random"),
    ("adapter.modules=[down_proj,q_proj]", "adapter.layers=[1,2]"),
]


@pytest.mark.parametrize("overrides", CASES, ids=lambda overrides: " ".join(overrides))
def test_every_kind_and_training_runs_and_resumes_to_the_same_numbers(
    config: Callable[..., RunConfig],  # noqa: F811
    tmp_path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
) -> None:
    whole = featcl.run(config(*SHORT, *overrides, f"output={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            featcl.run(config(*SHORT, *overrides))
    resumed = featcl.run(config(*SHORT, *overrides))
    assert untimed(resumed.path) == untimed(whole.path)
    assert resumed.summary == whole.summary
    assert whole.summary["delta_norm"] > 0
    adapters = [sorted((run.path / "adapter").glob("*.safetensors")) for run in (whole, resumed)]
    assert [file.read_bytes() for file in adapters[0]] == [file.read_bytes() for file in adapters[1]]
    leaks = any(word in " ".join(overrides) for word in ("none", "penalty", "project_gradient"))
    assert whole.summary["leak"]["leak"] > 1e-3 if leaks else whole.summary["leak"]["leak"] <= 1e-6


def test_the_penalty_is_logged(config: Callable[..., RunConfig]) -> None:  # noqa: F811
    result = featcl.run(config(*SHORT, "adapter.training=penalty", "adapter.penalty=3.0"))
    updates = [line for line in untimed(result.path) if line["kind"] == "update"]
    assert all("anchor/outside_span" in line for line in updates)


def test_one_sae_per_layer_and_one_sae_for_a_range_of_layers(config: Callable[..., RunConfig], home) -> None:  # noqa: F811
    from sae_lens.saes.sae import SAEMetadata

    sae = load_sae(home / "sae")
    sae.cfg.metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", prepend_bos=True, model_name="tiny")
    sae.save_model(home / "sae_1")
    each = featcl.run(config(*SHORT, f"features.sae={{1: {home / 'sae_1'}, 2: {home / 'sae'}}}", "arm=each"))
    assert set(json.loads((each.path / "env.json").read_text())["hooks"]) == {
        "blocks.1.hook_resid_post", "blocks.2.hook_resid_post",
    }  # fmt: skip
    assert each.summary["leak"]["leak"] <= 1e-6
    ranged = featcl.run(config(*SHORT, "adapter.layers=[0,1,2]", "arm=range"))
    assert ranged.summary["leak"]["leak"] <= 1e-6
    assert ranged.summary["trained_parameters"] > each.summary["trained_parameters"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapter={kind: none, training: penalty}", "training 'penalty' belongs to the kinds write, read and both"),
        ("adapter={kind: gated, training: project_update}", "belongs to the kinds write, read and both"),
        ("adapter.alpha=8.0", "alpha scales two trained factors"),
        ("adapter.penalty=0.0", "greater than 0"),
        ("adapter.training=backwards", "adapter.training"),
        ("adapter.remainder=forget", "adapter.remainder"),
        ("adapter.near_dependent=ignore", "adapter.near_dependent"),
        ("adapter.module=[q_proj]", "unknown key"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_config(
    config: Callable[..., RunConfig],  # noqa: F811
    override: str,
    says: str,
) -> None:
    with pytest.raises(ConfigError, match=says):
        config(override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapter.modules=[out_proj]", "no module 'out_proj'"),
        ("adapter.layers=[9]", "layer 9 is out of range"),
        ("adapter.rank=9", "rank 9 is not between 1 and k = 8"),
        ("adapter={kind: shift, rank: 2}", "no rank"),
        ("features.k=33", "33"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_the_run(
    config: Callable[..., RunConfig],  # noqa: F811
    override: str,
    says: str,
) -> None:
    with pytest.raises((FeatclError, ConfigError), match=says):
        featcl.run(config(*SHORT, override))
