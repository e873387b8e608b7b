"""Does what was learned apart work together? Compositions, choices across tasks, and tasks that help each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featcl.evaluation.composition import (
    composition_gap,
    cross_task_discrimination,
    gain_share,
    naming_gain,
    ratio_to,
)
from featcl.evaluation.desiderata.card import Desideratum
from featcl.evaluation.desiderata.evidence import JOINT, NO_JOINT, Evidence
from featcl.evaluation.desiderata.sheet import Sheet
from featcl.evaluation.metrics import known_mean


def compositional(evidence: Evidence) -> Desideratum:
    """The numbers of every relation that the stream knows."""
    sheet, relations = Sheet("compositional", evidence), evidence.relations
    for name, parts in relations.composed.items():
        _add_composed(sheet, name, parts)
    for named, unnamed in relations.named.items():
        _add_naming(sheet, named, unnamed)
    for name, tasks in relations.across.items():
        _add_across(sheet, name, tasks)
    for group in relations.related:
        _add_transfer(sheet, group)
    kinds = {"composition_gap": relations.composed, "naming_gain": relations.named,
             "cross_task": relations.across, "transfer_gain": relations.related}  # fmt: skip
    sheet.lacks([kind for kind, known in kinds.items() if not known],
                "the stream says of no columns that they are so related (relations in summary.json)")  # fmt: skip
    return sheet.done()


def _add_composed(sheet: Sheet, name: str, parts: Sequence[str]) -> None:
    whole, pieces = sheet.evidence.column(name), [sheet.evidence.column(part) for part in parts]
    sheet.of_row(f"composed/{name}", "acc(a∘b) at the end", lambda scores, base: scores[..., whole])
    sheet.of_row(f"composition_gap/{name}", f"acc(a∘b) - acc(a)·acc(b), a, b = {', '.join(parts)}",
                 lambda scores, base: composition_gap(scores[..., whole], [scores[..., part] for part in pieces]),
                 why="a part was not measured")  # fmt: skip
    _add_ratio(sheet, name)


def _add_naming(sheet: Sheet, named: str, unnamed: str) -> None:
    a, b = sheet.evidence.column(named), sheet.evidence.column(unnamed)
    sheet.of_row(f"naming_gain/{unnamed}", "acc(sources named) - acc(not named)",
                 lambda scores, base: naming_gain(scores[..., a], scores[..., b]))  # fmt: skip


def _add_across(sheet: Sheet, name: str, tasks: Sequence[str]) -> None:
    across, within = sheet.evidence.column(name), [sheet.evidence.column(task) for task in tasks]
    sheet.of_row(f"cross_task/{name}", f"acc(across) - mean of acc(within {', '.join(tasks)})",
                 lambda scores, base: cross_task_discrimination(
                     scores[..., across], [scores[..., task] for task in within]))  # fmt: skip
    _add_ratio(sheet, name)


def _add_transfer(sheet: Sheet, group: Sequence[str]) -> None:
    """What tasks that help each other gained, and the share of what they gain when they are trained jointly."""
    evidence, name = sheet.evidence, "+".join(group)
    columns, last = [evidence.column(task) for task in group], evidence.last
    sheet.of_row(f"transfer_gain/{name}", "mean over the tasks of R[T, j] - R[0, j]",
                 lambda scores, base: known_mean((scores - base)[..., columns]))  # fmt: skip
    if JOINT not in evidence.references:
        sheet.lacks([f"share_of_joint_gain/{name}"], NO_JOINT)
        return
    joint = evidence.row(JOINT)

    def share(cells: np.ndarray) -> np.ndarray:
        return gain_share(*(known_mean(cells[..., row, :][..., columns]) for row in (last, 0, joint)))

    sheet.of_cells(f"share_of_joint_gain/{name}", "(final - base) / (joint - base), each a mean over the tasks",
                   share, references={JOINT: 1.0}, why="joint training gained nothing on them")  # fmt: skip


def _add_ratio(sheet: Sheet, name: str) -> None:
    evidence, column = sheet.evidence, sheet.evidence.column(name)
    if JOINT not in evidence.references:
        sheet.lacks([f"ratio_to_joint/{name}"], NO_JOINT)
        return
    last, joint = evidence.last, evidence.row(JOINT)
    sheet.of_cells(f"ratio_to_joint/{name}", "R[T, c] / joint[c]",
                   lambda cells: ratio_to(cells[..., last, column], cells[..., joint, column]),
                   references={JOINT: 1.0}, why="the joint run lacks this column, or scores nothing on it")  # fmt: skip
