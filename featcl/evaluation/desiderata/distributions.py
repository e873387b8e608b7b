"""Does it hold when what is learned differs from task to task, comes in another order, changes, or is false?"""

from __future__ import annotations

import math

import numpy as np

from featcl.errors import FeatclError
from featcl.evaluation.composition import ratio_to
from featcl.evaluation.contradiction import Resistance, recovery, resistance
from featcl.evaluation.desiderata.card import Desideratum
from featcl.evaluation.desiderata.evidence import JOINT, Evidence, number_of
from featcl.evaluation.desiderata.sequential import metric
from featcl.evaluation.desiderata.sheet import Sheet
from featcl.evaluation.intervals import Interval
from featcl.evaluation.metrics import FORMULAS, known_mean
from featcl.evaluation.relations import Claims

ORDERS = ("blocked", "shuffled", "gradual", "recurring")
SHIFT = "shift/"  # in the evaluation record of a row: how far its segment lies from the one before
SCORE = "score/"  # in a canary record: a task's score


def distributions(evidence: Evidence) -> Desideratum:
    """Differences between tasks, between orders, and what contradictions and false claims do."""
    sheet, tasks = Sheet("distributions", evidence), evidence.tasks
    sheet.of_cells("fwt", FORMULAS["fwt"], metric(evidence, "fwt"), references={"base": 0.0},
                   why="at least two tasks are needed")  # fmt: skip
    sheet.of_row("worst_task", "least over tasks of R[T, j]", lambda scores, base: -_greatest(-scores[..., tasks]))
    sheet.of_row("task_spread", "greatest - least over tasks of R[T, j]",
                 lambda scores, base: _range(scores[..., tasks]))  # fmt: skip
    _add_orders(sheet)
    _add_shifts(sheet)
    for later, earlier in evidence.relations.contradicts.items():
        _add_recovery(sheet, later, earlier)
    if not evidence.relations.contradicts:
        sheet.lacks(["recovered"], "no task is known to contradict another (relations.contradicts in summary.json)")
    _add_resistance(sheet, evidence.relations.claims)
    return sheet.done()


def _add_orders(sheet: Sheet) -> None:
    """The same data in other orders."""
    evidence = sheet.evidence
    rows = [evidence.row(name) for name in evidence.references if name in ORDERS]
    if not rows:
        sheet.lacks(
            ["order_spread"], f"give runs on the same data in other orders: references with {', '.join(ORDERS)}"
        )
        return
    rows, tasks = [evidence.last, *rows], evidence.tasks
    sheet.of_cells("order_spread", "greatest - least over orders of the final mean over tasks",
                   lambda cells: _range(known_mean(cells[..., rows, :][..., tasks])),
                   note=f"{len(rows)} orders", references=_joint_is_one_order(evidence))  # fmt: skip


def _joint_is_one_order(evidence: Evidence) -> dict[str, float]:
    return {JOINT: 0.0} if JOINT in evidence.references else {}


def _add_shifts(sheet: Sheet) -> None:
    """Rank correlation of how far a segment lies from the one before with what learning it costs the rest."""
    evidence = sheet.evidence
    records = [record for record in evidence.run.records if record.get("kind") == "evaluation"]
    names = sorted({name for record in records for name in record if name.startswith(SHIFT)})
    if not names or len(records) != evidence.last + 1:
        sheet.lacks(["shift_and_cost"], f"no distance between segments was recorded ({SHIFT}… in evaluation records)")
    for name in names if len(records) == evidence.last + 1 else ():
        shifts = {row: number_of(record.get(name)) for row, record in enumerate(records)}
        known = [row for row, shift in shifts.items() if row >= 2 and not math.isnan(shift)]
        if len(known) < 3:
            sheet.lacks([f"shift_and_cost/{name.removeprefix(SHIFT)}"], "at least three shifts after the first task")
            continue
        distances = np.array([shifts[row] for row in known])
        sheet.of_cells(f"shift_and_cost/{name.removeprefix(SHIFT)}",
                       f"rank correlation over rows of {name} with mean loss on all that came before",
                       lambda cells, d=distances, rows=known: _rank_correlation(d, _costs(cells, evidence, rows)),
                       references={"base": 0.0}, note=f"{len(known)} shifts",
                       why="all shifts, or all costs, are the same")  # fmt: skip


