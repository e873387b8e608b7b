"""W&B: an offline run's own records hold what was logged; without W&B, or with it failing, the run goes on."""

from __future__ import annotations

import builtins
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from featcl.errors import FeatclError
from featcl.tracking.base import Behind, Guarded, RunNames, Trackers, run_tags
from featcl.tracking.jsonl import JsonlTracker, read_metrics
from featcl.tracking.plots import score_heatmap
from featcl.tracking.wandb import WandbTracker, open_wandb
from tests.tracking import offline

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"study": "quickstart", "arm": "base", "seed": 0, "learner": {"lr": 1e-3}, "model": "lab/olmo2"}
RUN = RunNames.of({**CONFIG, "tracking": {"project": "featcl", "tags": ["mine"]}})
NAMES = {
    "train/loss": 1.5,
    "distill/reverse_kl": 0.25,
    "optim/lr": 1e-3,
    "forgetting/home": 0.125,
    "general/lab": 0.9,
    "constraint/leak": 1e-8,
    "projection/energy_ratio": 0.25,
    "constraint/delta_norm": 0.5,
    "cost/tokens": 37,
}


def runs(folder: Path, kind: str = "offline-run") -> list[Path]:
    found = sorted(folder.glob(f"wandb/{kind}-*/run-*.wandb"))
    for path in found:
        offline.wait(path)
    return found


@pytest.fixture
def wandb() -> Any:
    return pytest.importorskip("wandb", reason="wandb is not installed")


