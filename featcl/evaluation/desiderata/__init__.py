"""The report card: what a run shows of the five desiderata, from its files and those of reference runs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featcl.errors import FeatclError
from featcl.evaluation.desiderata.card import Desideratum, Number, ReportCard
from featcl.evaluation.desiderata.compositional import compositional
from featcl.evaluation.desiderata.distributions import distributions
from featcl.evaluation.desiderata.efficient import efficient
from featcl.evaluation.desiderata.evidence import JOINT, Evidence, RunFiles
from featcl.evaluation.desiderata.preserve import preserve
from featcl.evaluation.desiderata.sequential import sequential
from featcl.evaluation.labels import TaskLabel, label_tasks
from featcl.evaluation.relations import Relations
from featcl.evaluation.resampling import RESAMPLES, resample

__all__ = ["Desideratum", "Number", "ReportCard", "report_card"]

TARGET = 0.8  # mean share of right answers over the tasks that counts as learned


def report_card(
    run_dir: str | Path,
    *,
    references: Mapping[str, str | Path] | None = None,
    relations: Relations | None = None,
    target: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    summary: Mapping[str, Any] | None = None,
) -> ReportCard:
    """The five desiderata of a run, with references and 95 % intervals.

    Args:
        run_dir: The run's folder: R.json, and as far as they are there metrics.jsonl, summary.json and config.json.
        references: Name -> the folder of another run on the same items, whose last row of R is what counts: `joint`,
            all tasks at once; `single`, every task alone; `in_context`, the base model told in context; an order of
            the same data (`blocked`, `shuffled`, `gradual`, `recurring`); or a rival by any name. The base model is
            there by itself: it is the run's first row.
        relations: How columns belong together; None for what summary.json says.
        target: Mean score over tasks that counts as learned; None for 0.8 of right answers, and for none where scores
            are likelihoods.
        resamples: Of the bootstrap over items.
        seed: Of its draws.
        summary: What the run's summary.json will hold, where it is not written yet.

    Raises:
        FeatclError: If a file is damaged, no task was trained, a reference measures something else or other items, or
            a relation names a column that is not there.
    """
    run = RunFiles.read(run_dir, summary=summary)
    if len(run.matrix.rows) < 2:
        raise FeatclError(f"{run.path}: R has no row after the base's; no task was trained yet")
    if "base" in (references or {}):
        raise FeatclError("the reference 'base' is the run's own first row; name the run another way")
    others = {name: RunFiles.read(path) for name, path in (references or {}).items()}
    known = Relations.from_dict(run.summary.get("relations", {})) if relations is None else relations
    known.check(run.matrix.columns)
    drawn = resample(
        run.matrix, references={name: other.matrix for name, other in others.items()}, resamples=resamples, seed=seed
    )
    goal = TARGET if target is None and run.matrix.measure == "accuracy" else target
    evidence = Evidence(run, others, drawn, known, goal, seed)
    labels, unlabelled = _labels(evidence)
    return ReportCard(
        run=run.name,
        measure=run.matrix.measure,
        level=drawn.level,
        references={name: str(other.path) for name, other in others.items()},
        preserve=preserve(evidence),
        sequential=sequential(evidence),
        distributions=distributions(evidence),
        efficient=efficient(evidence),
        compositional=compositional(evidence),
        labels=labels,
        notes=(*run.notes, *(note for other in others.values() for note in other.notes), *unlabelled),
    )


def _labels(evidence: Evidence) -> tuple[tuple[TaskLabel, ...], tuple[str, ...]]:
    """How each task ended, against joint training or, without it, against all right; and why there are no labels."""
    matrix, tasks = evidence.run.matrix, evidence.tasks
    kept = [*tasks, *evidence.general]
    values = evidence.drawn.values
    if JOINT in evidence.references:
        joint = values[evidence.row(JOINT), tasks]
        ceiling = np.where(np.isnan(joint), 1.0 if evidence.graded else math.nan, joint)
    elif evidence.graded:
        ceiling = np.ones(len(tasks))
    else:
        return (), ("tasks are not labelled: with likelihoods it takes a joint run to say what can be learned",)
    names = [matrix.columns[column] for column in kept]
    rows = values[: evidence.last + 1, kept]
    return label_tasks(rows, columns=names, n_tasks=len(tasks), ceiling=ceiling.tolist()), ()
