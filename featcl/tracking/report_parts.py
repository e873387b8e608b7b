"""The parts of a run's report: tables and texts, each from the run's files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from featcl.tracking import page
from featcl.tracking.base import flatten
from featcl.tracking.names import FORMULAS, meaning
from featcl.tracking.page import Part
from featcl.tracking.plots_data import Absent, Scores, Table, is_number
from featcl.tracking.plots_read import samples_of, timeline_of
from featcl.tracking.plots_tokens import top_of
from featcl.tracking.report_files import RunFiles

SHOWN_ELSEWHERE = ("R", "report_card", "samples")
NAMED_ITEMS, NAMED_UPDATES, NAMED_SAMPLES = 100, 40, 12
_TITLES = {"features": "What the adapter does, feature by feature", "feature_drift": "Features that drifted",
           "memory_recall": "Recall of the memory", "shift": "How far apart consecutive segments of the stream are",
           "sae_validity": "Whether the SAE still fits, by the scale of the update"}  # fmt: skip


def matrix(scores: Scores | None) -> Part:
    """R as a table."""
    if scores is None:
        return Part("Score matrix", "")
    known = [value for row in scores.values for value in row if is_number(value)]
    accuracy = scores.measure == "accuracy"
    low, high = (0.0, 1.0) if accuracy else (min(known, default=0.0), max(known, default=1.0))
    width = (high - low) or 1.0
    shades = [[None, *((v - low) / width if is_number(v) else None for v in row)] for row in scores.values]
    cells = [[float(value) if is_number(value) else None for value in row] for row in scores.values]
    rows = [[name, *row] for name, row in zip(scores.rows, cells, strict=True)]
    note = "R[i, j]: score on column j after training on row i; the first row is the base model."
    if not accuracy:
        note += " Held-out negative log-likelihood in nats per token: lower is better."
    return Part("Score matrix", page.table(("after", *scores.columns), rows, shades=shades), note)


def numbers(summary: Mapping[str, Any]) -> Part:
    """summary.json with formulas."""
    flat = {name: value for name, value in flatten(summary).items() if not isinstance(value, (list, tuple))}
    rows = [[name, value, FORMULAS.get(name.rsplit("/", 1)[-1], "")] for name, value in flat.items()]
    return Part("Final numbers", page.table(("name", "value", "formula"), rows))


def measures(records: Sequence[Mapping[str, Any]], scores: Scores | None) -> Part:
    """What was measured with every row of R beside its columns, a line each."""
    rows = [record for record in records if record.get("kind") == "evaluation"]
    general = {f"general/{column.removeprefix('general/')}" for column in (() if scores is None else scores.columns)}
    names = sorted({name for record in rows for name, value in record.items() if is_number(value) and "/" in name})
    shown = [name for name in names if not name.startswith(("R/", "forgetting/", "seconds/")) and name not in general]
    cells = [[name, *(record.get(name) for record in rows), meaning(name) or ""] for name in shown]
    note = "At every row of R, the base model's first."
    return Part(
        "Beside the score matrix", page.table(("name", *(str(r.get("row")) for r in rows), "meaning"), cells), note
    )


def flips(found: Mapping[str, Any]) -> Part:
    """What a mean hides: items that were right and are wrong at the end, and the other way round."""
    title = "Flips up to the last row"
    if found.get("measure") != "accuracy" or len(found.get("rows", ())) < 2:
        return Part(title, "")
    rows, lists = [], []
    for index, column in enumerate(found["columns"]):
        items = found["items"].get(column, {})
        learned = index + 1 if index < min(found["n_tasks"], len(found["rows"]) - 1) else 0
        lost = [item for item, scores in items.items() if _flipped(scores[learned], scores[-1])]
        won = [item for item, scores in items.items() if _flipped(scores[-1], scores[learned])]
        rows.append([column, found["rows"][learned], len(items), len(lost), len(won)])
        lists += [[column, "right to wrong", _listed(lost)]] if lost else []
        lists += [[column, "wrong to right", _listed(won)]] if won else []
    columns = ("column", "compared with the row", "items", "right to wrong", "wrong to right")
    details = page.folded("which items", page.table(("column", "flip", "items"), lists))
    note = "Tasks are compared with the row in which they were trained, probes with the base model."
    return Part(title, page.table(columns, rows) + details, note)


def samples(table: Table | None) -> Part:
    """The newest sampled texts, their tokens coloured by KL."""
    found = samples_of(table)
    if isinstance(found, Absent):
        return Part("Sampled texts", "")
    texts = []
    for text in found[-NAMED_SAMPLES:]:
        prompt = f'<p class="note">{page.escape(page.cut(text.prompt))}</p>' if text.prompt else ""
        shown = len(text.pieces[: page.MAX_TEXT])
        texts.append(prompt + page.tokens(text.pieces[:shown], text.kl[:shown], top_of(text)))
    note = (
        "KL of each token in nats, from white at zero to orange at the text's 95th percentile; point at one to read it."
    )
    return Part("Sampled texts", "\n".join(texts), note)


def ledger(run: RunFiles) -> Part:
    """The updates that moved the coordinates most, rollbacks and alarms."""
    found = timeline_of(run.ledger.records)
    if isinstance(found, Absent):
        return Part("Ledger", "")
    largest = sorted(found.versions, key=lambda version: -(version.moved or 0.0))[:NAMED_UPDATES]
    rows = [[version.version, version.learned, version.task, version.kl, version.moved,
             "" if version.on_line else "rolled back"] for version in largest]  # fmt: skip
    titles = ("version", "learned", "task", "KL", "moved", "")
    events = page.bullets([f"{kind}: {text}" for _, kind, text in found.marks[:NAMED_UPDATES]])
    there = len(found.versions)
    note = f"{there} versions; the {len(largest)} that moved the coordinates most." if there > len(largest) else ""
    return Part("Ledger", events + page.table(titles, rows), note)


def quarantine(records: Sequence[Mapping[str, Any]]) -> Part:
    """Experiences set aside."""
    names = ("id", "task", "source", "reason")
    rows = [[record.get(name, "") for name in names] for record in records]
    return Part("Quarantine", page.table(names, rows), "Experiences that were set aside, not learned from.")


def other_tables(tables: Mapping[str, Table]) -> list[Part]:
    """Whatever else the run kept as a table."""
    return [
        Part(
            _TITLES.get(name, page.cut(name, 60)), page.table(table.columns, [list(map(_shown, r)) for r in table.rows])
        )
        for name, table in tables.items()
        if name not in SHOWN_ELSEWHERE
    ]


def pairs(title: str, summary: str, values: Mapping[str, Any]) -> Part:
    """Every key of nested JSON on one line, folded."""
    rows = [(name, _shown(value)) for name, value in sorted(flatten(values).items())]
    return Part(title, page.folded(summary, page.table(("key", "value"), rows)))


def _flipped(was: float | None, now: float | None) -> bool:
    return was is not None and now is not None and was > now


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - NAMED_ITEMS} more" if len(items) > NAMED_ITEMS else ""
    return ", ".join(items[:NAMED_ITEMS]) + more


def _shown(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str)) else json.dumps(value, sort_keys=True, ensure_ascii=False)