def test_an_offline_run_holds_scalars_table_image_and_summary(
    wandb: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for folder in ("adapter", "directions/4"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.safetensors").write_bytes(b"numbers")
    tracker = open_wandb(tmp_path, RUN)
    assert tracker is not None
    for update in range(1, 301):
        tracker.log({**NAMES, "tokens_seen": 37 * update, "task": "home", "bad": float("nan")}, update)
    picture = score_heatmap(tmp_path / "R.png", rows=["base", "a"], columns=["a"], values=[[0.0], [1.0]])
    tracker.table("R/items", ("after", "column", "score"), [["base", "a", 0.0], ["a", "a", 1.0]])
    tracker.table("samples", ("after", "tokens", "kl"), [["a", ["he", "y"], [0.5, 0.0]]])
    tracker.image("R/heatmap", picture)
    tracker.finish({"metrics": {"acc": 0.75, "name": "text"}})

    (path,) = runs(tmp_path)
    rows = offline.history(path)
    scalars = [row for row in rows if "train/loss" in row]
    assert len(scalars) == 300
    assert [row["tokens_seen"] for row in scalars] == [37 * update for update in range(1, 301)]
    for name, value in NAMES.items():
        assert scalars[-1][name] == value, name
    assert "task" not in scalars[-1]
    assert "bad" not in scalars[-1]
    kinds = {name: value for row in rows for name, value in row.items() if name.endswith("/_type")}
    tables = {"R/items/_type": "table-file", "samples/_type": "table-file"}
    assert kinds == {**tables, "R/heatmap/_type": "image-file"}
    (samples,) = tmp_path.glob("wandb/*/files/media/table/samples*.table.json")
    assert json.loads(samples.read_text())["data"] == [["a", '["he", "y"]', "[0.5, 0.0]"]]
    found = offline.artifacts(path)
    assert found[f"adapter-{RUN.id}"] == ("model", {"x.safetensors": str(tmp_path / "adapter" / "x.safetensors")})
    assert found[f"directions-{RUN.id}"][1] == {"4/x.safetensors": str(tmp_path / "directions/4/x.safetensors")}
    assert offline.summary(path)["metrics/acc"] == 0.75
    assert offline.metrics(path)["*"] == "tokens_seen"
    run = offline.run(path)
    assert (run.run_id, run.project, run.run_group, run.job_type) == (RUN.id, "featcl", "quickstart", "base")
    assert run.display_name == "base-seed-0"
    assert list(run.tags) == ["lab/olmo2", "mine"]
    assert {item.key: item.value_json for item in run.config.update}["seed"] == "0"
    assert list(tmp_path.glob("wandb/*/files/media/images/**/*.png"))
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_a_resumed_run_is_the_same_run_and_whole(wandb: Any, tmp_path: Path) -> None:
    first = open_wandb(tmp_path, RUN)
    jsonl = JsonlTracker(tmp_path / "metrics.jsonl")
    assert first is not None
    for update in range(1, 4):
        for tracker in (first, jsonl):
            tracker.log({"train/loss": 1.0 / update, "tokens_seen": update}, update)
    for tracker in (first, jsonl):
        tracker.finish({})
    again = open_wandb(tmp_path, RUN, history=read_metrics(tmp_path / "metrics.jsonl").records)
    assert again is not None
    again.log({"train/loss": 0.25, "tokens_seen": 4}, 4)
    again.finish({})
    (path,) = runs(tmp_path)
    assert len(runs(tmp_path, "superseded")) == 1
    assert offline.run(path).run_id == RUN.id
    assert [row["tokens_seen"] for row in offline.history(path) if "train/loss" in row] == [1, 2, 3, 4]


def test_an_interrupted_run_has_no_artifacts_yet(wandb: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "x").write_text("of an earlier state")
    tracker = open_wandb(tmp_path, RUN)
    assert tracker is not None
    tracker.log({"train/loss": 1.0, "tokens_seen": 1}, 1)
    tracker.finish({})
    (path,) = runs(tmp_path)
    assert offline.artifacts(path) == {}


def test_the_id_follows_from_what_decides_the_numbers() -> None:
    moved = {**CONFIG, "output": "elsewhere", "checkpoint": {"seconds": 1.0}, "tracking": {"wandb": "online"}}
    assert RunNames.of(dict(reversed(moved.items()))).id == RUN.id
    assert RunNames.of({**CONFIG, "digest": "of the file"}).id == RUN.id
    assert RunNames.of({**CONFIG, "seed": 1}).id != RUN.id
    with pytest.raises(FeatclError, match="'arm' is missing"):
        RunNames.of({"study": "quickstart", "seed": 0})


def test_tags_say_what_the_run_is() -> None:
    config = {
        "model": "lab/olmo2", "stream": {"path": "data/talks.jsonl"}, "adapter": {"kind": "both"},
        "phases": [{"objectives": [{"name": "sft"}]}, {"objectives": [{"name": "sft"}, {"name": "distillation"}]}],
        "methods": [{"name": "ewc"}], "tracking": {"tags": ["x" * 99]},
    }  # fmt: skip
    tags = RunNames("p", "s", "a", 0, {}, run_tags(config)).tags
    assert tags == ("lab/olmo2", "talks", "both", "sft", "distillation", "ewc", "x" * 64)


def test_starting_is_quick_and_a_record_costs_little(wandb: Any, tmp_path: Path) -> None:
    start = time.process_time()
    tracker = open_wandb(tmp_path, RUN)
    assert tracker is not None
    opened = time.process_time() - start
    start = time.process_time()
    for update in range(200):
        tracker.log({**NAMES, "tokens_seen": update}, update)
    logged = (time.process_time() - start) / 200
    tracker.finish({})
    assert opened < 2.0
    assert logged < 2e-3


def test_disabled_writes_nothing_and_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    assert open_wandb(tmp_path, RUN, mode="disabled") is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FeatclError, match="offline, online or disabled"):
        open_wandb(tmp_path, RUN, mode="sometimes")  # type: ignore[arg-type]


def test_a_missing_wandb_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **options: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with caplog.at_level(logging.WARNING):
        assert open_wandb(tmp_path, RUN) is None
    assert [record.getMessage() for record in caplog.records] == [
        "wandb is not installed; the run goes on without it (pip install wandb, or tracking.wandb=disabled)"
    ]


def test_a_broken_installation_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "side" / "wandb").mkdir(parents=True)
    (tmp_path / "side" / "wandb" / "__init__.py").write_text("raise RuntimeError('protobuf is of another version')")
    monkeypatch.syspath_prepend(tmp_path / "side")
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with caplog.at_level(logging.WARNING):
        assert open_wandb(tmp_path, RUN) is None
    assert "cannot be imported (RuntimeError: protobuf is of another version)" in caplog.text
    assert len(caplog.records) == 1


class Broken:
    """A W&B run of which some methods raise."""

    id = "x"

    def __init__(self, *failing: str, error: Exception | None = None) -> None:
        self.failing, self.error, self.calls = failing, error or RuntimeError("service is gone\nlong story"), []
        self.summary: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> None:
            self.calls.append(name)
            if name in self.failing:
                raise self.error

        return call


