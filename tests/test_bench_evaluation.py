"""The benchmark of measuring runs and reports what it promises; its numbers mean nothing at this size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_evaluation_benchmark_runs(root, tmp_path):
    command = [sys.executable, str(root / "scripts" / "bench" / "evaluation.py"), "--tiny", "--repeats", "1"]
    command += ["--updates", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "evaluation-tiny.json").read_text())
    found = record["evaluation"]
    assert list(found["seconds"]) == ["board", "canaries", "bare"]
    assert min(found["seconds"].values()) > 0
    assert found["tokens_read"]["board"] >= found["item_tokens"] - found["items"], "the last target is not read"
    assert found["tokens_read"]["canaries"] < found["tokens_read"]["board"]
    assert {"update", "ahead", "jsonl", "fsync"} <= set(record["logging"]["seconds"])
    assert 0 < record["logging"]["share_of_update"] < 1
    assert {"versions", "threads", "commit"} <= set(record)
