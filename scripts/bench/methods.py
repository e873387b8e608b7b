"""What each method costs: `python scripts/bench/methods.py [--arms ewc replay …] [--small] [--repeats 1]`.

Runs arms of `experiments/rivals` as a user does, one process a run, on the development world. Prints a table and one
JSON line: seconds of the whole run, of its updates, of what methods do (within updates, and where tasks begin and end)
and of evaluation; bytes that methods store at the end, and tokens that they read beside the updates' own. Seconds drift
on shared machines, so compare with the arm `base` of the same call. `--small` is a reduced world: two tasks, eight
experiences of each, no general suite.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from featcl.studies.arms import study_arms
from featcl.tracking.environment import git_commit

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "experiments" / "rivals"
SMALL = ("stream.tasks=[home_facts, code_library]", "stream.limit=8", "evaluation.suites=[]")
SECONDS = ("total", "updates", "methods", "evaluation")
COSTS = ("stored_bytes", "forward_tokens", "backward_tokens")


def main() -> None:
    known = [arm.name for arm in study_arms(STUDY)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=known, metavar="ARM", help="all but those that need a folder")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    arms = given.arms or [name for name in known if name != "ours_protect"]
    overrides = ("stream.world=development", *(SMALL if given.small else ()))
    measured: dict[str, dict[str, Any]] = {}
    print(f"{'arm':24}" + "".join(f"{name:>12}" for name in SECONDS) + "".join(f"{name:>18}" for name in COSTS))
    for arm in arms:
        measured[arm] = median_of([one_run(arm, overrides) for _ in range(given.repeats)])
        print_row(arm, measured[arm])
    print(json.dumps({
        "benchmark": "methods", "small": given.small, "repeats": given.repeats, "arms": measured,
        "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        "machine": platform.processor() or platform.machine(), "commit": git_commit(ROOT),
    }))  # fmt: skip


def one_run(arm: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Seconds by part of one run in a process of its own, and the methods' costs at its end."""
    with tempfile.TemporaryDirectory() as folder:
        config = str((STUDY / f"{arm}.yaml").relative_to(ROOT))
        command = [sys.executable, "-m", "featcl", "run", config, f"output={folder}", *overrides]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CI": "1"}, capture_output=True, text=True)
        total = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{arm}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
        [metrics], [summary] = Path(folder).rglob("metrics.jsonl"), Path(folder).rglob("summary.json")
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        methods = json.loads(summary.read_text(encoding="utf-8")).get("methods", {})
    seconds = {"updates": "seconds/update", "methods": "seconds/methods", "evaluation": "seconds/evaluation"}
    found: dict[str, Any] = {part: sum(r.get(key, 0.0) for r in records) for part, key in seconds.items()}
    return {"total": total, **found, **{cost: sum(each[cost] for each in methods.values()) for cost in COSTS}}


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the seconds; what is counted is the same in every run."""
    return {**runs[0], **{part: statistics.median(run[part] for run in runs) for part in SECONDS}}


def print_row(arm: str, found: dict[str, Any]) -> None:
    seconds = "".join(f"{found[part]:12.2f}" for part in SECONDS)
    print(f"{arm:24}{seconds}" + "".join(f"{found[cost]:18,}" for cost in COSTS), flush=True)


if __name__ == "__main__":
    main()
