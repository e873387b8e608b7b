"""Does learning one task after the other do what learning them jointly does?"""

from __future__ import annotations

import math

import numpy as np

from featcl.errors import FeatclError
from featcl.evaluation.curves import survival_curve
from featcl.evaluation.desiderata.card import Desideratum
from featcl.evaluation.desiderata.evidence import JOINT, NO_JOINT, Evidence
from featcl.evaluation.desiderata.sheet import Sheet
from featcl.evaluation.intervals import Interval
from featcl.evaluation.metrics import FORMULAS, known_mean, metric_arrays
from featcl.evaluation.paired import chance_adjusted
from featcl.evaluation.resampling import SINGLE, Formula


def sequential(evidence: Evidence) -> Desideratum:
    """What was learned, what of it is left, and how far joint training is ahead."""
    sheet = Sheet("sequential", evidence)
    tasks, last, rows = evidence.tasks, evidence.last, evidence.rows_of_references()
    sheet.of_row("acc", FORMULAS["acc"], lambda scores, base: known_mean(scores[..., tasks]))
    if JOINT in rows:
        sheet.of_cells("gap_to_joint", "mean over tasks of R[T, j] - joint[j]",
                       lambda cells: known_mean((cells[..., last, :] - cells[..., rows[JOINT], :])[..., tasks]),
                       references={JOINT: 0.0})  # fmt: skip
    else:
        sheet.lacks(["gap_to_joint"], NO_JOINT)
    final = {name: float(known_mean(evidence.drawn.values[row, tasks])) for name, row in rows.items()}
    sheet.of_cells("learning_accuracy", FORMULAS["learning_accuracy"], metric(evidence, "learning_accuracy"),
                   references=final)  # fmt: skip
    for name in ("bwt", "forgetting_max_past", "forgetting_chaudhry"):
        sheet.of_cells(name, FORMULAS[name], metric(evidence, name), references={"base": 0.0},
                       why="at least two tasks are needed")  # fmt: skip
    for name in (SINGLE, JOINT):
        _add_intransigence(sheet, name)
    sheet.of_cells("first_task_survival", FORMULAS["first_task_survival"], metric(evidence, "first_task_survival"),
                   references={"base": 1.0}, why="the first task was not learned, or scores are no shares")  # fmt: skip
    _add_survival(sheet)
    _add_chance_adjusted(sheet)
    return sheet.done()


def metric(evidence: Evidence, name: str) -> Formula:
    """One of `StreamMetrics`, of the run's own rows and without the probes that may change."""
    kept = [*evidence.tasks, *evidence.general]
    return lambda cells: metric_arrays(cells[..., : evidence.last + 1, kept])[name]


def _add_intransigence(sheet: Sheet, reference: str) -> None:
    evidence, name = sheet.evidence, f"intransigence_{reference}"
    if reference not in evidence.references:
        sheet.lacks([name], f"give the folder of such a run: references={{'{reference}': …}}")
        return
    row, order = evidence.row(reference), np.array(evidence.tasks)
    sheet.of_cells(name, FORMULAS["intransigence"].replace("reference", reference),
                   lambda cells: known_mean(cells[..., row, order] - cells[..., order + 1, order]),
                   references={reference: 0.0})  # fmt: skip


def _add_survival(sheet: Sheet) -> None:
    """Of what the first task taught, what was never lost since, and how long half of it lived."""
    evidence, names = sheet.evidence, ("first_task_never_lost", "first_task_half_life")
    matrix, spent = evidence.run.matrix, evidence.run.spent
    try:
        at = None if isinstance(spent, str) else spent.experiences
        curve = survival_curve(matrix.scores(matrix.columns[0]).array, at=at, level=evidence.drawn.level)
    except FeatclError as error:
        sheet.lacks(names, str(error))
        return
    ends = Interval(curve.never_lost[-1], curve.low[-1], curve.high[-1])
    sheet.put(names[0], "of the first task's items right just after it, the share right at every row since", ends,
              references={"base": 1.0}, why="no item of the first task was learned")  # fmt: skip
    sheet.count(names[1], "where that share is first at most one half", curve.half_life,
                unit="rows" if at is None else "experiences", note="seen at evaluations only, without an interval",
                why="no item of the first task was learned")  # fmt: skip


def _add_chance_adjusted(sheet: Sheet) -> None:
    matrix, tasks = sheet.evidence.run.matrix, sheet.evidence.tasks
    chance = np.array([matrix.chance.get(matrix.columns[task], math.nan) for task in tasks])
    if not sheet.evidence.graded or np.isnan(chance).all():
        sheet.lacks(["acc_chance_adjusted"], "the chance of guessing is not known (chance in R.json)")
        return
    sheet.of_row("acc_chance_adjusted", "mean over tasks of (R[T, j] - chance_j) / (1 - chance_j)",
                 lambda scores, base: known_mean(chance_adjusted(scores[..., tasks], chance)))  # fmt: skip
