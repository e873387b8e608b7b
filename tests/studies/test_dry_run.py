"""What a run would need is what it has: sizes, operations and lengths, without a weight being read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import featcl
from featcl import cli
from featcl.build import build
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.flops import FlopCounter
from featcl.studies.dry_run import _model_config, dry_run
from featcl.studies.estimate import _attach_, stand_in
from tests.runs import make_config, make_home

pytest.importorskip("sae_lens", reason="sae-lens is not installed")
PLAIN = ("phases=null", "evaluation.canaries=null")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def config(home: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return make_config(home, tmp_path)


@pytest.mark.parametrize("kind", ["none", "write", "both", "residual", "scale", "full"])
def test_sizes_and_operations_are_those_of_the_run(config: Callable[..., RunConfig], kind: str) -> None:
    wanted = config(*PLAIN, f"adapter.kind={kind}", "features.k=6")
    found = dry_run(wanted).estimate
    assert found is not None
    made = build(wanted)
    model = featcl.models.inner_model(made.adapter.model)
    assert found.trained == sum(parameter.numel() for parameter in made.adapter.parameters())
    base = stand_in(_model_config(wanted.model), torch.float32)
    assert found.parameters == sum(parameter.numel() for parameter in base.parameters())
    assert found.weights == 4 * found.parameters
    assert found.optimizer == 2 * 4 * found.trained
    counter, seq, targets = FlopCounter(model), 31, 9
    ours = _attached(wanted)
    assert ours.full_pass(1, seq, predictions=targets, gradient=True) == counter.full_pass(
        1, seq, predictions=targets, gradient=True
    )
    assert ours.full_pass(1, seq).forward != ours.full_pass(1, seq + 1).forward, "and length counts"


def _attached(wanted: RunConfig) -> FlopCounter:
    model = stand_in(_model_config(wanted.model), torch.float32)
    _attach_(wanted, model, (2,), 32)
    return FlopCounter(model)


def test_lengths_are_those_of_the_stream(config: Callable[..., RunConfig]) -> None:
    found = dry_run(config(*PLAIN)).lengths
    assert found is not None
    made = build(config(*PLAIN))
    for task in made.material.tasks:
        for trajectory in task.trajectories:
            made.learner.observe(trajectory)
    assert found.experiences == made.learner.version
    assert found.tokens >= found.targets == made.learner.tokens
    assert found.rows == len(made.material.tasks) + 1
    twice = dry_run(config("evaluation.canaries=null")).lengths  # two phases
    assert twice is not None
    assert twice.experiences == 2 * found.experiences


def test_no_weight_is_read_or_made(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(featcl.models, "_load_weights", refuse)
    assert not dry_run(config(*PLAIN)).missing
    with pytest.raises(AssertionError, match="weights are read"):
        build(config(*PLAIN))
    from transformers import Gemma2Config

    model = stand_in(Gemma2Config(), torch.bfloat16)  # of 2.6 billion parameters
    stored = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
              for parameter in model.parameters()}  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) > 2e9
    assert sum(stored.values()) < 1e5


def test_all_that_is_missing_is_named_at_once(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("stream.path=nowhere.jsonl", "features.sae=no/sae", "features.background=gone.txt")
    found = dry_run(config(*PLAIN, *wanted))
    assert found.estimate is None
    assert len(found.missing) == 3
    for name in ("nowhere.jsonl", "no/sae", "gone.txt"):
        assert any(name in line for line in found.missing)
    assert not dry_run(config(*PLAIN)).missing
    assert cli.invoke(["run", str(tmp_path / "arm.yaml"), "--dry-run", *PLAIN, *wanted]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.out.count("missing: ") == 3
    assert not (tmp_path / "results").exists(), "nothing is begun"
    for source, what in (("gemma-scope-2b-pt-res-canonical/layer_99/width_16k/canonical", "has no layer_99"),
                         ("gemma-scope-2b-pt-res-canonical/layer_2/width_16k/canonical", "")):  # fmt: skip
        lines = dry_run(config(*PLAIN, f"features.sae={source}")).missing
        assert (what in lines[0]) if what else not lines
    with pytest.raises(FeatclError, match="lab suites"):
        dry_run(config(*PLAIN, "evaluation.suites=[lab/general]"))


def test_the_command_prints_numbers_and_json(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config()
    path = str(tmp_path / "arm.yaml")
    assert cli.invoke(["run", path, "--dry-run", *PLAIN]) == 0
    printed = capsys.readouterr().out
    assert "memory: about" in printed
    assert "TFLOP an update" in printed
    seconds = []
    for teraflops in ("0.001", "0.002"):
        assert cli.invoke(["run", path, "--dry-run", "--json", "--teraflops", teraflops, *PLAIN]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["estimate"]["seconds"])
    assert seconds[0] == pytest.approx(2 * seconds[1])
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "base.yaml").write_text(
        (tmp_path / "arm.yaml").read_text() + "grid: {features.k: [2, 4], seed: [0, 1]}\n"
    )
    assert cli.invoke(["sweep", str(tmp_path / "study"), "--dry-run", *PLAIN]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("base.k-2.seed-0", "base.k-4.seed-1", "4 runs, one after the other"))
    assert not (tmp_path / "results").exists()


def test_a_model_that_is_not_here_is_said_to_be(config: Callable[..., RunConfig]) -> None:
    found = dry_run(config(*PLAIN, "model=nobody/nothing"))
    assert any(line.startswith("model: no folder 'nobody/nothing' here") for line in found.missing)
    assert found.estimate is None
