"""Continual-learning methods in a run, chosen in its config: what they cost, that they resume, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import featcl
from featcl.build import build
from featcl.config import ConfigError, RunConfig
from featcl.errors import FeatclError
from featcl.learning import Learner
from featcl.learning.history import History
from featcl.plan import BeginTask, Update, plan
from featcl.studies.export import export_run
from featcl.studies.ledger_blame import blame_run
from featcl.studies.ledger_diff import diff_runs
from tests.runs import make_config, make_home, untimed

pytest.importorskip("sae_lens", reason="sae-lens is not installed")

ONE_PHASE = "phases=null"
CASES: dict[str, tuple[str, ...]] = {
    "ewc and replay": ("methods=[{name: ewc, experiences: 4}, {name: replay, budget: 6, file: kept.bin}]",),
    "si": ("methods=[{name: si}]",),
    "der": ("methods=[{name: der, budget: 4}]",),
    "lwf": ("methods=[{name: lwf, match: features}]", "adapter.kind=write"),
    "merging": ("methods=[{name: merging, method: average}]", "adapter.kind=none"),
    "baking": ("methods=[{name: baking, every: 4}]",),
    "routed": ("methods=[{name: routed, examples: 4}]",),
    "in_context": ("methods=[{name: in_context, tokens: 160, reply_tokens: 16}]",),
}
SLOW = ("si", "der", "lwf")
DENOISING = "learner.denoising={every: 1, spans: 2, heldout: 2}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an SAE, a stream of two sources and a background text."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def config(home: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`config("adapter.kind=none")`: a run on a file of trajectories, in one phase."""
    make = make_config(home, tmp_path)
    return lambda *overrides, **settings: make(ONE_PHASE, *overrides, **settings)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Deliver Ctrl-C in the middle of this experience, counted from 0."""
    observe, count = Learner.observe, itertools.count()

    def interrupted(self: Learner, trajectory: Any) -> Any:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return observe(self, trajectory)

    monkeypatch.setattr(Learner, "observe", interrupted)


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_a_run_that_was_interrupted_ends_the_same(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    whole = featcl.run(config(*CASES[case]))
    names = [method.name for method in config(*CASES[case]).methods]
    assert list(whole.summary["methods"]) == sorted(names)
    lines = untimed(whole.path)
    told = [(line["when"], line["task"]) for line in lines if line["kind"] == "methods"]
    assert told == [("begin", "left"), ("end", "left"), ("begin", "right"), ("end", "right")]
    experiences = sum(line["kind"] in ("update", "postponed") for line in lines)
    with monkeypatch.context() as patched:
        interrupt_at(patched, experiences * 2 // 3)
        with pytest.raises(KeyboardInterrupt):
            featcl.run(config(*CASES[case], f"output={tmp_path / 'again'}", "checkpoint.updates=2"))
    again = featcl.run(config(*CASES[case], f"output={tmp_path / 'again'}", "checkpoint.updates=2"))
    assert again.summary == whole.summary
    assert untimed(again.path) == lines
    assert (again.path / "R.json").read_bytes() == (whole.path / "R.json").read_bytes()


def test_a_run_that_is_killed_before_it_starts_can_be_started_again(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between building and starting nothing of a method lies in the folder, which holds no run yet."""
    chosen = config("methods=[{name: replay, budget: 6, file: kept.bin}]", "evaluation.canaries=null")
    with monkeypatch.context() as patched:
        patched.setattr("featcl.run.Session", _killed)
        with pytest.raises(Killed):
            featcl.run(chosen)
    assert not (chosen.folder / "methods").exists()
    result = featcl.run(chosen)
    assert result.summary["methods"]["replay"]["stored_bytes"] > 0
    assert (chosen.folder / "methods" / "kept.bin").stat().st_size > 0, "negative control: then there is one"


class Killed(BaseException):
    """The process is gone."""


def _killed(*_: Any) -> Any:
    raise Killed


