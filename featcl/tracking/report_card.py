"""The report card as a table that is kept with the run, and as a part of its page.

A card is plain data: for every desideratum its numbers, each with its limits and the same number of reference runs,
and what was not measured. It is computed above this room, from the run's files and those of reference runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featcl.tracking import page
from featcl.tracking.page import Part
from featcl.tracking.plots_data import Table, is_number

NAME = "report_card"
COLUMNS = ("desideratum", "number", "value", "low", "high", "references", "unit", "formula", "note", "state")
TITLES = {
    "preserve": "Preserve: is general ability kept?",
    "sequential": "Sequential: does learning one after the other do what learning jointly does?",
    "distributions": "Distributions: does it hold when what is learned differs, changes or is false?",
    "efficient": "Efficient: what does it take?",
    "compositional": "Compositional: does what was learned apart work together?",
    "tasks": "How each task ended",
}
MEASURED, NEVER, MISSING, SAID = "measured", "never reached", "not measured", "note"


def card_table(card: Mapping[str, Any]) -> Table:
    """A card as one table, for trackers and `tables/report_card.json`.

    Args:
        card: `desiderata`: a list of {name, numbers: [{name, value, low, high, references, unit, formula, note,
            reached}], missing: {number: why}}; `labels`: a list of {task, label, learned, cost}; `notes`: texts.
    """
    rows: list[tuple[Any, ...]] = [("", "", None, None, None, {}, "", "", note, SAID) for note in card.get("notes", ())]
    for each in card["desiderata"]:
        for number in each["numbers"]:
            state = MEASURED if number.get("reached", True) else NEVER
            limits = (number["value"], number.get("low"), number.get("high"), dict(number.get("references") or {}))
            texts = (number.get("unit", ""), number.get("formula", ""), number.get("note", ""))
            rows.append((each["name"], number["name"], *limits, *texts, state))
        for name, why in (each.get("missing") or {}).items():
            rows.append((each["name"], name, None, None, None, {}, "", "", why, MISSING))
    for label in card.get("labels", ()):
        cost = label.get("cost")
        note = f"{label['label']}; cost to the rest {cost:.3f}" if is_number(cost) else label["label"]
        learned = label.get("learned")
        rows.append(("tasks", label["task"], learned, None, None, {}, "", "share of the way that was learned", note,
                     MEASURED))  # fmt: skip
    return Table(COLUMNS, tuple(rows))


def card_part(table: Table | None) -> Part:
    """The card on a page: a table per desideratum, with a column for every reference; what is missing is folded."""
    rows = [] if table is None else [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    parts = [page.bullets([str(row.get("note", "")) for row in rows if row.get("state") == SAID])]
    numbers = [row for row in rows if row.get("state") != SAID]
    for name in dict.fromkeys(str(row.get("desideratum")) for row in numbers):
        parts.append(_desideratum(name, [row for row in numbers if str(row.get("desideratum")) == name]))
    note = "Each number with its 95 % interval over items, and the same number of the reference runs."
    return Part("Report card", "\n".join(part for part in parts if part), note)


def _desideratum(name: str, rows: list[dict[str, Any]]) -> str:
    measured = [row for row in rows if row.get("state") != MISSING]
    names = list(dict.fromkeys(other for row in measured for other in _references(row)))
    columns = ("number", "value", "95 % interval", *names, "unit", "formula", "note")
    cells = [_cells(row, names) for row in measured]
    used = [place for place in range(len(columns)) if any(row[place] not in ("", None) for row in cells)]
    table = page.table([columns[place] for place in used], [[row[place] for place in used] for row in cells])
    missing = [f"{row.get('number')}: {row.get('note')}" for row in rows if row.get("state") == MISSING]
    folded = page.folded(f"{len(missing)} not measured", page.bullets(missing))
    return f"<h3>{page.escape(page.cut(TITLES.get(name, name), 120))}</h3>\n{table}{folded}"


def _cells(row: Mapping[str, Any], names: list[str]) -> list[Any]:
    low, high, references = row.get("low"), row.get("high"), _references(row)
    limits = f"{page.number(low)}\u00a0to\u00a0{page.number(high)}" if is_number(low) and is_number(high) else ""
    value = NEVER if row.get("state") == NEVER else _count(row.get("value"), bool(row.get("unit")))
    texts = [row.get(key) or "" for key in ("unit", "formula", "note")]
    return [
        row.get("number"),
        value,
        limits,
        *(_count(references.get(name), bool(row.get("unit"))) for name in names),
        *texts,
    ]


def _count(value: Any, counted: bool) -> Any:
    """What is counted, without decimals."""
    whole = is_number(value) and float(value).is_integer() and (counted or abs(value) >= 10)
    return int(value) if whole else value


def _references(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found = row.get("references")
    return found if isinstance(found, Mapping) else {}
