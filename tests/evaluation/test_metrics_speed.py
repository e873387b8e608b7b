"""The benchmark of the metrics runs and reports what it promises; its numbers mean nothing at this size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_metrics_benchmark_runs(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "bench" / "metrics.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "metrics-tiny.json").read_text())
    assert list(record["seconds"]) == ["values", "metrics", "flips", "paired", "chance", "intervals"]
    assert record["total"] == pytest.approx(sum(record["seconds"].values()))
    assert (record["items"], record["scores"]) == (120, 720)
