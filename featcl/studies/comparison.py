"""Several runs on one page: their numbers with intervals, the frontier, and what moved against what was kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from featcl.evaluation import FORMULAS, Interval
from featcl.files import write_text
from featcl.studies.points import FinishedRun, Setting, difference, settings
from featcl.tracking import page, plots_curves, plots_matrix, plots_relations, plots_style
from featcl.tracking.base import flatten
from featcl.tracking.page import Part
from featcl.tracking.plots_curves import mean_curve
from featcl.tracking.plots_data import Absent, Curve, Forgetting, RecallCurves, is_number
from featcl.tracking.plots_read import forgetting_of, recall_of, task_starts
from featcl.tracking.plots_relations import FrontierPoint
from featcl.tracking.report_card import NAME as CARD

SHOWN = ("acc", "learning_accuracy", "forgetting_max_past", "bwt", "general_change")
FEWEST = 3  # seeds that a claim needs
MOST_MATRICES = 8
CAPTIONS = {
    "frontier": "Plasticity and retention, means over seeds with 95 % intervals; larger markers: higher learning rate",
    "norm_retention": "‖ΔW‖ and retention at the end of each run",
    "kl_forgetting": "KL to the base model at the last canaries and forgetting, one point per run, with the best line",
    "forgetting": "Mean forgetting over tasks at the canaries, mean over seeds",
    "memory": "What the memories still know",
}


def write_comparison(path: str | Path, runs: Sequence[FinishedRun], *, title: str, notes: Sequence[str] = ()) -> Path:
    """Write a page that compares runs; its pictures lie beside it, as PNG and SVG.

    Args:
        path: The HTML file, replaced atomically; pictures go to `<its stem>-plots` beside it.
        runs: Finished or not; what one does not have is left out.
        title: Of the page.
        notes: Lines below the title.

    Raises:
        FeatclError: If the runs cannot be compared.
    """
    path, found = Path(path), settings(runs)
    pictures, missing = {}, []
    for stem, figure in comparison_figures(runs).items():
        caption = CAPTIONS.get(stem) or f"Scores of {runs[int(stem.removeprefix('R_')) - 1].files.title}"
        if isinstance(figure, Absent):
            missing.append(f"{caption}: {figure.reason}")
            continue
        place = path.parent / f"{path.stem}-plots" / stem
        pictures[caption] = plots_style.save(figure, place.with_suffix(".png"))
        plots_style.save(figure, place.with_suffix(".svg"))
    drawn = "\n".join(page.figure(picture, caption) for caption, picture in pictures.items())
    body = (f'<div class="figures">\n{drawn}\n</div>' if drawn else "") + page.folded(
        f"{len(missing)} pictures are not drawn", page.bullets(missing)
    )
    parts = [
        f"<h1>{page.escape(page.cut(title, 200))}</h1>",
        *(f'<p class="note">{page.escape(note)}</p>' for note in notes),
        _arms(found),
        _differences(found),
        Part("Pictures", body),
        _cards(runs),
        _runs(runs),
        _configs(runs),
    ]
    write_text(path, page.page(f"featcl: {title}", parts))
    return path


def comparison_figures(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Every picture of the comparison by its file's stem, or why it is not drawn."""
    found = settings(runs)
    accuracy = all(run.matrix is None or run.matrix.measure == "accuracy" for run in runs)
    kept = "retention (1 − forgetting)" if accuracy else "retention (−forgetting)"
    points = frontier_points(found, top=1.0 if accuracy else 0.0)
    norms = _grouped(found, lambda run: (_number(run.files.summary.get("delta_norm")),
                                         (1.0 if accuracy else 0.0) - run.metric("forgetting_max_past")))  # fmt: skip
    kl = _grouped(found, lambda run: (_last(run, "canary/kl_tasks"), run.metric("forgetting_max_past")))
    acquired = "plasticity (learning accuracy)" if accuracy else "plasticity (−nats per token)"
    figures: dict[str, Any] = {
        "frontier": plots_relations.frontier(points, x_label=acquired, y_label=kept)
        if points else Absent("no run has finished with a forgetting that is determined"),
        "norm_retention": plots_relations.relation(norms, x_label="‖ΔW‖", y_label=kept)
        if norms else Absent("no run has both ‖ΔW‖ and forgetting"),
        "kl_forgetting": plots_relations.relation(
            kl, x_label="KL to the base model, nats per token", y_label="forgetting", fit="all")
        if kl else Absent("no run has both a canary's KL and forgetting"),
        "forgetting": _forgetting(found),
        "memory": _memories(found),
    }  # fmt: skip
    matrices = [(number, run.files.scores) for number, run in enumerate(runs[:MOST_MATRICES], 1)]
    return figures | {f"R_{number}": plots_matrix.heatmap(scores) for number, scores in matrices if scores is not None}


