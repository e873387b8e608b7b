"""The main job end to end, on a tiny random model: files, determinism, resuming, refusing, bad input."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import featcl
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.learning import Learner
from tests.conftest import tiny_model, tiny_tokenizer
from tests.runs import make_config, make_home, untimed

pytest.importorskip("sae_lens", reason="sae-lens is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an SAE, a stream of two sources and a background text."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def config(home: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`config("adapter.kind=none")`: a run on a file of trajectories."""
    return make_config(home, tmp_path)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, version: int, number: int = signal.SIGINT) -> None:
    """Deliver a signal in the middle of the update after `version`."""
    observe = Learner.observe

    def interrupted(self: Learner, trajectory: Any) -> Any:
        if self.version == version:
            os.kill(os.getpid(), number)
        return observe(self, trajectory)

    monkeypatch.setattr(Learner, "observe", interrupted)


def test_a_run_writes_what_is_documented(config: Callable[..., RunConfig]) -> None:
    result = featcl.run(config())
    names = {path.name for path in result.path.iterdir()}
    assert names == {
        "config.json", "env.json", "metrics.jsonl", "R.json", "summary.json", "report.html", "plots", "adapter",
        "state", "directions", "tables", "ledger",
    }  # fmt: skip
    assert result.path.parts[-3:] == ("test", "arm", "seed-0")
    assert result.matrix.rows == ("base", "left", "right")
    assert result.matrix.columns == ("left", "right", "background/background")
    assert result.matrix.measure == "nll"
    kinds = [line["kind"] for line in untimed(result.path)]
    updates = result.summary["updates"]
    assert kinds.count("update") == updates
    assert updates == 2 * sum(len(t) for t in _trained(result))
    assert kinds.count("canaries") == updates // 4
    assert kinds.count("evaluation") == 3
    assert "seconds" not in (result.path / "summary.json").read_text()
    assert result.summary["leak"]["leak"] < 1e-6
    assert result.summary["delta_norm"] > 0
    env = json.loads((result.path / "env.json").read_text())
    assert (env["float32_matmul"], env["seed"]) == ("highest", 0)
    assert env["hooks"] == {"blocks.2.hook_resid_post": "model.layers.2"}
    saved = json.loads((result.path / "config.json").read_text())
    assert saved["digest"] == result.summary["config_digest"] == config().digest


def _trained(result: Any) -> list[set[str]]:
    updates = [line for line in untimed(result.path) if line["kind"] == "update"]
    return [{line["trajectory"] for line in updates if line["task"] == task} for task in ("left", "right")]


def test_a_phase_may_learn_from_the_first_experiences_only(config: Callable[..., RunConfig]) -> None:
    updates = [line for line in untimed(featcl.run(config("phases.1.experiences=3")).path) if line["kind"] == "update"]
    first, second = ([u["trajectory"] for u in updates if u["task"] == "left" and u["phase"] == p] for p in (0, 1))
    assert second == first[:3]


def test_nothing_held_out_is_learned_from(config: Callable[..., RunConfig]) -> None:
    result = featcl.run(config())
    heldout = {item for column in ("left", "right") for item in result.matrix.items[column]}
    trained = set().union(*_trained(result))
    assert heldout
    assert trained
    assert not heldout & trained
    assert len(heldout | trained) < 24, "some are kept for selecting features"


def test_learning_lowers_the_likelihood_loss_of_what_is_learned(config: Callable[..., RunConfig]) -> None:
    values = featcl.run(config("phases=null", "learner.steps=4")).matrix.values
    assert values[1, 0] < values[0, 0] - 0.1
    assert values[2, 1] < values[0, 1] - 0.1


