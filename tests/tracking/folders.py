"""A run's folder with every file that a report can show, made of small invented numbers."""

from __future__ import annotations

import math
import random
from pathlib import Path

from featcl.files import write_json
from featcl.tracking.jsonl import JsonlTracker

TASKS = ("home/names", "home/style", "code/api", "code/naming", "home/facts", "code/rename", "code/snippets")


def records(updates: int = 120) -> list[dict]:
    noise = random.Random(0)
    rows = []
    for update in range(1, updates + 1):
        task = TASKS[(update - 1) * len(TASKS) // updates]
        row = {
            "trajectory": f"t{update}",
            "task": task,
            "tokens_seen": 37 * update,
            "train/loss": 2.5 * math.exp(-(update % 17) / 9) + 0.2 * noise.random(),
            "update/kl": 0.02 * noise.random(),
            "optim/lr": 1e-3,
            "constraint/delta_norm": math.sqrt(update) / 5,
            "cost/tokens": 37,
        }
        if update % 10 == 0:
            done = TASKS.index(task)
            row |= {f"forgetting/{name}": 0.02 * (done - i) ** 2 if i <= done else 0.0 for i, name in enumerate(TASKS)}
            row |= {"general/lab": 0.95 - 0.002 * update, "canary/kl_tasks": 0.01 * update}
            row |= {"canary/kl_general": 0.003 * update}
        rows.append(row)
    return rows


def score_rows() -> dict:
    noise = random.Random(1)
    columns = [*TASKS, "general/facts", "general/arithmetic"]
    rows = ["base", *TASKS]
    items: dict[str, dict[str, list[int]]] = {}
    for j, column in enumerate(columns):
        for n in range(8):
            chance = [0.05 if i <= j < len(TASKS) else max(0.4, 0.97 - 0.05 * (i - j)) for i in range(len(rows))]
            items.setdefault(column, {})[f"{column}/{n}"] = [int(noise.random() < share) for share in chance]
    values = [[sum(scores[i] for scores in items[c].values()) / 8 for c in columns] for i in range(len(rows))]
    return {
        "columns": columns,
        "n_tasks": len(TASKS),
        "measure": "accuracy",
        "rows": rows,
        "values": values,
        "items": items,
    }


def make(folder: Path, *, finished: bool = True) -> Path:
    tracker = JsonlTracker(folder / "metrics.jsonl")
    for update, record in enumerate(records(), 1):
        tracker.log(record, update)
    features = [[17, "formal register", 0.8, -0.1], [203, "greeting <b>", 0.05, 1.25]]
    tracker.table("features", ("feature", "name", "write", "read"), features)
    tracker.finish({})
    write_json(folder / "R.json", score_rows())
    config = {
        "study": "quickstart",
        "arm": "base",
        "seed": 0,
        "model": "lab/olmo2",
        "adapter": {"kind": "both", "k": 32},
    }
    write_json(folder / "config.json", config)
    write_json(folder / "env.json", {"python": "3.11", "torch": "2.13.0", "float32_matmul": "highest"})
    if finished:
        numbers = {
            "acc": 0.71,
            "bwt": -0.2,
            "forgetting_max_past": 0.21,
            "learning_accuracy": 0.9,
            "general_change": -0.3,
        }
        write_json(folder / "summary.json", {"metrics": {**numbers, "intransigence": float("nan")}, "updates": 120})
    return folder
