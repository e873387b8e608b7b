"""W&B: an offline run's own records hold what was logged; without W&B, or with it failing, the run goes on."""

from __future__ import annotations

import builtins
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from featcl.errors import FeatclError
from featcl.tracking.jsonl import JsonlTracker, read_metrics
from featcl.tracking.plots import score_heatmap
from featcl.tracking.wandb import WandbRun, WandbTracker, open_wandb
from tests.tracking import offline

RUN = WandbRun("featcl", "quickstart", "base", 0, {"study": "quickstart", "seed": 0, "learner": {"lr": 1e-3}})
NAMES = {
    "train/loss": 1.5,
    "distill/reverse_kl": 0.25,
    "optim/lr": 1e-3,
    "forgetting/home": 0.125,
    "general/lab": 0.9,
    "constraint/leak": 1e-8,
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
    tracker = open_wandb(tmp_path, RUN)
    assert tracker is not None
    for update in range(1, 301):
        tracker.log({**NAMES, "tokens_seen": 37 * update, "task": "home", "bad": float("nan")}, update)
    picture = score_heatmap(tmp_path / "R.png", rows=["base", "a"], columns=["a"], values=[[0.0], [1.0]])
    tracker.table("R/items", ("after", "column", "score"), [["base", "a", 0.0], ["a", "a", 1.0]])
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
    assert kinds == {"R/items/_type": "table-file", "R/heatmap/_type": "image-file"}
    assert offline.summary(path)["metrics/acc"] == 0.75
    assert offline.metrics(path)["*"] == "tokens_seen"
    run = offline.run(path)
    assert (run.run_id, run.project, run.run_group, run.job_type) == (RUN.id, "featcl", "quickstart", "base")
    assert run.display_name == "base-seed-0"
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


def test_the_id_follows_from_the_config_alone() -> None:
    other = WandbRun("p", "s", "a", 0, {"learner": {"lr": 1e-3}, "seed": 0, "study": "quickstart"})
    assert other.id == RUN.id
    assert WandbRun("featcl", "quickstart", "base", 0, {"seed": 1}).id != RUN.id


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


def test_a_failing_wandb_is_said_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        calls = 0

        def log(self, row: dict) -> None:
            self.calls += 1
            raise RuntimeError("service is gone\nlong story")

    broken = Broken()
    tracker = WandbTracker(broken)
    with caplog.at_level(logging.WARNING):
        for update in range(3):
            tracker.log({"train/loss": 1.0}, update)
        tracker.finish({"acc": 1.0})
    assert broken.calls == 1
    assert len(caplog.records) == 1
    assert "service is gone" in caplog.text
    assert "long story" not in caplog.text


def test_a_wandb_that_does_not_start_stops_nothing(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes: list[str] = []

    def refuse(**options: Any) -> None:
        modes.append(options["settings"].mode)
        raise OSError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        assert open_wandb(tmp_path, RUN, mode="online") is None
    assert modes == ["online", "offline"], "online falls back to offline before it gives up"
    assert len(caplog.records) == 2
