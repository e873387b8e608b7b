"""How long the numbers of a large matrix take: `python scripts/bench/metrics.py [--rows 100] [--columns 100]
[--items 10000] [--out DIR] [--tiny]`.

By default R is 100 tasks (and the base's row) by 100 columns of 10 000 items each: 1 M items, 101 M scores, right or
wrong, drawn with a seed. No model. Parts:

| part | what is computed |
|---|---|
| values | the cells of R from the items, of a new `ScoreMatrix` |
| metrics | every metric of `stream_metrics`, and forgetting of every column |
| flips | right→wrong and wrong→right between all neighbouring rows of every column; exact McNemar tests of the last |
| paired | base against final: paired difference with its bootstrap interval, of every column |
| chance | R adjusted for guessing |
| intervals | an interval for every metric, items resampled |

Prints a table and one JSON line; the promise is that all of it takes under 10 s on a quiet machine. Where others
compute too, the seconds of a processor say more than those of the clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from featcl.evaluation import (  # noqa: E402
    ItemScores,
    ScoreMatrix,
    chance_adjusted,
    column_forgetting,
    compare_items,
    count_flips,
    mcnemar_exact,
    metric_intervals,
)
from featcl.tracking.environment import git_commit  # noqa: E402

BOUND_SECONDS = 10.0


def drawn_matrix(tasks: int, columns: int, items: int, *, seed: int = 0) -> ScoreMatrix:
    """A run that learns each task and forgets a part of it."""
    rng = np.random.default_rng(seed)
    names = tuple(f"column{number:03d}" for number in range(columns))
    made: dict[str, Any] = {}
    for place, name in enumerate(names):
        share = np.where(np.arange(tasks + 1) > place, 0.9 * 0.99 ** (np.arange(tasks + 1) - place - 1), 0.1)
        right = (rng.random((tasks + 1, items), dtype=np.float32) < share[:, None]).astype(float)
        made[name] = ItemScores([f"{name}/{number}" for number in range(items)], right)
    return ScoreMatrix(names, tasks, "accuracy", ("base", *names[:tasks]), made)


def parts(matrix: ScoreMatrix, *, resamples: int) -> dict[str, Callable[[], Any]]:
    """Name -> what is timed."""
    arrays = [matrix.scores(column).array for column in matrix.columns]

    def flips() -> float:
        counts = [count_flips(array[:-1], array[1:]) for array in arrays]
        return min(mcnemar_exact(int(c.right_to_wrong[-1]), int(c.wrong_to_right[-1])) for c in counts)

    def metrics() -> Any:
        return matrix.metrics(), column_forgetting(matrix.higher_is_better, len(matrix.rows) - 1)

    return {
        "values": lambda: matrix.values,
        "metrics": metrics,
        "flips": flips,
        "paired": lambda: [compare_items(array[0], array[-1]) for array in arrays],
        "chance": lambda: chance_adjusted(matrix.values, 0.1),
        "intervals": lambda: metric_intervals(matrix, resamples=resamples),
    }


def measure(tasks: int, columns: int, items: int, *, resamples: int) -> dict[str, Any]:
    """Seconds of each part, in order; the first use of a matrix pays for its cells."""
    matrix = drawn_matrix(tasks, columns, items)
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}
    for name, compute in parts(matrix, resamples=resamples).items():
        start, spent = time.perf_counter(), time.process_time()
        compute()
        seconds[name], processor[name] = time.perf_counter() - start, time.process_time() - spent
    total = sum(seconds.values())
    return {
        "tasks": tasks,
        "columns": columns,
        "items": columns * items,
        "scores": columns * items * (tasks + 1),
        "resamples": resamples,
        "seed": 0,
        "seconds": seconds,
        "processor_seconds": processor,
        "total": total,
        "bound": BOUND_SECONDS,
        "within": total <= BOUND_SECONDS,
    }


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="Seconds that the numbers of a large score matrix take.")
    parser.add_argument("--rows", type=int, default=100, help="trained tasks")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--items", type=int, default=10_000, help="of each column")
    parser.add_argument("--resamples", type=int, default=1000, help="of the intervals")
    parser.add_argument("--out", type=Path, default=None, help="folder for the record")
    parser.add_argument("--tiny", action="store_true", help="a small matrix, to try the script out")
    given = parser.parse_args()
    size = (5, 6, 20) if given.tiny else (given.rows, given.columns, given.items)
    record = measure(*size, resamples=50 if given.tiny else given.resamples)
    record |= {"versions": {"python": platform.python_version(), "numpy": np.__version__}, "commit": git_commit(ROOT)}
    for name, seconds in record["seconds"].items():
        print(f"{name:12}{seconds:8.2f} s{record['processor_seconds'][name]:8.2f} s of a processor")
    print(f"{'total':12}{record['total']:8.2f} s  (promised: under {BOUND_SECONDS:g} s for 1 M items)")
    print(json.dumps(record))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"metrics{'-tiny' if given.tiny else ''}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