def frontier_points(found: Sequence[Setting], *, top: float = 1.0) -> list[FrontierPoint]:
    """A point per setting: learning accuracy, and `top` minus forgetting; those without either are left out."""
    points = []
    for setting in found:
        learned, lost = setting.interval("learning_accuracy"), setting.interval("forgetting_max_past")
        if math.isfinite(learned.value) and math.isfinite(lost.value):
            kept = Interval(top - lost.value, top - lost.high, top - lost.low)
            points.append(
                FrontierPoint(setting.line, learned.value, kept.value, _reach(learned), _reach(kept), setting.lr)
            )
    return points


def _reach(found: Interval) -> tuple[float, float]:
    known = math.isfinite(found.low) and math.isfinite(found.high)
    return (found.value - found.low, found.high - found.value) if known else (0.0, 0.0)


def _grouped(found: Sequence[Setting], pair: Callable[[FinishedRun], tuple[float, float]]) -> dict[str, Curve]:
    """Line -> the pairs of all its runs that are known."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for setting in found:
        known = [values for run in setting.runs if all(map(math.isfinite, values := pair(run)))]
        if known:
            groups.setdefault(setting.line, []).extend(known)
    return {line: Curve(tuple(x for x, _ in pairs), tuple(y for _, y in pairs)) for line, pairs in groups.items()}


def _forgetting(found: Sequence[Setting]) -> Any:
    """One line per setting: the mean over tasks and seeds."""
    means, starts = {}, ()
    for setting in found:
        read = [forgetting_of(run.files.metrics.records, run.files.scores) for run in setting.runs]
        curves = [mean_curve(list(each.canaries.values())) for each in read if isinstance(each, Forgetting)]
        curves = [curve for curve in curves if curve.x]
        if curves:
            means[setting.arm] = mean_curve(curves)
            starts = task_starts(setting.runs[0].files.metrics.records)
    if not means:
        return Absent("no run read canaries")
    return plots_curves.stacked({"mean forgetting": means}, starts, x_label="tokens seen")


def _memories(found: Sequence[Setting]) -> Any:
    lines, labels = {}, None
    for setting in found:
        read = recall_of(setting.runs[0].files.metrics.records, setting.runs[0].files.tables.get("memory_recall"))
        if isinstance(read, RecallCurves) and "memory" in read.curves:
            lines[setting.arm], labels = read.curves["memory"], read
    if labels is None:
        return Absent("no run has a memory that was measured")
    return plots_curves.recall(RecallCurves(lines, labels.x_label, labels.y_label, labels.chance))


# --- tables


def _arms(found: Sequence[Setting]) -> Part:
    rows = []
    for setting in found:
        few = "" if len(setting.runs) >= FEWEST else "screening: fewer than 3 seeds"
        cells = [cell for name in SHOWN for cell in _cells(setting.interval(name))]
        norm = [value for run in setting.runs if is_number(value := run.files.summary.get("delta_norm"))]
        rows.append([setting.arm, setting.lr, len(setting.runs), *cells, sum(norm) / len(norm) if norm else None, few])
    titles = [title for name in SHOWN for title in (name, "95 %")]
    note = "Means over seeds; intervals are over seeds and items. " + " ".join(
        f"{name}: {FORMULAS[name]}." for name in SHOWN
    )
    return Part("Arms", page.table(("arm", "lr", "seeds", *titles, "‖ΔW‖", ""), rows), note)


def _differences(found: Sequence[Setting]) -> Part:
    """Every setting against the first, paired by seed and item."""
    if len(found) < 2:
        return Part("Differences", "")
    rows = []
    for setting in found[1:]:
        pairs = [difference(setting.runs, found[0].runs, name) for name in SHOWN]
        rows.append([setting.arm, setting.lr, *(cell for pair in pairs for cell in _cells(pair))])
    titles = [title for name in SHOWN for title in (name, "95 %")]
    return Part(
        f"Differences from {found[0].arm}",
        page.table(("arm", "lr", *titles), rows),
        comparisons_note(sum(1 for row in rows for cell in row[3::2] if cell), found[0].arm),
    )


def comparisons_note(count: int, base: str) -> str:
    """How many comparisons were made, and what that means."""
    return (
        f"{count} comparisons with {base}, paired by seed and item. Each interval covers 95 % on its own: if nothing "
        f"differed, about {0.05 * count:.1f} of them would still exclude zero."
    )


def _cells(found: Interval | None) -> tuple[float | None, str]:
    if found is None or not math.isfinite(found.value):
        return None, ""
    known = math.isfinite(found.low) and math.isfinite(found.high)
    return found.value, f"{found.low:.3f}\u00a0to\u00a0{found.high:.3f}" if known else ""


def _cards(runs: Sequence[FinishedRun]) -> Part:
    """Report cards side by side: one row per number."""
    cards = [(run, run.files.tables[CARD]) for run in runs if CARD in run.files.tables]
    names: dict[tuple[str, str], dict[int, Any]] = {}
    for place, (_, table) in enumerate(cards):
        for row in (dict(zip(table.columns, cells, strict=True)) for cells in table.rows):
            if is_number(row.get("value")):
                names.setdefault((str(row.get("desideratum")), str(row.get("number"))), {})[place] = row["value"]
    rows = [[*name, *(values.get(place) for place in range(len(cards)))] for name, values in names.items()]
    columns = ("desideratum", "number", *(run.files.title for run, _ in cards))
    return Part("Report cards", page.table(columns, rows))


def _runs(runs: Sequence[FinishedRun]) -> Part:
    rows = []
    for run in runs:
        state = "finished" if run.files.summary else "not finished"
        numbers = [None if math.isnan(value := run.metric(name)) else value for name in SHOWN]
        spent = [run.files.summary.get(name) for name in ("delta_norm", "updates", "tokens")]
        rows.append([run.files.title, str(run.files.folder), state, run.lr, *numbers, *spent])
    return Part("Runs", page.table(("run", "folder", "state", "lr", *SHOWN, "‖ΔW‖", "updates", "tokens"), rows))


def _configs(runs: Sequence[FinishedRun]) -> Part:
    """The keys in which the configs differ."""
    flat = [{key: _text(value) for key, value in flatten(run.files.config).items() if key != "digest"} for run in runs]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if len({e.get(key) for e in flat}) > 1]
    rows = [[key, *(each.get(key, "–") for each in flat)] for key in sorted(keys)]
    titles = ("key", *(run.files.title for run in runs))
    return Part("What differs in the configs", page.folded(f"{len(rows)} keys", page.table(titles, rows)))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def _last(run: FinishedRun, name: str) -> float:
    known = [record[name] for record in run.files.metrics.records if is_number(record.get(name))]
    return _number(known[-1]) if known else math.nan
