"""A finished run read from its folder; an unfinished or damaged one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcl.errors import FeatclError
from featcl.evaluation.matrix import ScoreMatrix
from featcl.evaluation.result import RunResult
from featcl.files import write_json


def make(folder: Path) -> Path:
    matrix = ScoreMatrix(("a", "general/x"), 1).with_row("base", {"a": {"1": 0}, "general/x": {"1": 1}})
    matrix.with_row("a", {"a": {"1": 1}, "general/x": {"1": 1}}).save(folder / "R.json")
    write_json(folder / "summary.json", {"study": "s", "arm": "a", "seed": 0, "metrics": {"acc": 1.0, "bwt": None}})
    return folder


def test_what_a_run_measured_is_read_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = RunResult.load(make(tmp_path))
    assert result.matrix.metrics().acc == result.summary["metrics"]["acc"] == 1.0
    result.print()
    printed = capsys.readouterr().out
    assert "acc" in printed
    assert "bwt" not in printed  # not determined by one task


def test_an_unfinished_or_damaged_run_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "summary.json").write_text('{"study": ')
    with pytest.raises(FeatclError, match=r"summary\.json: not JSON"):
        RunResult.load(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(FeatclError, match="has not finished"):
        RunResult.load(folder)
