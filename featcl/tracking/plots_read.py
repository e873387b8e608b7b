"""What the pictures of a run show, taken from the records and tables of its folder; or why there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from featcl.tracking.base import Record
from featcl.tracking.names import TOKENS_SEEN
from featcl.tracking.plots_data import (
    Absent,
    Bar,
    Curve,
    Forgetting,
    Recall,
    RecallCurves,
    Scores,
    Table,
    Timeline,
    TokenKL,
    Version,
    is_number,
    mean,
)

# --- from metrics.jsonl and R.json


def curves(records: Sequence[Record], prefix: str, *, kinds: Sequence[str] | None = None) -> dict[str, Curve]:
    """Each scalar whose name starts with `prefix` over tokens seen (over updates where those are not recorded)."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        x = record.get(TOKENS_SEEN, record.get("update"))
        if not is_number(x) or (kinds is not None and record.get("kind") not in kinds):
            continue
        for name, value in record.items():
            if name.startswith(prefix) and is_number(value):
                xs, ys = found.setdefault(name, ([], []))
                xs.append(x)
                ys.append(value)
    return {name: Curve(tuple(xs), tuple(ys)) for name, (xs, ys) in found.items()}


def task_starts(records: Sequence[Record]) -> tuple[float, ...]:
    """Tokens seen where the task of the stream changes."""
    starts, previous = [], None
    for record in records:
        task, x = record.get("task"), record.get(TOKENS_SEEN, record.get("update"))
        if task is None or not is_number(x):
            continue
        if previous is not None and task != previous:
            starts.append(x)
        previous = task
    return tuple(starts)


def forgetting_of(records: Sequence[Record], scores: Scores | None = None) -> Forgetting | Absent:
    """Forgetting at the canaries and at the evaluations of a run."""
    between = [record for record in records if record.get("kind") != "evaluation"]
    canaries = {name.split("/", 1)[1]: curve for name, curve in curves(between, "forgetting/").items()}
    general = {name.split("/", 1)[1]: curve for name, curve in curves(between, "general/").items()}
    evaluations = {} if scores is None else _at_evaluations(records, scores)
    if not (canaries or evaluations or general):
        return Absent("no canaries were read, and nothing was evaluated twice")
    return Forgetting(canaries, evaluations, general, task_starts(records))


def _at_evaluations(records: Sequence[Record], scores: Scores) -> dict[str, Curve]:
    """Task -> best so far minus now, at every row of R but the first; as at the canaries, never below zero."""
    found = {}
    for j, column in enumerate(scores.columns[: scores.n_tasks]):
        pairs = [(x, scores.forgetting(row, j)) for row, x in _rows(records, scores) if row]
        known = [(x, max(0.0, y)) for x, y in pairs if y is not None]
        if known:
            found[column] = _curve(known)
    return found


def _rows(records: Sequence[Record], scores: Scores) -> list[tuple[int, float]]:
    """(row of R, tokens seen when it was measured)."""
    measured = [record for record in records if record.get("kind") == "evaluation" and is_number(_x(record))]
    return [(row, _x(record)) for row, record in enumerate(measured[: len(scores.rows)])]


def kl_and_forgetting(records: Sequence[Record]) -> dict[str, Curve] | Absent:
    """At every reading of the canaries: KL to the base model, and mean forgetting of tasks and of general ability."""
    best: dict[str, float] = {}
    points: dict[str, list[tuple[float, float]]] = {"tasks": [], "general": []}
    for record in records:
        lost = {"tasks": mean(_values(record, "forgetting/").values()), "general": _general_lost(record, best)}
        for group, pairs in points.items():
            kl, forgotten = record.get(f"canary/kl_{group}"), lost[group]
            if is_number(kl) and forgotten is not None:
                pairs.append((kl, forgotten))
    found = {group: _curve(pairs) for group, pairs in points.items() if pairs}
    return found or Absent("no canaries were read, so KL to the base model is not known beside forgetting")


def norm_and_retention(records: Sequence[Record], scores: Scores | None = None) -> dict[str, Curve] | Absent:
    """‖ΔW‖ and what is kept, at the canaries and at the evaluations of one run."""
    kept = 1.0 if scores is None else scores.kept
    best: dict[str, float] = {}
    points: dict[str, list[tuple[float, float]]] = {"canaries": [], "evaluations": []}
    norm, row = 0.0, -1
    for record in records:
        found = record.get("constraint/delta_norm")
        norm = found if is_number(found) else norm
        if record.get("kind") == "evaluation":
            row += 1
            known = scores is not None and 0 < row < len(scores.rows)
            lost = scores.mean_forgetting(row) if known and scores is not None else None
            points["evaluations"] += [(norm, kept - lost)] if lost is not None else []
            continue
        lost = mean([*_values(record, "forgetting/").values(), *_drops(record, best)])
        points["canaries"] += [(norm, kept - lost)] if lost is not None else []
    shown = {group: _curve(pairs) for group, pairs in points.items() if pairs}
    return shown if norm and shown else Absent("‖ΔW‖ and forgetting were not both measured")


def shift_and_forgetting(records: Sequence[Record], scores: Scores | None = None) -> dict[str, Curve] | Absent:
    """Of every task after the first: how far it lies from the one before, and what learning it cost the rest."""
    measured = [record for record in records if record.get("kind") == "evaluation"]
    if scores is None or not any("shift/gradient" in record for record in measured):
        return Absent("no distance between the tasks of the stream was measured (evaluation.shift)")
    known = [(record.get("shift/gradient"), scores.mean_cost(row))
             for row, record in enumerate(measured[: len(scores.rows)]) if row >= 2]  # fmt: skip
    points = [(x, y) for x, y in known if is_number(x) and y is not None]
    return {"tasks": _curve(points)} if points else Absent("no task has both a distance and a cost")