def test_the_same_seed_twice(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    one = featcl.run(config())
    two = featcl.run(config(f"output={tmp_path / 'again'}"))
    assert one.path != two.path
    assert untimed(one.path) == untimed(two.path)
    assert one.summary == two.summary
    for name in ("R.json", "summary.json", "adapter/adapter_model.safetensors", "report.html", "plots/R.png"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes() or name == "report.html", name
    three = featcl.run(config(seed=1))
    assert untimed(three.path) != untimed(one.path), "another seed is another run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_the_same_run(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = featcl.run(config(f"output={tmp_path / 'whole'}"))
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    for stop in (3, 13):  # in the first phase, and in the second
        with monkeypatch.context() as patch:
            interrupt_at(patch, stop, number)
            with pytest.raises(KeyboardInterrupt, match=r"the state is saved in .*seed-0"):
                featcl.run(config())
        path = config().folder
        assert not (path / "summary.json").exists()
        assert sum(line["kind"] == "update" for line in untimed(path)) == stop + 1, "the update was finished first"
    assert handlers == [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    resumed = featcl.run(config())
    assert untimed(resumed.path) == untimed(whole.path)
    assert resumed.summary == whole.summary
    for name in ("R.json", "adapter/adapter_model.safetensors"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_killed_run_resumes_from_its_checkpoint(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed: nothing is saved on the way out, and metrics.jsonl has lines that the checkpoint does not know."""
    whole = featcl.run(config(f"output={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "observe", _dying(Learner.observe, at=15))
        with pytest.raises(SystemExit):
            featcl.run(config())
    assert len(untimed(config().folder)) > 0
    resumed = featcl.run(config())
    assert untimed(resumed.path) == untimed(whole.path)
    assert resumed.summary == whole.summary


def _dying(observe: Callable[..., Any], *, at: int) -> Callable[..., Any]:
    def dying(self: Learner, trajectory: Any) -> Any:
        if self.version == at:
            raise SystemExit(137)
        return observe(self, trajectory)

    return dying


def test_a_damaged_checkpoint_is_one_line(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config("phases=null", "stream.limit=3", "evaluation.canaries=null")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            featcl.run(wanted)
    state = wanted.folder / "state"
    current = state / "current.json"
    session = state / json.loads(current.read_text())["folder"] / "session.json"
    for path in (current, session):
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"[]", b"{}"):
            path.write_bytes(damaged)
            with pytest.raises(FeatclError, match=rf"{path.name}: damaged .*; restore the file, or start anew"):
                featcl.run(wanted)
        path.write_bytes(whole)
    assert featcl.run(wanted).summary["updates"] > 3, "the control: restored, it goes on"


def test_a_finished_run_is_returned_and_another_config_refused(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = featcl.run(config())
    stamp = (first.path / "summary.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("featcl.run.build", lambda *_, **__: pytest.fail("a finished run is built again"))
        again = featcl.run(config())
    assert again.summary == first.summary
    assert "holds this run, finished" in capsys.readouterr().err
    with pytest.raises(FeatclError, match=r"learner\.lr was 0\.01, is 0\.5.*--overwrite"):
        featcl.run(config("learner.lr=0.5", "phases=null"))
    assert (first.path / "summary.json").stat().st_mtime_ns == stamp
    with pytest.raises(FeatclError, match="no model folder"):
        featcl.run(config("model=/nowhere"), overwrite=True)
    assert (first.path / "summary.json").stat().st_mtime_ns == stamp, "bad input loses nothing, even with overwrite"
    other = featcl.run(config("learner.lr=0.5"), overwrite=True)
    assert other.summary["config_digest"] == config("learner.lr=0.5").digest != first.summary["config_digest"]


@pytest.mark.parametrize("basis", ["random", "pca", "random_features"])
def test_control_bases_have_the_same_k(config: Callable[..., RunConfig], basis: str) -> None:
    result = featcl.run(config(f"adapter.basis={basis}", "phases=null", "stream.limit=3"))
    chosen = featcl.Directions.load(result.path / "directions")
    assert (chosen.k, chosen.selector) == (8, basis)
    assert result.summary["leak"]["leak"] < 1e-6


def test_plain_lora_has_no_promise(config: Callable[..., RunConfig]) -> None:
    result = featcl.run(config("adapter.kind=none", "phases=null", "stream.limit=3"))
    assert result.summary["leak"]["leak"] > 0.1, "negative control: the same measurement sees the plain LoRA leak"


def test_the_adapter_is_plain_peft(config: Callable[..., RunConfig], home: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = featcl.run(config("phases=null", "stream.limit=3"))
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    ids = torch.arange(20)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(result.path / "adapter")).eval()
    assert (adapted(ids).logits - before).abs().max() > 1e-3


def test_a_malformed_line_is_quarantined(config: Callable[..., RunConfig], home: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    lines = (home / "stream.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines[:3], '{"id": ', *lines[3:], '{"id": "x", "messages": 3}']) + "\n")
    with pytest.raises(FeatclError, match=r"bad\.jsonl:4: malformed JSON"):
        featcl.run(config(f"stream.path={path}"))
    assert not config().folder.exists(), "a run that never started leaves nothing"
    result = featcl.run(config(f"stream={{path: {path}, strict: false, limit: 2}}", "phases=null"))
    found = [json.loads(line) for line in (result.path / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in found] == [4, 26]
    assert result.matrix.rows == ("base", "left", "right")


def test_a_loss_that_is_not_a_number_stops_before_the_weights_change(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcl.learning import update as module

    accumulate = module.accumulate_gradient_

    def broken(terms: Any, experience: Any, student: Any) -> Any:
        done = accumulate(terms, experience, student)
        bad = {name: float("nan") for name in done.losses}
        return type(done)(**{**vars(done), "losses": bad}) if experience.trajectory.id == "t9" else done

    with monkeypatch.context() as patch:
        patch.setattr(module, "accumulate_gradient_", broken)
        with pytest.raises(FeatclError, match=r"'t9'.*nan.*weights were not changed"):
            featcl.run(config("phases=null"))
    assert (config("phases=null").folder / "state" / "current.json").is_file(), "nothing is lost"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.suites=[lab/general]"], "lab suites ask what the laboratory's models know"),
        (["features.selector=contrast"], "with what is given these work: rarity, gradient_energy"),
        (["features.sae=/nowhere"], "/nowhere"),
        (["stream.path=/nowhere.jsonl"], "/nowhere.jsonl: no such file"),
        (["adapter.kind=residual", "adapter.layers=[0]"], "layer 0"),
        (["adapter.layers=[7]"], "7"),
        (["features.sae={1: SAE}"], "was trained at blocks.2.hook_resid_post"),
        (["features.background=/nowhere.txt"], "/nowhere.txt"),
        (["learner.weighing={signals: [prior], priors: {nowhere: 0.5}}"], "no trajectory comes from 'nowhere'"),
        (["stream={path: null, name: lab/nothing}"], "lab stream 'lab/nothing' does not exist"),
    ],
)
def test_bad_input_is_one_line(
    config: Callable[..., RunConfig], home: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(FeatclError) as caught:
        featcl.run(config(*(override.replace("SAE", str(home / "sae")) for override in overrides)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_sae_of_another_width(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    tiny_model("olmo2", d_model=48).save_pretrained(tmp_path / "wide")
    tiny_tokenizer("olmo2").save_pretrained(tmp_path / "wide")
    with pytest.raises(FeatclError, match=r"width 32.*48"):
        featcl.run(config(f"model={tmp_path / 'wide'}"))


def test_two_runs_in_one_folder(config: Callable[..., RunConfig]) -> None:
    from featcl.tracking.folder import RunFolder

    one = config()
    with RunFolder(one.folder, one.to_dict(), digest=one.digest), pytest.raises(FeatclError, match="another process"):
        featcl.run(one)


def test_a_folder_that_is_no_run_is_left_alone(config: Callable[..., RunConfig]) -> None:
    folder = config().folder
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(FeatclError, match=r"'thesis\.tex' and no run"):
        featcl.run(config(), overwrite=True)
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_graded_stream_on_any_model(config: Callable[..., RunConfig]) -> None:
    """The laboratory's stream, with a model that knows nothing: the path, not the scores."""
    result = featcl.run(
        config("stream={path: null, name: lab/labels, limit: 2}", "features.selector=contrast",
               "features.background=null", "evaluation.canaries.every=2")
    )  # fmt: skip
    assert result.matrix.measure == "accuracy"
    assert result.matrix.rows == ("base", "labels_first", "labels_last")
    assert result.matrix.columns == ("labels_first", "labels_last", "labels_across")
    assert result.summary["metrics"]["probes"] == 0, "what is never taught but may change is not general ability"
    assert set(result.summary["probes"]) == {"labels_across"}
    assert "forgetting/labels_first" in next(line for line in untimed(result.path) if line["kind"] == "canaries")


def test_the_result_prints(config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    result = featcl.run(config("phases=null", "stream.limit=2"))
    capsys.readouterr()
    result.print()
    printed = capsys.readouterr().out
    assert "nats per token, lower is better" in printed
    assert "mean over tasks of R[j, j]" in printed, "brackets are not markup"
    assert "report.html" in printed


def test_an_unfinished_folder_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match="has not finished"):
        featcl.run.RunResult.load(tmp_path)  # type: ignore[attr-defined]


def test_the_quickstart_on_the_laboratory(root: Path, tmp_path: Path) -> None:
    """The shipped model, SAE and config, on a few trajectories."""
    config = RunConfig.load(
        root / "experiments" / "quickstart" / "base.yaml",
        ["stream.tasks=[home_facts]", "stream.limit=3", "tracking.wandb=disabled", f"output={tmp_path}"],
    )
    result = featcl.run(config)
    assert result.matrix.rows == ("base", "home_facts")
    assert result.matrix.values[0, 0] <= 0.15
    assert result.matrix.values[0, 1:].mean() >= 0.9
    assert result.summary["leak"]["leak"] < 1e-6


def test_a_real_model_and_real_trajectories(root: Path, real: Path, tmp_path: Path) -> None:
    """Material this project did not make, through the quickstart's own config."""
    model, text = real / "models" / "stories260K", real / "text" / "tinyshakespeare.txt.gz"
    featcl.features.train_from_files(str(model), [text], [2], tmp_path / "sae", tokens=30_000)
    config = RunConfig.load(
        root / "experiments" / "quickstart" / "base.yaml",
        [
            f"model={model}", f"features.sae={tmp_path / 'sae'}", "features.selector=rarity",
            f"features.background={text}", "evaluation.suites=[]", "study=real", "stream.limit=3",
            f"stream.path={real / 'trajectories' / 'swe_agent.jsonl'}", "phases=null", "tracking.wandb=disabled",
            f"output={tmp_path}",
        ],
    )  # fmt: skip
    result = featcl.run(config)
    assert result.matrix.columns == ("swe-agent", "background/tinyshakespeare")
    assert result.summary["tokens_left_out"] > 0, "they are longer than the model's context, and the record says so"
    assert result.matrix.values[1, 0] < result.matrix.values[0, 0], "held-out trajectories became more likely"
    assert result.summary["leak"]["leak"] < 1e-6