@pytest.mark.parametrize("kind", ["full", "mixture"])
def test_what_no_features_bound_is_not_told_by_features(config: Callable[..., RunConfig], kind: str) -> None:
    result = featcl.run(config(f"adapter.kind={kind}", "evaluation.canaries=null", "stream.limit=2", "arm=rival",
                               "learner.lr=1e-3", "tracking.ledger=coordinates"))  # fmt: skip
    other = featcl.run(config("evaluation.canaries=null", "stream.limit=2", "tracking.ledger=coordinates"))
    for act, message in (
        (lambda path: diff_runs(path, "v1", "v2"), "no features bound what this run trained"),
        (lambda path: blame_run(path, feature=str(_features(other.path)[0])), "no features bound what this run"),
        (lambda path: export_run(path, form="peft"), f"kind '{kind}' is no LoRA, so there is none to export"),
    ):
        with pytest.raises(FeatclError, match=message) as caught:
            act(result.path)
        assert "\n" not in str(caught.value)
        act(other.path)  # negative control
    assert History(result.path / "ledger").coordinates(2), "the versions themselves are there"


def _features(path: Path) -> list[int]:
    return [key.feature for key in History(path / "ledger").features().vectors(History(path / "ledger").coordinates(1))]


def test_without_methods_nothing_is_told(config: Callable[..., RunConfig]) -> None:
    experiment = build(config("evaluation.canaries=null"))
    assert list(experiment.learner.methods) == []
    assert {type(step).__name__ for step in plan(experiment)} == {"Evaluate", "Update"}
    told = build(config("evaluation.canaries=null", "methods=[{name: ewc}]"))
    assert [type(step).__name__ for step in plan(told)].count("EndTask") == 2, "negative control"


def test_settings_say_what_comes_when(config: Callable[..., RunConfig]) -> None:
    def taught(*overrides: str) -> dict[str, list[str]]:
        experiment = build(config("evaluation.canaries=null", "methods=[{name: ewc}]", *overrides))
        found: dict[str, list[str]] = {}
        for step in plan(experiment):
            if isinstance(step, Update):
                found.setdefault(step.task, []).append(step.trajectory.id)  # type: ignore[union-attr]
            if isinstance(step, BeginTask):
                whole = {task.name: task.trajectories for task in experiment.material.tasks}[step.task]
                assert step.upcoming == whole, "each once, whatever the passes"
        return found

    streamed = taught()
    assert list(streamed) == ["left", "right"]
    batches = taught("stream.setting=batches", "stream.passes=2")
    assert list(batches) == ["left", "right"]
    half = len(streamed["left"])
    first, second = batches["left"][:half], batches["left"][half:]
    assert sorted(first) == sorted(second) == sorted(streamed["left"])
    assert first != second, "each pass in an order of its own"
    joint = taught("stream.setting=joint")
    assert list(joint) == ["joint"]
    assert sorted(joint["joint"]) == sorted(streamed["left"] + streamed["right"])
    assert joint["joint"] != streamed["left"] + streamed["right"], "shuffled"
    assert taught("stream.setting=domain").keys() == streamed.keys(), "two sources are two domains"


def test_joint_training_is_one_task(config: Callable[..., RunConfig]) -> None:
    result = featcl.run(config("stream.setting=joint", "evaluation.canaries=null"))
    assert result.matrix.rows == ("base", "joint")
    assert result.matrix.columns == ("joint", "left", "right", "background/background")
    assert list(result.summary["probes"]) == ["left", "right"]
    both = {f"{c}/{i}": s for c in ("left", "right") for i, s in result.matrix.items[c].items()}
    assert result.matrix.items["joint"] == both
    assert result.summary["metrics"]["acc"] == pytest.approx(-sum(s[-1] for s in both.values()) / len(both))
    assert result.summary["metrics"]["bwt"] is None, "there is no task before another"


def test_tasks_that_are_learned_alone_start_from_the_base(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    same = ("methods=[{name: replay, budget: 4}]", "evaluation.canaries=null", "features.selector=ids",
            "features.feature_ids=[1, 2, 3, 5, 8, 13, 21, 34]")  # fmt: skip
    alone = featcl.run(config(*same, "stream.setting=alone"))
    other = tmp_path / "right.jsonl"
    lines = Path(config().stream.path).read_text().splitlines()  # type: ignore[arg-type]
    other.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["source"] == "right"))
    by_itself = featcl.run(config(*same, f"stream.path={other}", "arm=itself"))
    streamed = featcl.run(config(*same, "arm=streamed"))
    right = [list(run.matrix.values[-1, run.matrix.columns.index("right") :]) for run in (alone, by_itself, streamed)]
    assert right[0] == right[1]
    assert right[0] != right[2], "negative control: after the other task it is another model"
    assert alone.summary["metrics"]["bwt"] is None
    assert alone.summary["metrics"]["learning_accuracy"] is not None
    assert alone.summary["updates"] == streamed.summary["updates"]


