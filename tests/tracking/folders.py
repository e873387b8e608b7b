"""A run's folder with every file that a report can show, made of small invented numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from featcl.files import write_json, write_text
from featcl.tracking.jsonl import JsonlTracker
from featcl.tracking.report_card import card_table

TASKS = ("home/names", "home/style", "code/api", "code/naming", "home/facts", "code/rename", "code/snippets")
EVIL = "<script>alert('x')</script>"  # as a model or a user may write it
FILES = ("config.json", "env.json", "metrics.jsonl", "R.json", "summary.json", "quarantine.jsonl")
CARD: dict[str, Any] = {
    "notes": [f"one cell was not measured {EVIL}"],
    "desiderata": [
        {
            "name": "preserve",
            "numbers": [
                {"name": "general_change", "value": -0.3, "low": -0.36, "high": -0.22, "references": {"joint": -0.05},
                 "unit": "", "formula": "mean over probes of R[T, p] - R[0, p]", "note": EVIL}
            ],
            "missing": {"perplexity_ratio": "no frozen text was scored"},
        },
        {
            "name": "efficient",
            "numbers": [
                {"name": "tokens", "value": 4440.0, "low": None, "high": None, "references": {}, "unit": "tokens"},
                {"name": "tokens_to_target", "value": None, "reached": False, "references": {"joint": 900.0}},
            ],
            "missing": {},
        },
    ],
    "labels": [{"task": "home/names", "label": "forgetting", "learned": 0.9, "cost": 0.2}],
}  # fmt: skip


def records(updates: int = 120, *, tasks: tuple[str, ...] = TASKS, seed: int = 0) -> list[dict]:
    """metrics.jsonl: a memory that was measured, updates with canaries between, an evaluation after every task."""
    noise = random.Random(seed)
    scores = score_rows(tasks=tasks, seed=seed + 1)
    losses = {f"memory/loss_{reader}/window_{w}": 3 - 0.1 * w * gain
              for reader, gain in (("memory", 3), ("truncated", 1), ("full", 5)) for w in range(4)}  # fmt: skip
    rows: list[dict[str, Any]] = [{"kind": "memory", "when": "trained", "tokens_seen": 0, "update": 0, **losses}]
    rows.append({"kind": "evaluation", "row": "base", "tokens_seen": 0, "update": 0, **_cells(scores, 0)})
    for update in range(1, updates + 1):
        done = (update - 1) * len(tasks) // updates
        rows.append(
            {
                "kind": "update",
                "update": update,
                "trajectory": f"t{update}{EVIL if update == 7 else ''}",
                "task": tasks[done],
                "tokens_seen": 37 * update,
                "train/loss": 2.5 * math.exp(-(update % 17) / 9) + 0.2 * noise.random(),
                "update/kl": 0.02 * noise.random(),
                "optim/lr": 1e-3,
                "constraint/delta_norm": math.sqrt(update) / 5,
                "cost/tokens": 37,
            }
        )
        now = {"update": update, "tokens_seen": 37 * update}
        if update % 10 == 0:
            lost = {f"forgetting/{name}": 0.02 * (done - i) ** 2 if i <= done else 0.0 for i, name in enumerate(tasks)}
            general = {"general/lab": 0.95 - 0.002 * update - 0.01 * noise.random()}
            kl = {"canary/kl_tasks": 0.01 * update + 0.1 * noise.random(), "canary/kl_general": 0.003 * update}
            rows.append({"kind": "canaries", **now, **lost, **general, **kl})
        if update == updates or update * len(tasks) // updates > done:
            shift = {"shift/gradient": 0.5 + 0.1 * (done % 4), "shift/js": 0.01 * done} if done else {}
            rows.append({"kind": "evaluation", "row": tasks[done], **now, **_cells(scores, done + 1), **shift})
    return rows


def score_rows(*, tasks: tuple[str, ...] = TASKS, seed: int = 1, learned: float = 0.95, items: int = 8) -> dict:
    """R.json: every task is learned in its row and then forgotten bit by bit."""
    noise = random.Random(seed)
    columns, rows = [*tasks, "general/facts", "general/arithmetic"], ["base", *tasks]
    found: dict[str, dict[str, list[int]]] = {}
    for j, column in enumerate(columns):
        for n in range(items):
            chance = [0.05 if i <= j < len(tasks) else max(0.4, learned - 0.05 * (i - j)) for i in range(len(rows))]
            found.setdefault(column, {})[f"{column}/{n}"] = [int(noise.random() < share) for share in chance]
    values = [[sum(scores[i] for scores in found[c].values()) / items for c in columns] for i in range(len(rows))]
    return {
        "columns": columns,
        "n_tasks": len(tasks),
        "measure": "accuracy",
        "rows": rows,
        "values": values,
        "items": found,
    }


def ledger_lines(updates: int = 120) -> list[dict]:
    """ledger.jsonl: updates, one rollback by ten versions after an alarm, and one update taken back."""
    noise = random.Random(2)
    lines: list[dict[str, Any]] = [{"kind": "start", "version": 0}]
    version = 0
    for update in range(1, updates + 1):
        version += 1
        lines.append(
            {
                "kind": "update",
                "version": version,
                "trajectories": [f"t{update}{EVIL if update == 7 else ''}"],
                "task": TASKS[(update - 1) * len(TASKS) // updates],
                "source": "home",
                "objective": "sft",
                "loss": 2.0,
                "kl": 0.02 * noise.random(),
                "moved": 2.0 if update == 7 else noise.random(),
                "delta_norm": math.sqrt(version) / 5,
                "top": [{"layer": 3, "feature": 17, "role": "write", "strength": 0.5, "name": f"formal {EVIL}"}],
            }
        )
        if update == 80:
            lines.append({"kind": "note", "version": version, "what": "alarm", "value": f"losses rose {EVIL}"})
            lines.append({"kind": "rollback", "version": version - 10, "from": version})
            version -= 10
    lines.append({"kind": "revert", "version": version + 1, "of": 30, "how": "exact", "moved": 0.4, "delta_norm": 2.1})
    return lines


def tables() -> dict[str, tuple[tuple[str, ...], list[list[Any]]]]:
    """Name -> columns and rows, as a tracker is given them."""
    words = f"The  kettle is on.\nShe says: {EVIL} and goes on to speak of the weather, at length and politely.".split(
        " "
    )
    pieces = [f" {word}" for word in words]
    kl = [0.05 + 0.6 * (i % 7 == 3) + 0.01 * i for i in range(len(pieces))]
    table = card_table(CARD)
    readers = (("memory", 0.9), ("truncated", 0.3))
    recall = [[reader, n, top / (1 + n / 20), top / (1 + n / 20) - 0.05, top / (1 + n / 20) + 0.05, 0.02]
              for reader, top in readers for n in (0, 1, 2, 4, 8, 16, 32)]  # fmt: skip
    return {
        "features": (("feature", "name", "write", "read"), [[17, "formal register", 0.8, -0.1],
                                                            [203, f"greeting {EVIL}", 0.05, 1.25]]),
        "feature_drift": (("feature_id", "name", "difference", "low", "high"), [
            [17, "formal register", 0.8, 0.6, 1.0], [203, f"greeting {EVIL}", 0.5, 0.1, 0.9],
            [9, "$price$ \\frac{1}", -0.4, -0.5, -0.3], [4, None, 0.1, None, None]]),
        "samples": (("update", "prompt", "pieces", "kl"), [[120, f"who? {EVIL}", pieces, kl]]),
        "memory_recall": (("reader", "after", "recalled", "low", "high", "chance"), recall),
        "report_card": (table.columns, [list(row) for row in table.rows]),
    }  # fmt: skip


def make(folder: Path, *, finished: bool = True, seed: int = 0, **config: Any) -> Path:
    """Write the whole folder.

    Args:
        folder: Where.
        finished: Whether there is a summary.
        seed: Of the invented numbers, and of the run.
        config: Keys of config.json that differ.
    """
    tracker = JsonlTracker(folder / "metrics.jsonl")
    for record in records(seed=seed):
        tracker.log(record, record["update"])
    for name, (columns, rows) in tables().items():
        tracker.table(name, columns, rows)
    tracker.finish({})
    write_json(folder / "R.json", score_rows(seed=seed + 1))
    settings = {
        "study": "quickstart",
        "arm": "base",
        "seed": seed,
        "model": "lab/olmo2",
        "adapter": {"kind": "both", "k": 32},
        "learner": {"lr": 1e-3},
        **config,
    }
    write_json(folder / "config.json", settings)
    write_json(folder / "env.json", {"python": "3.11", "torch": "2.13.0", "float32_matmul": "highest"})
    write_text(folder / "ledger" / "ledger.jsonl", _lines(ledger_lines()))
    reason = {"id": f"t9{EVIL}", "task": TASKS[0], "source": "home", "reason": "the loss is far above its mean"}
    write_text(folder / "quarantine.jsonl", _lines([reason]))
    if finished:
        numbers = {
            "acc": 0.71 + 0.01 * seed,
            "bwt": -0.2,
            "forgetting_max_past": 0.21 - 0.01 * seed,
            "learning_accuracy": 0.9,
            "general_change": -0.3,
        }
        summary = {
            "metrics": {**numbers, "intransigence": math.nan},
            "updates": 120,
            "delta_norm": 2.19,
            "tokens": 4440,
        }
        write_json(folder / "summary.json", {"measure": "accuracy", **summary})
    return folder


def _cells(scores: dict, row: int) -> dict[str, float]:
    return {f"R/{column}": value for column, value in zip(scores["columns"], scores["values"][row], strict=True)}


def _lines(values: list[dict]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)
