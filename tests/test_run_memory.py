"""A run with a memory: its training, its numbers, where it lies, and that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import featcl
from featcl.build import build
from featcl.config import ConfigError, RunConfig
from featcl.errors import FeatclError
from featcl.learning import Learner
from featcl.learning.memorizing import MemoryTraining
from featcl.studies.chat import open_chat
from tests.runs import make_config, make_home, untimed

pytest.importorskip("sae_lens", reason="sae-lens is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With long texts to train a memory on."""
    home = make_home(tmp_path_factory.mktemp("home"))
    letters = torch.randint(97, 123, (16, 300), generator=torch.Generator().manual_seed(1))
    (home / "long.txt").write_text("\f".join("".join(map(chr, line)) for line in letters.tolist()))
    return home


@pytest.fixture
def config(home: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run in one phase with a memory that takes six steps."""
    make = make_config(home, tmp_path)

    def with_memory(*overrides: str, seed: int = 0) -> RunConfig:
        train = f"{{steps: 6, batch: 2, lr: 0.05, window: 16, context: 40, heldout: 6, texts: {home / 'long.txt'}}}"
        return make(
            "phases=null", "stream.limit=3", "evaluation.canaries=null", "memory.heads=2", "memory.chunk_size=4",
            f"memory.train={train}", *overrides, seed=seed,
        )  # fmt: skip

    return with_memory


def steps(path: Path) -> list[dict[str, Any]]:
    return [line for line in untimed(path) if line["kind"] == "memory_step"]


def test_a_memory_is_trained_before_the_stream_and_measured(config: Callable[..., RunConfig]) -> None:
    result = featcl.run(config())
    lines = untimed(result.path)
    kinds = [line["kind"] for line in lines]
    assert kinds[:9] == ["memory", *["memory_step"] * 6, "memory", "evaluation"]
    assert "memory_step" not in kinds[9:]
    assert [line["memory/step"] for line in steps(result.path)] == list(range(1, 7))
    told = result.summary["memory"]
    assert told["untrained"]["memory/closed"] == 0.0, "an untrained memory is bit-equal to none"
    assert told["untrained"]["memory/kl_memory"] == told["untrained"]["memory/kl_truncated"]
    assert told["trained"]["memory/kl_memory"] != told["untrained"]["memory/kl_memory"]
    for reader in ("memory", "truncated", "full"):
        assert {f"memory/loss_{reader}/window_{n}" for n in range(3)} <= told["trained"].keys()
    assert told["trained"]["memory/loss_full"] == told["untrained"]["memory/loss_full"]
    assert told["state_bytes"] > 0
    weights = load_file(result.path / "memory" / "memory.safetensors")
    assert float(weights["gate"].abs().sum()) > 0
    state = load_file(result.path / "memory" / "state.safetensors")
    assert float(state["weights.0"].abs().sum()) > 0, "what the stream wrote"
    updates = [line for line in lines if line["kind"] == "update"]
    assert all(line["memory/norm"] > 0 for line in updates)


def test_the_base_row_is_of_the_base_model_but_for_the_trained_memory(config: Callable[..., RunConfig]) -> None:
    """Untrained, every score is that of a run without memory, bit for bit, until something was written; also then."""
    plain = featcl.run(config("memory=null", "study=plain"))
    untrained = featcl.run(config("memory.train.lr=1e-30", "study=untrained"))
    assert untrained.matrix.values.tolist() == plain.matrix.values.tolist()
    trained = featcl.run(config())
    assert trained.matrix.values[0].tolist() != plain.matrix.values[0].tolist()


def test_the_same_seed_twice_and_another(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    one, two = featcl.run(config()), featcl.run(config(f"output={tmp_path / 'again'}"))
    assert untimed(one.path) == untimed(two.path)
    for name in ("summary.json", "memory/memory.safetensors", "memory/state.safetensors"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    three = featcl.run(config(seed=1))
    assert steps(three.path) != steps(one.path)


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("training", "kill"),
        ("stream", "signal"),
        pytest.param("training", "signal", marks=pytest.mark.slow),
        pytest.param("stream", "kill", marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_is_the_same_run(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, how: str
) -> None:
    whole = featcl.run(config(f"output={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch:
        if where == "training":
            patch.setattr(MemoryTraining, "step_", _interrupted(MemoryTraining.step_, how, at=lambda t: t.done == 3))
        else:
            patch.setattr(
                Learner, "observe", _interrupted(Learner.observe, how, at=lambda learner: learner.version == 2)
            )
        with pytest.raises(KeyboardInterrupt if how == "signal" else SystemExit):
            featcl.run(config("checkpoint.updates=1"))
    path = config().folder
    assert not (path / "summary.json").exists()
    resumed = featcl.run(config("checkpoint.updates=1"))
    assert untimed(resumed.path) == untimed(whole.path)
    assert resumed.summary == whole.summary
    for name in (
        "R.json",
        "memory/memory.safetensors",
        "memory/state.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def _interrupted(method: Callable[..., Any], how: str, *, at: Callable[[Any], bool]) -> Callable[..., Any]:
    def inside(self: Any, *arguments: Any) -> Any:
        if at(self) and how == "kill":
            raise SystemExit
        if at(self):
            os.kill(os.getpid(), signal.SIGINT)
        return method(self, *arguments)

    return inside


def test_a_trained_memory_serves_another_run(config: Callable[..., RunConfig]) -> None:
    first = featcl.run(config())
    folder = first.path / "memory"
    second = featcl.run(config(f"memory.path={folder}", "memory.train=null", "study=second"))
    assert second.matrix.values.tolist() == first.matrix.values.tolist(), "its slow weights, and an empty state"
    assert not steps(second.path)
    assert "trained" not in second.summary["memory"]
    further = featcl.run(config(f"memory.path={folder}", "study=further"))
    assert steps(further.path)[0]["memory/train_kl"] < steps(first.path)[0]["memory/train_kl"]
    with pytest.raises(
        FeatclError, match=r"memory\.path: .* has heads 2, here 4: set memory to what it was trained as"
    ):
        build(config(f"memory.path={folder}", "memory.heads=4"))
    with pytest.raises(FeatclError, match=r"memory\.path: .* holds no saved memory"):
        build(config("memory.path=nowhere"))


def test_a_version_of_long_ago_is_made_again_with_its_memory(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow weights are the run's, which are not trained again; the state is what it was then."""
    from featcl.learning.versions import load_snapshot
    from featcl.studies.ledger_edit import rollback_run

    then: list[Any] = []
    observe = Learner.observe

    def noting(self: Learner, trajectory: Any) -> Any:
        stats = observe(self, trajectory)
        if stats.version == 1:
            then.append(self.memory.state)
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "observe", noting)
        path = featcl.run(config("stream.limit=6")).path
        patch.setattr(MemoryTraining, "step_", None)
        assert rollback_run(path, "v1").remade
    state = path / "state" / json.loads((path / "state" / "current.json").read_text())["folder"]
    snapshot, _ = load_snapshot(state / "learner")
    assert snapshot.version == 1
    for name, tensor in then[0].tensors().items():
        assert torch.equal(snapshot.tensors[f"memory/{name}"], tensor)


