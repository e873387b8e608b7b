"""metrics.jsonl: what is written is read back, also after a cut in the middle of a line and after a resume."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from featcl.errors import FeatclError
from featcl.tracking.base import Trackers, flatten
from featcl.tracking.jsonl import JsonlTracker, cut_back, read_metrics


def write(path: Path, updates: int) -> JsonlTracker:
    tracker = JsonlTracker(path)
    for update in range(1, updates + 1):
        tracker.log({"train/loss": 1 / update, "task": "a"}, update)
    tracker.finish({})
    return tracker


def test_records_come_back_in_order_with_nan_as_null(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"a": math.nan, "b": torch.tensor(0.5), "c": [1, math.inf], "d": "ü", "e": True}, 1)
    tracker.finish({})
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found.records == ({"update": 1, "a": None, "b": 0.5, "c": [1, None], "d": "ü", "e": True},)
    assert found.torn is None


def test_lines_are_written_together(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, flush_every=10, flush_seconds=1e9)
    for update in range(25):
        tracker.log({"x": update}, update)
    assert len(path.read_text().splitlines()) == 20
    tracker.flush(sync=True)
    assert len(path.read_text().splitlines()) == tracker.lines == 25


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    path.write_bytes(path.read_bytes()[:-9])
    found = read_metrics(path)
    assert len(found.records) == 2
    assert found.torn is not None
    assert found.torn.startswith("metrics.jsonl: line 3 is cut off")
    with caplog.at_level(logging.WARNING):
        tracker = JsonlTracker(path)
    assert "line 3 is cut off" in caplog.text
    tracker.log({"train/loss": 0.1}, 3)
    tracker.finish({})
    assert [record["update"] for record in read_metrics(path).records] == [1, 2, 3]


def test_a_whole_last_line_without_line_feed_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 2)
    path.write_bytes(path.read_bytes()[:-1])
    tracker = JsonlTracker(path)
    tracker.log({}, 3)
    tracker.finish({})
    assert [record["update"] for record in read_metrics(path).records] == [1, 2, 3]


@pytest.mark.parametrize(("line", "words"), [("{oops\n", "not JSON"), ("[1]\n", "JSON object")])
def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n' + line + '{"update": 3}\n')
    with pytest.raises(FeatclError, match=rf"metrics.jsonl:2: .*{words}"):
        read_metrics(path)


def test_resuming_gives_the_file_of_the_uninterrupted_run(tmp_path: Path) -> None:
    write(tmp_path / "whole.jsonl", 6)
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    path.write_bytes(path.read_bytes() + b'{"update": 6, "tr')
    result = cut_back(path, update=3)
    assert ([record["update"] for record in result.kept], result.dropped) == ([1, 2, 3], 2)
    assert result.torn is not None
    tracker = JsonlTracker(path)
    for update in range(4, 7):
        tracker.log({"train/loss": 1 / update, "task": "a"}, update)
    tracker.finish({})
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_cutting_back_by_lines_separates_records_of_one_update(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"train/loss": 1.0}, 1)
    saved = tracker.lines
    tracker.log({"forgetting/a": 0.0}, 1)
    tracker.finish({})
    assert cut_back(path, lines=saved).dropped == 1
    assert read_metrics(path).records == ({"update": 1, "train/loss": 1.0},)
    with pytest.raises(FeatclError, match="1 records, but the checkpoint was saved after 7"):
        cut_back(path, lines=7)
    with pytest.raises(FeatclError, match="either"):
        cut_back(path)
    assert cut_back(tmp_path / "none.jsonl", update=4).kept == ()


def test_what_a_power_cut_left_after_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    """Blocks that never reached the disk read as zeros, with whole lines after them."""
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + b'\0\0\0\0\n{"update": 5}\n')
    found = cut_back(path, lines=3)
    assert ([record["update"] for record in found.kept], found.dropped) == ([1, 2, 3], 2)
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'{"update": 2', b'\0"update": 2'))
    with pytest.raises(FeatclError, match=r"metrics.jsonl:2: not JSON"):  # the control: before it, it counts
        cut_back(path, lines=3)


def test_tables_lie_beside_the_file_and_several_trackers_are_one(tmp_path: Path) -> None:
    both = Trackers(JsonlTracker(tmp_path / "a" / "metrics.jsonl"), JsonlTracker(tmp_path / "b" / "metrics.jsonl"))
    both.log({"x": 1}, 1)
    both.table("samples/first", ("text", "kl"), [["hi", 0.5]])
    both.image("R", tmp_path / "R.png")
    both.finish({})
    for name in "ab":
        assert read_metrics(tmp_path / name / "metrics.jsonl").records == ({"update": 1, "x": 1},)
        table = json.loads((tmp_path / name / "tables" / "samples_first.json").read_text())
        assert table == {"name": "samples/first", "columns": ["text", "kl"], "rows": [["hi", 0.5]]}


def test_flatten_joins_names() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a/b": 1, "a/c/d": 2, "e": [3]}
