"""What does it take to reach a score: experiences, tokens, seconds, FLOPs, bytes?"""

from __future__ import annotations

import math

from featcl.errors import FeatclError
from featcl.evaluation.curves import data_efficiency, experiences_to
from featcl.evaluation.desiderata.card import Desideratum
from featcl.evaluation.desiderata.evidence import FLOPS, JOINT, NO_JOINT, Evidence, RunFiles
from featcl.evaluation.desiderata.sheet import Sheet
from featcl.evaluation.metrics import known_mean
from featcl.evaluation.online import BASE_NLL, NLL, SCORE, TOKENS, code_length, online_accuracy, online_records
from featcl.evaluation.resampling import Formula

UNITS = ("experiences", "tokens", "seconds", "flops")


def efficient(evidence: Evidence) -> Desideratum:
    """What was spent until a score was reached, in all, and how soon each experience was understood."""
    sheet = Sheet("efficient", evidence)
    spent = evidence.run.spent
    if isinstance(spent, str):
        sheet.lacks([*(f"{unit}_to_target" for unit in UNITS), *UNITS, "data_efficiency"], spent)
    else:
        for unit in UNITS:
            why = f"{' and '.join(FLOPS)} of each update" if unit == "flops" else f"{unit} of each update"
            sheet.count(unit, f"{unit} learned from, in all" if unit in UNITS[:2] else f"{unit} of all updates",
                        getattr(spent, unit)[-1], unit=unit, why=f"{why} were not recorded")  # fmt: skip
        _add_to_target(sheet)
    summary = evidence.run.summary
    sheet.count("trained_parameters", "numbers that are trained", summary.get("trained_parameters"))
    stored, learning = summary.get("stored_bytes") or {}, evidence.run.costs.get("learning") or {}
    sheet.count("adapter_bytes", "bytes of the saved adapter", stored.get("adapter"), unit="bytes",
                why="it was not recorded (stored_bytes.adapter in summary.json)")  # fmt: skip
    sheet.count("peak_bytes", "most resident memory while learning", learning.get("peak_rss_bytes"), unit="bytes",
                why="it was not recorded (cost.json); set evaluation.cost")  # fmt: skip
    _add_online(sheet)
    return sheet.done()


def _add_to_target(sheet: Sheet) -> None:
    """Experiences, tokens, seconds and FLOPs before the mean over all tasks is at the target."""
    evidence, target, spent = sheet.evidence, sheet.evidence.target, sheet.evidence.run.spent
    names = [*(f"{unit}_to_target" for unit in UNITS), "data_efficiency"]
    if target is None:
        sheet.lacks(names, "give the score that counts as learned: target=…")
        return
    assert not isinstance(spent, str)
    joint = evidence.references.get(JOINT)
    for unit, name in zip(UNITS, names, strict=False):
        at, theirs = getattr(spent, unit), _to_target(joint, evidence, unit, target)
        if math.isnan(at[-1]):
            sheet.lacks([name], f"{unit} of each update were not recorded")
            continue
        sheet.of_cells(name, f"{unit} before the first evaluation with mean over tasks ≥ {target:g}",
                       _needed(evidence, at, target), unit=unit, note="upper bound: scored at evaluations only",
                       references={} if math.isnan(theirs) else {JOINT: theirs})  # fmt: skip
    theirs = _to_target(joint, evidence, "experiences", target)
    if math.isnan(theirs):
        sheet.lacks(["data_efficiency"], NO_JOINT if joint is None else "the joint run's course is not known")
        return
    needed = _needed(evidence, spent.experiences, target)
    sheet.of_cells("data_efficiency", "experiences to target: joint / own; above 1 needs fewer than joint training",
                   lambda cells: data_efficiency(needed(cells), theirs), references={JOINT: 1.0},
                   note="the joint run's number is taken as given", why="neither run reached the target")  # fmt: skip


def _needed(evidence: Evidence, at: tuple[float, ...], target: float) -> Formula:
    """What was spent at the first of the run's own rows whose mean over tasks is at the target."""
    tasks, own = evidence.tasks, evidence.last + 1
    return lambda cells: experiences_to(at, known_mean(cells[..., :own, tasks]), target=target)


def _to_target(reference: RunFiles | None, evidence: Evidence, unit: str, target: float) -> float:
    """The same of a reference run, on the columns of this run's tasks; NaN where its course is not known."""
    if reference is None or isinstance(reference.spent, str):
        return math.nan
    names = [evidence.run.matrix.columns[task] for task in evidence.tasks]
    if any(name not in reference.matrix.columns for name in names):
        return math.nan
    columns = [reference.matrix.columns.index(name) for name in names]
    at = getattr(reference.spent, unit)
    scores = known_mean(reference.matrix.higher_is_better[:, columns])
    return math.nan if math.isnan(at[-1]) else float(experiences_to(at, scores, target=target))


def _add_online(sheet: Sheet) -> None:
    """How well each experience was predicted before it was learned."""
    records, level = sheet.evidence.run.records, sheet.evidence.drawn.level
    scores = online_records(records, SCORE)
    if scores.size:
        sheet.put("online_accuracy", "mean over experiences of the score just before learning it",
                  online_accuracy(scores, level=level, seed=sheet.evidence.seed).mean,
                  note="interval over blocks of neighbours")  # fmt: skip
    else:
        sheet.lacks(["online_accuracy"], f"it was not recorded ({SCORE} of each update in metrics.jsonl)")
    names = ("code_length", "code_saved")
    nll, tokens, base = (online_records(records, name) for name in (NLL, TOKENS, BASE_NLL))
    if not nll.size:
        sheet.lacks(names, f"it was not recorded ({NLL} and {TOKENS} of each update in metrics.jsonl)")
        return
    try:
        found = code_length(nll, tokens, base_nll=base if base.size else None)
    except FeatclError as error:
        sheet.lacks(names, str(error))
        return
    note = "a sum over the stream, so without an interval"
    sheet.count(names[0], "Σ -log2 p(experience | model before it) / tokens", found.per_token, unit="bits per token",
                references={"base": found.base_bits / found.tokens}, note=note)  # fmt: skip
    sheet.count(names[1], "1 - code length / that of the base model", found.saved, references={"base": 0.0}, note=note,
                why=f"the base model's was not recorded ({BASE_NLL})")  # fmt: skip