def _general_lost(record: Record, best: dict[str, float]) -> float | None:
    return mean(_drops(record, best))


def _drops(record: Record, best: dict[str, float]) -> list[float]:
    """Of every suite of a canary reading: its best score so far minus its present one; `best` is brought up to date."""
    drops = []
    for name, value in _values(record, "general/").items():
        best[name] = max(best.get(name, -math.inf), value)
        drops.append(best[name] - value)
    return drops


# --- from ledger.jsonl


def timeline_of(records: Sequence[Record]) -> Timeline | Absent:
    """The versions of a ledger, with what was rolled back."""
    found: list[dict[str, Any]] = []
    marks: list[tuple[int, str, str]] = []
    for record in records:
        kind, version = record.get("kind"), record.get("version", 0)
        if kind in ("update", "revert"):
            _leave_line(found, version - 1)
            names = ("kl", "moved", "delta_norm")
            numbers = {name: value if is_number(value := record.get(name)) else None for name in names}
            learned = ", ".join(map(str, record.get("trajectories", ()))) or f"v{record.get('of')} taken back"
            found.append({"version": version, "kind": kind, "task": str(record.get("task", "")), "learned": learned,
                          "on_line": True, **numbers})  # fmt: skip
        elif kind == "rollback":
            _leave_line(found, version)
            marks.append((len(found), "rollback", f"back to v{version} from v{record.get('from')}"))
        elif kind == "note" and record.get("what") == "alarm":
            marks.append((len(found), "alarm", str(record.get("value"))))
    if not found:
        return Absent("the ledger holds no version" if records else "there is no ledger")
    return Timeline(tuple(Version(**version) for version in found), tuple(marks))


def _leave_line(found: list[dict[str, Any]], version: int) -> None:
    for entry in found:
        entry["on_line"] = entry["on_line"] and entry["version"] <= version


# --- from tables


def drift_of(table: Table | None, *, shown: int = 15) -> list[Bar] | Absent:
    """The features whose mean activation on background text changed, in the order of the table."""
    if table is None or not table.rows:
        return Absent("no feature drift was measured (tables/feature_drift.json)")
    cells = {name: table.column(name) or [None] * len(table.rows) for name in ("name", "difference", "low", "high")}
    found = []
    for place, feature in enumerate(table.column("feature_id")):
        name, change, low, high = (cells[key][place] for key in cells)
        if is_number(change):
            limits = (low, high) if is_number(low) and is_number(high) else (change, change)
            found.append(Bar(f"{feature} {name or ''}".strip(), change, *limits))
    return found[:shown] or Absent("tables/feature_drift.json has no columns feature_id and difference")


def samples_of(table: Table | None) -> list[TokenKL] | Absent:
    """Sampled texts with the KL of each token."""
    if table is None:
        return Absent("no sampled text was kept with the KL of its tokens (tables/samples.json)")
    prompts = table.column("prompt") or [""] * len(table.rows)
    rows = zip(table.column("pieces") or table.column("tokens"), table.column("kl"), prompts, strict=False)
    found = [
        TokenKL(tuple(map(str, pieces)), tuple(float(value) if is_number(value) else math.nan for value in kl), str(p))
        for pieces, kl, p in rows
        if isinstance(pieces, list) and isinstance(kl, list) and pieces and len(pieces) == len(kl)
    ]
    return found or Absent("tables/samples.json has no row with tokens (or pieces) and as many numbers in kl")


def recall_of(records: Sequence[Record], table: Table | None = None) -> RecallCurves | Absent:
    """What a memory still knows: recall by what came after, or else the loss of every reader in every window."""
    if table is not None and table.rows:
        return _recall_table(table)
    last = [record for record in records if record.get("kind") == "memory"]
    found: dict[str, dict[int, float]] = {}
    for name, value in _values(last[-1] if last else {}, "memory/loss_").items():
        reader, _, window = name.removeprefix("memory/loss_").partition("/window_")
        if window.isdecimal():
            found.setdefault(reader, {})[int(window)] = value
    if not found:
        return Absent("the run has no memory, or it was not measured")
    lines = {reader: Recall(tuple(sorted(windows)), tuple(windows[w] for w in sorted(windows)))
             for reader, windows in found.items()}  # fmt: skip
    return RecallCurves(lines, "window of the text", "nats per token")


def _recall_table(table: Table) -> RecallCurves:
    lines: dict[str, list[tuple[float, ...]]] = {}
    names = ("after", "recalled", "low", "high")
    cells = {name: table.column(name) or [None] * len(table.rows) for name in names}
    readers = table.column("reader") or ["memory"] * len(table.rows)
    for place, reader in enumerate(readers):
        row = [cells[name][place] for name in names]
        if is_number(row[0]) and is_number(row[1]):
            lines.setdefault(str(reader), []).append(tuple(v if is_number(v) else math.nan for v in row))
    found = {reader: Recall(*map(tuple, zip(*rows, strict=True))) for reader, rows in lines.items()}
    chance = next((value for value in table.column("chance") if is_number(value)), None)
    return RecallCurves(found, "items stored after it", "share recalled", chance)


# --- small parts


def _values(record: Record, prefix: str) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith(prefix) and is_number(value)}


def _x(record: Record) -> Any:
    return record.get(TOKENS_SEEN, record.get("update"))


def _curve(pairs: Sequence[tuple[float, float]]) -> Curve:
    return Curve(tuple(x for x, _ in pairs), tuple(y for _, y in pairs))
