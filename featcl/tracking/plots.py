"""Pictures of runs as files: PNG or SVG, by the file's ending; a picture without data is not written.

What is drawn is decided by pure functions from plain values to a figure (`plots_matrix`, `plots_curves`,
`plots_relations`, `plots_ledger`, `plots_tokens`), in one style (`plots_style`). The same data gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcl.tracking import plots_curves, plots_ledger, plots_matrix, plots_read, plots_relations, plots_tokens
from featcl.tracking.base import Record
from featcl.tracking.plots_data import Absent, Bar, Curve, Scores, Table
from featcl.tracking.plots_relations import Fit, FrontierPoint, linear_fit
from featcl.tracking.plots_style import COLOURS, HEIGHT, SMALLEST, WIDTH, render, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS", "HEIGHT", "SMALLEST", "WIDTH", "Absent", "Fit", "FrontierPoint", "Scores", "Table", "bars",
    "drift_curve", "forgetting_curves", "frontier", "linear_fit", "loss_curve", "render", "run_figures", "save",
    "score_heatmap", "version_curves",
]  # fmt: skip


def run_figures(
    records: Sequence[Record],
    *,
    scores: Scores | None = None,
    ledger: Sequence[Record] = (),
    tables: Mapping[str, Table] | None = None,
) -> dict[str, Callable[[], Figure] | Absent]:
    """Every picture of one run by its file's stem, as what draws it; or why it is not drawn.

    Args:
        records: Of metrics.jsonl.
        scores: R.
        ledger: Records of ledger.jsonl.
        tables: What the run kept as tables, by name.
    """
    tables = tables or {}
    kept = "retention (1 − forgetting)" if scores is None or scores.kept else "retention (−forgetting)"
    norms = {"x_label": "‖ΔW‖", "y_label": kept, "joined": True}
    kl = {"x_label": "KL to the base model, nats per token", "y_label": "mean forgetting", "fit": "each"}
    shift = {"x_label": "distance from the task before, 1 − cos of gradients", "y_label": "cost to the rest",
             "fit": "all"}  # fmt: skip
    shifts = plots_read.shift_and_forgetting(records, scores)
    memory = plots_read.recall_of(records, tables.get("memory_recall"))
    samples = plots_read.samples_of(tables.get("samples"))
    matrix = scores if scores is not None and scores.rows else Absent("nothing was evaluated")
    return {
        "R": _drawing(plots_matrix.heatmap, matrix),
        "forgetting": _drawing(plots_curves.forgetting, plots_read.forgetting_of(records, scores)),
        "loss": _losses(records),
        "drift": _distances(records),
        "norm_retention": _drawing(plots_relations.relation, plots_read.norm_and_retention(records, scores), **norms),
        "kl_forgetting": _drawing(plots_relations.relation, plots_read.kl_and_forgetting(records), **kl),
        "shift_forgetting": _drawing(plots_relations.relation, shifts, **shift),
        "feature_drift": _drawing(plots_ledger.bars, plots_read.drift_of(tables.get("feature_drift")),
                                  x_label="change of mean activation"),
        "token_kl": _drawing(plots_tokens.token_kl, samples if isinstance(samples, Absent) else samples[-1]),
        "ledger": _drawing(plots_ledger.timeline, plots_read.timeline_of(ledger)),
        "memory": _drawing(plots_curves.recall, memory),
    }  # fmt: skip


def _drawing(draw: Callable[..., Figure], data: Any, **options: Any) -> Callable[[], Figure] | Absent:
    return data if isinstance(data, Absent) else lambda: draw(data, **options)


def score_heatmap(
    path: str | Path,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    n_tasks: int | None = None,
    measure: str = "accuracy",
) -> Path:
    """The score matrix as a heat-map; frames mark the task just trained."""
    tasks = len(columns) if n_tasks is None else n_tasks
    scores = Scores(tuple(rows), tuple(columns), tuple(map(tuple, values)), tasks, measure)
    return save(plots_matrix.heatmap(scores), path)


def forgetting_curves(path: str | Path, records: Sequence[Record], scores: Scores | None = None) -> Path | None:
    """Forgetting at the canaries and evaluations, and general ability; None if there are none."""
    found = plots_read.forgetting_of(records, scores)
    return None if isinstance(found, Absent) else save(plots_curves.forgetting(found), path)


def loss_curve(path: str | Path, records: Sequence[Record]) -> Path | None:
    """Training losses per update, faint, with their running mean; None if there are none."""
    return _saved(_losses(records), path)


def drift_curve(path: str | Path, records: Sequence[Record]) -> Path | None:
    """How far the model is from its base: KL at the canaries and per update, and ‖ΔW‖; None if neither is known."""
    return _saved(_distances(records), path)


def frontier(path: str | Path, points: Sequence[FrontierPoint], **labels: str) -> Path:
    """Plasticity against retention, one line per arm through its settings; the upper right is better."""
    return save(plots_relations.frontier(points, **labels), path)


def bars(path: str | Path, values: Mapping[str, float], *, label: str, title: str = "") -> Path:
    """One bar per name, the first on top; what is below zero has another colour."""
    found = [Bar(name, value, value, value) for name, value in values.items()]
    return save(plots_ledger.bars(found, x_label=label, title=title), path)


def version_curves(
    path: str | Path, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
) -> Path:
    """Curves over versions, one panel per label of the vertical axis."""
    groups = {
        name: {key: Curve(tuple(x), tuple(y)) for key, (x, y) in curves.items()} for name, curves in panels.items()
    }
    return save(plots_curves.stacked(groups, x_label="version"), path)


def _losses(records: Sequence[Record]) -> Callable[[], Figure] | Absent:
    found = {**plots_read.curves(records, "train/loss"), **plots_read.curves(records, "distill/")}
    return _drawing(
        plots_curves.losses, found or Absent("no training loss was recorded"), starts=plots_read.task_starts(records)
    )


def _distances(records: Sequence[Record]) -> Callable[[], Figure] | Absent:
    """KL to the base model and of every update, and ‖ΔW‖, in all and by block."""
    kl = {name: curve for prefix in ("canary/kl", "update/kl", "drift/kl_")
          for name, curve in plots_read.curves(records, prefix).items()}  # fmt: skip
    norms = {**plots_read.curves(records, "constraint/delta_norm"), **plots_read.curves(records, "drift/delta_norm_")}
    groups = {"KL, nats per token": kl, "‖ΔW‖": norms} if kl or norms else Absent("neither KL nor ‖ΔW‖ was recorded")
    return _drawing(plots_curves.stacked, groups, starts=plots_read.task_starts(records), x_label="tokens seen")


def _saved(drawing: Callable[[], Figure] | Absent, path: str | Path) -> Path | None:
    return None if isinstance(drawing, Absent) else save(drawing(), path)