def test_a_memory_of_features_writes_in_their_span(config: Callable[..., RunConfig]) -> None:
    """It is trained, saved and used like any other; its layer is that of the features' SAE."""
    from featcl.features import Directions

    first = featcl.run(config("memory.kind=features", "study=features"))
    assert float(load_file(first.path / "memory" / "memory.safetensors")["gate"].abs()) > 0
    saved = Directions.load(first.path / "memory" / "directions")
    assert saved.digest == Directions.load(first.path / "directions").digest
    attached = build(config("memory.kind=features", f"memory.path={first.path / 'memory'}")).learner.memory
    assert attached.layer == saved.layer == 2
    blocks: list[torch.Tensor] = []
    hook = attached.model.model.layers[2].register_forward_hook(lambda _m, _i, output: blocks.append(output[0]))
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attached.model(input_ids=ids)
        with attached.disabled():
            attached.model(input_ids=ids)
    hook.remove()
    update = blocks[0] - blocks[1]
    outside = saved.subspace().reject(update)
    assert float(update.norm()) > 0
    assert float(outside.norm() / update.norm()) < 1e-4, "a difference of activations has a floor of its own"
    with pytest.raises(FeatclError, match=r"memory\.path: .* has directions \w+, here \w+"):
        build(config("memory.kind=features", f"memory.path={first.path / 'memory'}", "features.k=7"))
    with pytest.raises(
        FeatclError, match=r"kind features at layer 1 needs features chosen there; features\.sae has \[2\]"
    ):
        build(config("memory.kind=features", "memory.layer=1"))


def test_surprise_weighs(config: Callable[..., RunConfig]) -> None:
    result = featcl.run(config("learner.weighing={signals: [memory]}"))
    updates = [line for line in untimed(result.path) if line["kind"] == "update"]
    assert all("weight/log_memory_surprise" in line and 0 < line["weight/memory"] <= 1 for line in updates)


def test_bad_input_is_one_line(config: Callable[..., RunConfig], home: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match=r"memory: layer 9 is out of range, the model has blocks 0 to 2"):
        build(config("memory.layer=9"))
    with pytest.raises(FeatclError, match=r"memory\.train\.texts: null is for the laboratory's models"):
        build(config("memory.train.texts=null"))
    with pytest.raises(FeatclError, match=r"a step needs 200 and one in five is held out"):
        build(config("memory.train.batch=200"))
    (tmp_path / "seen.txt").write_text((home / "background.txt").read_text())
    with pytest.raises(FeatclError, match=r"memory\.train\.texts .*belong to the stream"):
        build(config(f"memory.train.texts={tmp_path / 'seen.txt'}"))
    with pytest.raises(FeatclError, match=r"chat: memory\.train is for featcl run"), open_chat(config()):
        pass
    with pytest.raises(ConfigError, match=r"memory\.train\.batch: should be greater than or equal to 1"):
        config("memory.train.batch=0")


def test_what_was_stopped_by_its_guard_was_not_interrupted(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from featcl.learning.guard import Stopped

    observe = Learner.observe

    def stopping(self: Learner, trajectory: Any) -> Any:
        stats = observe(self, trajectory)
        if stats.version == 2:
            stopped = Stopped("forgetting: enough")
            stopped.stats = stats
            raise stopped
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "observe", stopping)
        with pytest.raises(Stopped):
            featcl.run(config("memory=null"))
    featcl.run(config("memory=null"))
    said = capsys.readouterr().err
    assert "was stopped by its guard (forgetting: enough); going on after 2 updates" in said
    assert "was interrupted" not in said
