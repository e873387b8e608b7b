"""The benchmark of a step runs and reports what it promises; its numbers mean nothing at this size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_adapter_step_benchmark_runs(root, tmp_path):
    command = [sys.executable, str(root / "scripts" / "bench" / "adapter_step.py"), "--tiny", "--repeats", "1"]
    command += ["--models", "olmo2 tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "adapter_step-cpu-tiny.json").read_text())
    assert {"versions", "threads", "commit", "seed", "rank"} <= set(record)
    model = record["models"]["olmo2 tiny"]
    arms = ["frozen", "peft all", "peft same", "constrained", "cached"]
    assert list(model["seconds"]) == arms
    assert all(model["peak_bytes"][arm] > 0 for arm in arms)
    assert set(model["ratios"]) >= {"constrained / peft same", "constrained / peft all", "cached / peft all"}