def _costs(cells: np.ndarray, evidence: Evidence, rows: list[int]) -> np.ndarray:
    """[..., rows] mean loss at a row on earlier tasks and general ability."""
    losses = [cells[..., row - 1, :] - cells[..., row, :] for row in rows]
    kept = [[*evidence.tasks[: row - 1], *evidence.general] for row in rows]
    return np.stack([known_mean(loss[..., columns]) for loss, columns in zip(losses, kept, strict=True)], axis=-1)


def _add_recovery(sheet: Sheet, later: str, earlier: str) -> None:
    """What holds now, learned against what held before."""
    evidence, rows = sheet.evidence, sheet.evidence.run.matrix.rows
    if later not in rows:
        sheet.lacks([f"recovered/{later}"], f"{later} was not trained, or not as a task of its own")
        return
    row, new, old = rows.index(later), evidence.column(later), evidence.column(earlier)
    sheet.of_cells(f"recovered/{later}", f"R[{later}, {later}] / R[row before, {earlier}]",
                   lambda cells: ratio_to(cells[..., row, new], cells[..., row - 1, old]),
                   note="1: as well as what held before was known", why=f"{earlier} was not known before")  # fmt: skip
    name, (at, scores), spent = f"recovery/{later}", evidence.run.curve(SCORE + later), evidence.run.spent
    if not at or isinstance(spent, str):
        sheet.lacks([name], f"the task's score between evaluations was not recorded ({SCORE}{later} in canary records)")
        return
    try:
        found = recovery(at, scores, contradicted=spent.experiences[row - 1],
                         before=float(evidence.drawn.values[row - 1, old]))  # fmt: skip
    except FeatclError as error:
        sheet.lacks([name], str(error))
        return
    sheet.count(name, "experiences from the contradiction until the score is 0.9 of that before", found.experiences,
                unit="experiences", note="a reading of a fixed set, so without an interval")  # fmt: skip


def _add_resistance(sheet: Sheet, claims: Claims | None) -> None:
    names = ("resistance", "resistance_net")
    if claims is None:
        sheet.lacks(names, "which items false claims were made about is not known (relations.claims in summary.json)")
        return
    found = _resistance(sheet.evidence, claims)
    unclaimed = {"others": found.others.value}
    sheet.put(names[0], "of items that were right and were then falsely spoken of, the share still right",
              found.claimed, references=unclaimed, why="no such item was right before")  # fmt: skip
    sheet.put(names[1], "that share - the same of other items", found.net, references={"base": 0.0},
              why="no such item, or no other item, was right before")  # fmt: skip


def _resistance(evidence: Evidence, claims: Claims) -> Resistance:
    matrix = evidence.run.matrix
    if claims.row not in matrix.rows[1:]:
        raise FeatclError(f"relations.claims: {claims.row!r} is no row of R after the base's")
    row, before, after, claimed = matrix.rows.index(claims.row), [], [], []
    for column, items in claims.items.items():
        scores = matrix.scores(column)
        unknown = sorted(set(items) - set(scores.ids))
        if unknown:
            raise FeatclError(f"relations.claims: {unknown[0]!r} is no item of column {column!r}")
        before.append(scores.array[row - 1])
        after.append(scores.array[row])
        claimed.append(np.isin(np.array(scores.ids), items))
    if not before or not evidence.graded:
        nothing = Interval(math.nan, math.nan, math.nan)
        return Resistance(nothing, nothing, nothing, nothing)
    return resistance(np.concatenate(before), np.concatenate(after), claimed=np.concatenate(claimed),
                      level=evidence.drawn.level, seed=evidence.seed)  # fmt: skip


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Spearman's ρ along the last axis; NaN where one of the two is constant."""
    a, b = (_ranks(np.broadcast_to(values, other.shape)) for values in (one, other))
    a, b = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (a, b))
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.where(scale > 0, (a * b).sum(axis=-1) / np.where(scale > 0, scale, 1.0), np.nan)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties in the middle."""
    below = (values[..., None] > values[..., None, :]).sum(axis=-1)
    return below + (values[..., None] == values[..., None, :]).sum(axis=-1) / 2


def _greatest(values: np.ndarray) -> np.ndarray:
    greatest = np.where(np.isnan(values), -np.inf, values).max(axis=-1)
    return np.where(np.isinf(greatest), np.nan, greatest)


def _range(values: np.ndarray) -> np.ndarray:
    return _greatest(values) + _greatest(-values)
