"""TensorBoard and Trackio, where they are installed; one line where they are not; any of them again from JSONL."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from featcl.errors import FeatclError
from featcl.tracking.base import Record, RunNames, Tracker
from featcl.tracking.jsonl import JsonlTracker, read_metrics, read_rows
from featcl.tracking.names import NAMES, meaning
from featcl.tracking.opening import OPTIONAL, open_backends
from featcl.tracking.plots import score_heatmap
from featcl.tracking.rebuild import rebuild, replay
from tests.tracking import offline
from tests.tracking.folders import make

ROOT = Path(__file__).resolve().parents[2]
RUN = RunNames.of({"study": "quickstart", "arm": "base", "seed": 0})


class Kept:
    """A tracker that remembers all it is given."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, Any]]] = []
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
        self.images: dict[str, bytes] = {}
        self.summary: Record | None = None

    def log(self, record: Record, step: int) -> None:
        self.records.append((step, dict(record)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[name] = (list(columns), [list(row) for row in rows])

    def image(self, name: str, path: str | Path) -> None:
        self.images[name] = Path(path).read_bytes()

    def finish(self, summary: Record) -> None:
        self.summary = summary


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """(Tokens seen, value) of every record that has it; at least a hundred."""
    records = read_metrics(folder / "metrics.jsonl").records
    found = [(record["tokens_seen"], record[name]) for record in records if name in record]
    assert len(found) >= 100
    return found


def test_what_is_replayed_is_what_was_logged(tmp_path: Path) -> None:
    live, jsonl = Kept(), JsonlTracker(tmp_path / "metrics.jsonl")
    assert isinstance(live, Tracker)
    for tracker in (live, jsonl):
        for update in range(1, 8):
            tracker.log({"train/loss": 1 / update, "tokens_seen": 3 * update, "task": "a"}, update)
        tracker.table("samples", ("after", "tokens", "kl"), [["a", ["x", "y"], [0.5, 0.0]]])
    jsonl.finish({})
    picture = score_heatmap(tmp_path / "plots" / "R.png", rows=["base"], columns=["a"], values=[[0.5]])
    (tmp_path / "summary.json").write_text('{"acc": 0.5}')
    again = Kept()
    assert replay(tmp_path, again) == 7
    assert again.records == live.records
    assert again.tables == live.tables
    assert again.images == {"plots/R": picture.read_bytes()}
    assert again.summary == {"acc": 0.5}
    assert read_rows(tmp_path, "samples") == live.tables["samples"][1]
    assert read_rows(tmp_path, "other") == []


def test_an_old_run_is_rebuilt_in_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder = make(tmp_path / "run")
    assert rebuild(folder, "wandb") == len(read_metrics(folder / "metrics.jsonl").records)
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    offline.wait(path)
    losses = [row["train/loss"] for row in offline.history(path) if "train/loss" in row]
    assert losses == [value for _, value in logged(folder, "train/loss")]
    assert offline.summary(path)["metrics/acc"] == 0.71
    assert offline.run(path).run_group == "quickstart"


def test_a_folder_that_is_no_run_and_an_unknown_backend_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match=r"no config\.json"):
        rebuild(tmp_path, "wandb")
    with pytest.raises(FeatclError, match="'mlflow' is none of wandb, tensorboard, trackio"):
        rebuild(tmp_path, "mlflow")  # type: ignore[arg-type]
    with pytest.raises(FeatclError, match="'mlflow' is none of tensorboard, trackio"):
        open_backends(tmp_path, RUN, wandb="disabled", backends=("mlflow",))


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_a_missing_package_is_one_line_that_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for hidden in [
        key for key in sys.modules if key.split(".")[0] == name or key.startswith("torch.utils.tensorboard")
    ]:
        monkeypatch.delitem(sys.modules, hidden)
    monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING):
        assert open_backends(tmp_path, RUN, wandb="disabled", backends=(name,)) == []
    assert len(caplog.records) == 1
    assert f"pip install 'featcl[{name}]'" in caplog.text
    (tmp_path / "config.json").write_text(json.dumps(dict(RUN.config)))
    with pytest.raises(FeatclError, match=f"{name} cannot be opened"):
        rebuild(tmp_path, name)  # type: ignore[arg-type]