@pytest.mark.parametrize("kind", ["full", "osf", "mixture"])
def test_rivals_that_train_the_weights(config: Callable[..., RunConfig], kind: str) -> None:
    result = featcl.run(config(f"adapter.kind={kind}", "evaluation.canaries=null", "learner.lr=1e-3"))
    assert result.summary["leak"] is None, "it is bounded by no features"
    assert result.summary["delta_norm"] > 0
    assert result.matrix.values[-1, 1] < result.matrix.values[0, 1], "the last task was learned"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods=[{name: replay, budget: 0}]"], "replay: budget must be a whole number of at least 1, not 0"),
        (["methods=[{name: rehearsal}]"], "rehearsal: material is missing; give instructions, pretraining, a file"),
        (["methods=[{name: rehearsal, material: instructions}]"], "this stream brings no instructions with it"),
        (["methods=[{name: rehearsal, material: instuctions}]"], "there is no file 'instuctions'; did you mean"),
        (["methods=[{name: rehearsal, material: 3}]"], "rehearsal: material is 3; give instructions, pretraining"),
        (["methods=[{name: rehearsal, material: STREAM}]"], "belong to the stream or to the evaluation"),
        (["methods=[{name: ewc}, {name: merging}]", "adapter.kind=none"], "ewc and merging make no sense together"),
        (["methods=[{name: ewc}, {name: ewc}]"], "ewc is given twice"),
        (["methods=[{name: routed}]", "stream.setting=joint"], "a router needs at least two tasks, the stream has 1"),
        (["methods=[{name: olora}]", "adapter.kind=residual"], "olora: kind 'residual' is no LoRA"),
        (["adapter.kind=full", "adapter.rank=4"], "kind 'full' is bounded by no features and has no use for rank"),
        (["adapter.kind=osf", "adapter.preserved=99999"], "osf: 99999 would keep 99999 of"),
        (["adapter.kind=full", DENOISING], "denoising: kind 'full' is bounded by no features"),
        (["adapter.kind=osf", DENOISING], "denoising: kind 'osf' is bounded by no features"),
        (["adapter.kind=mixture", DENOISING], "denoising: kind 'mixture' is bounded by no features"),
        (["methods=[{name: cartridge, tokens: 4096}]"], "a prefix of 4096 tokens leaves nothing of the model's"),
    ],
)
def test_bad_input_is_one_line(
    config: Callable[..., RunConfig], home: Path, overrides: list[str], message: str
) -> None:
    overrides = [each.replace("STREAM", str(home / "stream.jsonl")) for each in overrides]
    with pytest.raises((FeatclError, ConfigError)) as caught:
        build(config("evaluation.canaries=null", *overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_material_is_what_the_stream_brings_or_a_file(
    config: Callable[..., RunConfig], home: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("a line about something else entirely\n")
    experiment = build(config(
        "evaluation.canaries=null", f"methods=[{{name: rehearsal, material: [pretraining, {kept}]}}, "
        f"{{name: null_space, retained: {kept}}}]",
    ))  # fmt: skip
    rehearsal, null_space = experiment.learner.methods
    texts = [each.text for each in rehearsal.material]  # type: ignore[attr-defined]
    assert texts[:-1] == list(experiment.material.plain_background)
    assert texts[-1].strip() == "a line about something else entirely"
    assert [text.strip() for text in null_space.retained] == [texts[-1].strip()]  # type: ignore[attr-defined]


def test_what_stands_in_front_is_scored(config: Callable[..., RunConfig]) -> None:
    """With the texts in front, R is of other prompts; where nothing is kept yet, it is the base's, bit for bit."""
    result = featcl.run(config(*CASES["in_context"], "arm=context"))
    frozen = featcl.run(config("learner.objectives=[{name: sft, weight: 0.0}]", "arm=frozen"))
    assert result.summary["delta_norm"] == 0.0
    assert result.matrix.values[0].tolist() == frozen.matrix.values[0].tolist()
    assert frozen.matrix.values[-1].tolist() == frozen.matrix.values[0].tolist(), "negative control"
    assert (result.matrix.values[-1, :2] != result.matrix.values[0, :2]).all()
    assert result.matrix.values[-1, 2] == result.matrix.values[0, 2], "nothing stands in front of raw text"
