"""What pictures show is what the files say: by hand, and against the rooms that own the definitions."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from featcl.evaluation import column_forgetting
from featcl.evaluation.samples import COLUMNS
from featcl.learning.history import Line
from featcl.tracking import plots_read
from featcl.tracking.plots_data import Absent, Curve, RecallCurves, Scores, Table, Timeline
from tests.tracking import folders

R = Scores(("base", "a", "b"), ("a", "b", "general"), ((0.2, 0.0, 1.0), (0.8, 0.1, 0.9), (0.5, 0.9, 0.8)), 2)
EVALUATIONS = [{"kind": "evaluation", "row": row, "tokens_seen": 10 * i} for i, row in enumerate(R.rows)]


def test_forgetting_of_a_cell_is_that_of_the_metrics() -> None:
    for row in (1, 2):
        wanted = column_forgetting(np.array(R.values), row)
        assert [R.forgetting(row, j) for j in range(3)] == pytest.approx(list(wanted))
    assert R.forgetting(0, 0) is None, "nothing is before the base"
    assert R.mean_forgetting(2) == pytest.approx((0.3 + 0.2) / 2), "task a and the probe; b was just learned"
    worse = Scores(("base", "a"), ("a",), ((2.0,), (3.0,)), 0, "nll")
    assert worse.forgetting(1, 0) == pytest.approx(1.0), "a higher loss is forgetting"


def test_missing_cells_leave_forgetting_unknown() -> None:
    holes = Scores(("base", "a", "b"), ("a",), ((None,), (0.8,), (None,)), 1)
    assert holes.forgetting(1, 0) is None
    assert holes.forgetting(2, 0) is None
    assert isinstance(plots_read.forgetting_of(EVALUATIONS, holes), Absent)


def test_curves_of_forgetting() -> None:
    canaries = [{"kind": "canaries", "tokens_seen": 5, "forgetting/a": 0.1, "general/lab": 0.9},
                {"kind": "canaries", "tokens_seen": 15, "forgetting/a": None, "general/lab": 0.8}]  # fmt: skip
    found = plots_read.forgetting_of([*canaries, *EVALUATIONS], R)
    assert not isinstance(found, Absent)
    assert found.canaries == {"a": Curve((5,), (0.1,))}, "what is not a number is no point"
    assert found.general == {"lab": Curve((5, 15), (0.9, 0.8))}
    assert found.evaluations["a"].x == (10, 20)
    assert found.evaluations["a"].y == pytest.approx((0.0, 0.3)), "0.6 better than the base is no negative forgetting"


def test_kl_norm_and_forgetting_at_the_canaries() -> None:
    records = [
        {"kind": "update", "constraint/delta_norm": 1.0},
        {"kind": "canaries", "canary/kl_tasks": 0.1, "canary/kl_general": 0.2, "forgetting/a": 0.0, "general/x": 0.9},
        {"kind": "update", "constraint/delta_norm": 2.0},
        {"kind": "canaries", "canary/kl_tasks": 0.3, "canary/kl_general": 0.4, "forgetting/a": 0.4, "general/x": 0.7},
    ]
    relation = plots_read.kl_and_forgetting(records)
    assert not isinstance(relation, Absent)
    assert relation["tasks"] == Curve((0.1, 0.3), (0.0, 0.4))
    assert relation["general"].y == pytest.approx((0.0, 0.2))
    norms = plots_read.norm_and_retention(records)
    assert not isinstance(norms, Absent)
    assert norms["canaries"].x == (1.0, 2.0)
    assert norms["canaries"].y == pytest.approx((1.0, 1 - (0.4 + 0.2) / 2))
    assert isinstance(plots_read.norm_and_retention(records[1:2]), Absent), "no update, no norm"


def test_the_cost_of_a_task_stands_beside_its_distance_from_the_one_before() -> None:
    """By hand: the second task costs the first 0.3 and general ability 0.1; the third costs 0.2, 0.0 and 0.1."""
    values = ((0.0, 0.0, 0.0, 1.0), (0.9, 0.0, 0.0, 1.0), (0.6, 0.8, 0.0, 0.9), (0.4, 0.8, 0.9, 0.8))
    scores = Scores(("base", "a", "b", "c"), ("a", "b", "c", "g"), values, 3)
    records = [{"kind": "evaluation", "row": row} for row in scores.rows]
    assert isinstance(plots_read.shift_and_forgetting(records, scores), Absent)
    records[2]["shift/gradient"], records[3]["shift/gradient"] = 0.9, 0.2  # type: ignore[assignment]
    found = plots_read.shift_and_forgetting(records, scores)
    assert not isinstance(found, Absent)
    assert found["tasks"].x == (0.9, 0.2)
    assert found["tasks"].y == pytest.approx((0.2, 0.1))
    likelihoods = Scores(scores.rows, scores.columns, tuple(tuple(-v for v in row) for row in values), 3, "nll")
    assert likelihoods.mean_cost(2) == pytest.approx(0.2), "of losses, what rises is lost"


def test_starts_of_tasks() -> None:
    records = [{"task": task, "tokens_seen": x} for x, task in enumerate("aabbca")]
    assert plots_read.task_starts(records) == (2, 4, 5)


def test_the_line_of_a_ledger_is_that_of_its_own_reader() -> None:
    """Random histories of updates, reverts and rollbacks; negative control: without rollbacks, all is on the line."""
    draw, differs = random.Random(0), 0
    for _ in range(40):
        records: list[dict[str, Any]] = [{"kind": "start", "version": 0, "features": 0, "layout": []}]
        head = 0
        for _ in range(30):
            if draw.random() < 0.2 and head:
                records.append({"kind": "rollback", "version": (back := draw.randrange(head)), "from": head})
                head = back
            else:
                head += 1
                records.append({"kind": draw.choice(("update", "revert")), "version": head, "of": 1})
        found = plots_read.timeline_of(records)
        assert isinstance(found, Timeline)
        own = Line.of(records).places
        made = [place for place, record in enumerate(records) if record["kind"] in ("update", "revert")]
        assert [version.on_line for version in found.versions] == [place in own.values() for place in made]
        differs += not all(version.on_line for version in found.versions)
    assert differs > 20


def test_tables_are_read_by_the_names_of_their_columns() -> None:
    tables = {name: Table(columns, tuple(map(tuple, rows))) for name, (columns, rows) in folders.tables().items()}
    bars = plots_read.drift_of(tables["feature_drift"])
    assert not isinstance(bars, Absent)
    assert [(bar.name, bar.low, bar.high) for bar in bars[::3]] == [("17 formal register", 0.6, 1.0), ("4", 0.1, 0.1)]
    samples = plots_read.samples_of(tables["samples"])
    assert not isinstance(samples, Absent)
    assert samples[0].pieces[0] == " The"
    recall = plots_read.recall_of([], tables["memory_recall"])
    assert isinstance(recall, RecallCurves)
    assert recall.curves["truncated"].x == (0, 1, 2, 4, 8, 16, 32)
    assert recall.chance == 0.02
    run = plots_read.samples_of(Table(COLUMNS, (("home", "who?", "a b", 0.5, ["a", " b"], [0.2, 0.8]),)))
    assert not isinstance(run, Absent), "as a run keeps them"
    assert run[0].pieces == ("a", " b")
    assert isinstance(plots_read.samples_of(Table(("pieces", "kl"), ((["a"], [1.0, 2.0]),))), Absent), "they must match"
    assert isinstance(plots_read.drift_of(Table(("name",), (("a",),))), Absent)


def test_a_memory_without_a_recall_table_shows_its_losses() -> None:
    found = plots_read.recall_of(folders.records())
    assert isinstance(found, RecallCurves)
    assert found.y_label == "nats per token"
    assert found.curves["memory"].y == pytest.approx((3.0, 2.7, 2.4, 2.1))
    assert all(math.isfinite(y) for curve in found.curves.values() for y in curve.y)