def test_one_that_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("read-only file system")

    monkeypatch.setitem(OPTIONAL, "trackio", refuse)
    assert open_backends(tmp_path, RUN, wandb="disabled", backends=("trackio",)) == []
    assert [record.getMessage() for record in caplog.records] == [
        "trackio does not start (PermissionError: read-only file system); the run goes on without it"
    ]


def test_names_have_a_meaning_which_the_documentation_gives() -> None:
    assert meaning("train/loss")
    assert meaning("forgetting/home/names") == NAMES["forgetting/*"]
    assert meaning("nonsense") is None
    assert meaning("nonsense/x") is None
    told = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
    for name, what in NAMES.items():
        assert f"| `{name}` | {what} |" in told, name


# --- the real thing, in a process of its own, from FEATCL_SIDE_<NAME> where it is not installed beside featcl


def in_process(package: str, code: str, folder: Path) -> Any:
    """Run code that prints JSON with the package on the path; skip where it is not installed."""
    side = os.environ.get(f"FEATCL_SIDE_{package.upper()}", "")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), side))),
        "TRACKIO_DIR": str(folder / "t"),
    }
    there = subprocess.run([sys.executable, "-c", f"import {package}"], env=env, capture_output=True, check=False)
    if there.returncode:
        pytest.skip(f"{package} is not installed (FEATCL_SIDE_{package.upper()} may name a folder that has it)")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TENSORBOARD = """
import json, sys
from featcl.tracking.rebuild import rebuild
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
folder = sys.argv[1]
assert rebuild(folder, "tensorboard") == rebuild(folder, "tensorboard"), "the second time replaces the first"
events = EventAccumulator(folder + "/tensorboard", size_guidance={"scalars": 0, "tensors": 0}).Reload()
scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
print(json.dumps({"scalars": scalars, "texts": texts, "images": events.Tags()["images"]}))
"""


def test_tensorboard_holds_scalars_tables_images_and_summary(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    score_heatmap(folder / "plots" / "R.png", rows=["base"], columns=["a"], values=[[0.5]])
    found = in_process("tensorboard", TENSORBOARD, folder)
    for name in ("train/loss", "optim/lr", "cost/tokens"):
        expected = [(tokens, pytest.approx(value, rel=1e-6)) for tokens, value in logged(folder, name)]
        assert [tuple(pair) for pair in found["scalars"][name]] == expected
    assert found["scalars"]["summary/metrics/acc"][0][1] == pytest.approx(0.71)
    assert "| 17 | formal register | 0.8 | -0.1 |" in found["texts"]["features/text_summary"]
    assert found["images"] == ["plots/R"]


TRACKIO = """
import json, sqlite3, sys
from pathlib import Path
from featcl.tracking.rebuild import rebuild
folder = Path(sys.argv[1])
sent = rebuild(folder, "trackio")
(base,) = (folder / "t").glob("*.db")
rows = sqlite3.connect(base).execute("select step, metrics from metrics order by rowid").fetchall()
print(json.dumps({"sent": sent, "rows": [[step, json.loads(metrics)] for step, metrics in rows]}))
"""


def test_trackio_holds_scalars_and_summary_and_prints_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    found = in_process("trackio", TRACKIO, folder)
    losses = [(step, row["train/loss"]) for step, row in found["rows"] if "train/loss" in row]
    assert losses == [(tokens, pytest.approx(value)) for tokens, value in logged(folder, "train/loss")]
    assert any(row.get("summary/metrics/acc") == 0.71 for _, row in found["rows"])
    assert any("features" in row for _, row in found["rows"])