@pytest.mark.parametrize("method", ["log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("service is gone\nlong story"), OSError(28, "No space left on device")])
def test_a_failing_wandb_is_said_once_and_nothing_is_lost(
    method: str, error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(method, error=error)
    trackers = Trackers(JsonlTracker(tmp_path / "metrics.jsonl"), Guarded(WandbTracker(broken), "W&B"))
    with caplog.at_level(logging.WARNING):
        for update in range(3):
            trackers.log({"train/loss": 1.0}, update)
        trackers.finish({"acc": 1.0})
        trackers.finish({})
    assert broken.calls.count(method) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"W&B {method} failed ({type(error).__name__}: {str(error).splitlines()[0]}); the run goes on without it, "
        "metrics.jsonl is whole"
    ]
    assert [record["update"] for record in read_metrics(tmp_path / "metrics.jsonl").records] == [0, 1, 2]


def test_a_service_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    """The run waits for it at its end alone, and not for ever; one that is only slow gets everything, in order."""

    class Slow(Broken):
        def __init__(self, wait: float) -> None:
            super().__init__()
            self.wait, self.rows = wait, []

        def log(self, row: dict) -> None:
            time.sleep(self.wait)
            self.rows.append(row["update"])

    hanging, slow = Slow(30.0), Slow(0.005)
    for run, seconds in ((hanging, 0.2), (slow, 30.0)):
        tracker = Behind(Guarded(WandbTracker(run), "W&B"), seconds=seconds)
        start = time.monotonic()
        for update in range(20):
            tracker.log({"train/loss": 1.0}, update)
        assert time.monotonic() - start < 0.1
        tracker.finish({"acc": 1.0})
        tracker.finish({})
        assert tracker.failed == (run is hanging)
    assert slow.rows == list(range(20))
    assert [record.getMessage() for record in caplog.records] == [
        "W&B does not end; the run goes on without it, metrics.jsonl is whole"
    ]


def test_what_metrics_jsonl_cannot_take_stops_the_run(tmp_path: Path) -> None:
    """The control: the truth itself is not guarded."""

    class Full(JsonlTracker):
        def log(self, record: Any, step: int) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Trackers(Full(tmp_path / "metrics.jsonl"), Guarded(WandbTracker(Broken()), "W&B")).log({}, 1)


def test_a_wandb_that_does_not_start_stops_nothing(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes: list[str] = []

    def refuse(**options: Any) -> None:
        modes.append(options["settings"].mode)
        raise OSError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(wandb, "login", lambda *, prompt, verify: True)
    with caplog.at_level(logging.WARNING):
        assert open_wandb(tmp_path, RUN, mode="online") is None
    assert modes == ["online", "offline"], "online falls back to offline before it gives up"
    assert len(caplog.records) == 1


def test_online_without_a_login_asks_nobody_and_goes_offline(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with caplog.at_level(logging.WARNING):
        tracker = open_wandb(tmp_path, RUN, mode="online")
    assert tracker is not None
    tracker.log({"train/loss": 1.0, "tokens_seen": 1}, 1)
    tracker.finish({})
    (path,) = runs(tmp_path)
    assert offline.history(path)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("featcl")]
    assert len(said) == 1
    assert "no login; run `wandb login` once" in said[0]


KILLED = """
import os, signal, sys
from pathlib import Path
from featcl.tracking.base import RunNames, Trackers
from featcl.tracking.jsonl import JsonlTracker
from featcl.tracking.wandb import open_wandb
folder, OWN = Path(sys.argv[1]), str(os.getpid()).encode()
names = RunNames.of({"study": "s", "arm": "a", "seed": 0})
trackers = Trackers(JsonlTracker(folder / "metrics.jsonl"), open_wandb(folder, names))
def command(process):
    try:
        return (process / "cmdline").read_bytes().split(bytes(1))
    except OSError:
        return []
processes = [process for process in Path("/proc").iterdir() if process.name.isdecimal()]
own = [int(p.name) for p in processes if (c := command(p)) and c[0].endswith(b"wandb-core") and OWN in c]
assert len(own) == 1, "W&B has a process of its own"
for update in range(200):
    if update == 100:
        for pid in own:
            os.kill(pid, signal.SIGKILL)
    trackers.log({"train/loss": 1.0, "tokens_seen": update}, update)
trackers.finish({"acc": 1.0})
print("the run ended")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="W&B's process is found through /proc")
def test_a_run_outlives_the_process_of_wandb(wandb: Any, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # not the one of these tests
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=env)
    assert done.stdout == "the run ended\n", done.stderr
    assert done.returncode == 0
    assert len(read_metrics(tmp_path / "metrics.jsonl").records) == 200
    assert len([line for line in done.stderr.splitlines() if "the run goes on without it" in line]) == 1
