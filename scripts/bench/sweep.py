"""Runs per hour of a sweep, and what it costs beside learning: `python scripts/bench/sweep.py [--jobs 2] [--runs 8]`.

Sweeps `experiments/quickstart` (both arms, as many seeds as give that many runs) into a temporary folder with
persistent workers of one thread each, and shows where the seconds of a run go:

    learning      updates, evaluations, canaries: what metrics.jsonl times
    base          of these, the first row of R, which a worker measures once for all runs of one model and stream
    set-up        from the run's beginning to its first record: model, SAE, stream, selection, adapter
    close         from the last record to the end: adapter, tables, pictures, report
    between       from one run of a worker to its next
    launch        from the command to the first run: imports, and submitit

`per_arm` is what a sweep adds to its runs: launch shared among them, and between. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
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

from featcl.tracking.environment import git_commit

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("learning", "base", "set-up", "close")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=ROOT / "experiments" / "quickstart")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        swept = one_sweep(given.study, Path(folder), jobs=given.jobs, runs=given.runs)
        rows = [parts_of(folder, name, ended) for name, ended in swept["finished"].items()]
    medians = {part: statistics.median(row[part] for row in rows) for part in PARTS}
    ended = swept["finished"].values()
    launch = min(each["began"] for each in ended) - start
    between = gaps(list(ended))
    result = {
        "benchmark": "sweep", "runs": len(rows), "failed": len(swept["failed"]), "jobs": swept["jobs"],
        "runs_per_hour": len(rows) / swept["seconds"] * 3600, "seconds": swept["seconds"],
        "seconds_per_run": medians | {"run": statistics.median(e["ended"] - e["began"] for e in ended)},
        "between": between, "launch": launch, "per_arm": between + launch * swept["jobs"] / len(rows),
        "threads": 1, "machine": platform.processor() or platform.machine(), "commit": git_commit(ROOT),
    }  # fmt: skip
    print(f"{result['runs_per_hour']:.1f} runs an hour: {len(rows)} runs by {swept['jobs']} workers")
    for name, seconds in {**result["seconds_per_run"], "between": between, "launch": launch,
                          "per arm, beside its run": result["per_arm"]}.items():  # fmt: skip
        print(f"{name:26}{seconds:8.2f} s")
    print(json.dumps(result))


def one_sweep(study: Path, output: Path, *, jobs: int, runs: int) -> dict[str, Any]:
    """`featcl sweep` in a process of its own, as a user calls it."""
    from featcl.studies.arms import study_arms

    seeds = -(-runs // len(study_arms(study)))
    command = [sys.executable, "-m", "featcl", "sweep", str(study), "--seeds", ",".join(map(str, range(seeds))),
               "--jobs", str(jobs), "--output", str(output), "--json"]  # fmt: skip
    environment = {**os.environ, "CI": "1", "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def parts_of(output: str | Path, name: str, ended: dict[str, Any]) -> dict[str, float]:
    """Where the seconds of one run went."""
    arm, _, seed = name.rpartition(".")
    [metrics] = Path(output).glob(f"*/{arm}/{seed}/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    timed = [sum(v for key, v in record.items() if key.startswith("seconds/")) for record in records]
    config = metrics.parent / "config.json"  # written when everything is built
    set_up = config.stat().st_mtime - ended["began"]
    learning = sum(timed)
    return {
        "learning": learning,
        "base": timed[0],
        "set-up": set_up,
        "close": ended["ended"] - ended["began"] - set_up - learning,
    }


def gaps(ended: list[dict[str, Any]]) -> float:
    """Median seconds from a worker's run to its next; 0 where each had one."""
    found = []
    for worker in {each["worker"] for each in ended}:
        own = sorted((each["began"], each["ended"]) for each in ended if each["worker"] == worker)
        found += [later[0] - earlier[1] for earlier, later in itertools.pairwise(own)]
    return statistics.median(found) if found else 0.0


if __name__ == "__main__":
    main()
