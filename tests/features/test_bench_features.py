"""The benchmark runs: all ways agree, and the table and the JSON line come out. Its numbers are read elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_tiny_size_runs(root):
    command = [sys.executable, str(root / "scripts" / "bench" / "features.py"), "--tiny", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    ways = {"bound", "all features", "64 features", "bridge", "proxy"}
    assert record["tokens_per_second"].keys() == record["extra_megabytes"].keys() == ways
    assert all(speed > 0 for speed in record["tokens_per_second"].values())
    assert record["ratios"]["64 / bridge"] == pytest.approx(
        record["tokens_per_second"]["64 features"] / record["tokens_per_second"]["bridge"]
    )
    assert {"versions", "threads", "commit", "seed", "bounds"} <= record.keys()
