"""`report.html`: one run on one page, built from the files of its folder alone.

The same files give the same bytes: no clock, no host name beyond what `env.json` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcl.files import write_text
from featcl.tracking import page, plots, report_card, report_parts
from featcl.tracking.base import flatten
from featcl.tracking.page import Part
from featcl.tracking.plots_data import Absent
from featcl.tracking.report_card import card_part
from featcl.tracking.report_files import RunFiles

CHANGED = "changed_by_hand"  # in summary.json: what was done to the run after its numbers were measured

CAPTIONS = {
    "R": "Scores after each task; framed: the task just trained",
    "forgetting": "Forgetting: lines at the canaries, dots at the evaluations; general ability",
    "loss": "Training loss and its running mean; thin lines: a new task",
    "drift": "Distance from the base model",
    "norm_retention": "‖ΔW‖ and what is kept, along the run",
    "kl_forgetting": "KL to the base model and forgetting at the canaries, with the straight lines that fit best",
    "shift_forgetting": "How far a task lies from the one before, and what learning it cost the rest",
    "feature_drift": "Features whose mean activation on background text changed",
    "token_kl": "KL of each token of the last sampled text",
    "ledger": "The ledger: every version, in the order they were made",
    "memory": "What the memory still knows",
}
_HEADLINES = (
    ("acc", "final accuracy, mean over tasks"),
    ("learning_accuracy", "accuracy just after learning"),
    ("forgetting_max_past", "forgetting (max of the past − final)"),
    ("bwt", "backward transfer"),
    ("general_change", "change of general ability"),
)


def write_report(
    folder: str | Path, *, summary: Mapping[str, Any] | None = None, pictures: Mapping[str, Path] | None = None
) -> Path:
    """Draw a run's pictures and write its report.

    Args:
        folder: A run's folder with any of config.json, env.json, metrics.jsonl, R.json, summary.json, tables/*.json,
            ledger/ledger.jsonl, quarantine.jsonl.
        summary: What summary.json will hold, where it is written after the report.
        pictures: What `draw_plots` returned, where nothing that is drawn was written since; None draws them.

    Returns:
        Path of `report.html`; pictures lie in `plots/`, each as PNG and SVG.

    Raises:
        FeatclError: If it is not a run's folder, or one of the files is damaged.
    """
    run = RunFiles.read(folder, summary=summary)
    shown, missing = _drawn(run, pictures)
    parts = [
        f"<h1>{page.escape(page.cut(run.title, 200))}</h1>",
        f'<p class="note">{page.escape(_subtitle(run))}</p>',
        *_warnings(run),
        page.tiles(_headlines(run.summary)),
        card_part(run.tables.get(report_card.NAME)),
        report_parts.matrix(run.scores),
        _pictures(shown, missing),
        report_parts.numbers(run.summary),
        report_parts.measures(run.metrics.records, run.scores),
        report_parts.flips(run.matrix),
        report_parts.samples(run.tables.get("samples")),
        report_parts.ledger(run),
        report_parts.quarantine(run.quarantine.records),
        *report_parts.other_tables(run.tables),
        report_parts.pairs("Config", "every key", run.config),
        report_parts.pairs("Environment", "versions and machine", run.env),
    ]
    write_text(run.folder / "report.html", page.page(f"featcl: {run.title}", parts))
    return run.folder / "report.html"


def draw_plots(folder: str | Path) -> dict[str, Path]:
    """Draw every picture that the files of a run allow into `plots/`, as PNG and SVG.

    Args:
        folder: The run's folder.

    Returns:
        Caption -> path of the PNG, in the order of the report.
    """
    return _drawn(RunFiles.read(folder), None)[0]


def _drawn(run: RunFiles, known: Mapping[str, Path] | None) -> tuple[dict[str, Path], dict[str, str]]:
    """Caption -> path of what is drawn, and caption -> reason of what is not; pictures of an earlier state go."""
    figures = plots.run_figures(run.metrics.records, scores=run.scores, ledger=run.ledger.records, tables=run.tables)
    pictures, missing = {}, {}
    for stem, draw in figures.items():
        caption, place = CAPTIONS[stem], run.folder / "plots" / stem
        if isinstance(draw, Absent):
            missing[caption] = draw.reason
            for form in (".png", ".svg"):
                place.with_suffix(form).unlink(missing_ok=True)
        elif known is not None and caption in known:
            pictures[caption] = known[caption]
        else:
            figure = draw()
            pictures[caption] = plots.save(figure, place.with_suffix(".png"))
            plots.save(figure, place.with_suffix(".svg"))
    return pictures, missing


def _pictures(pictures: Mapping[str, Path], missing: Mapping[str, str]) -> Part:
    figures = "\n".join(page.figure(path, caption) for caption, path in pictures.items())
    lines = page.bullets([f"{caption}: {reason}" for caption, reason in missing.items()])
    body = f'<div class="figures">\n{figures}\n</div>' if figures else ""
    return Part("Pictures", body + page.folded(f"{len(missing)} pictures are not drawn", lines))


def _subtitle(run: RunFiles) -> str:
    updates = max((record.get("update", 0) for record in run.metrics.records), default=0)
    model, adapter = run.config.get("model"), run.config.get("adapter") or {}
    parts = [f"model {model}" if model else "", f"adapter {adapter['kind']}" if "kind" in adapter else ""]
    return ", ".join(part for part in (*parts, f"{updates} updates") if part)


def _warnings(run: RunFiles) -> list[str]:
    texts = [found.torn for found in (run.metrics, run.ledger, run.quarantine) if found.torn]
    if not run.summary:
        texts.append("summary.json is missing: this run has not finished; what follows is what it has measured so far.")
    for what in run.summary.get(CHANGED, ()):
        texts.append(
            f"Changed by hand after these numbers were measured: {what}; adapter/ and state/ are of that head."
        )
    return [f'<p class="warn">{page.escape(page.cut(text))}</p>' for text in texts]


def _headlines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = {name.rsplit("/", 1)[-1]: value for name, value in reversed(flatten(summary).items())}
    shown = [(found.get(name), text) for name, text in _HEADLINES]
    return [(page.number(value), text) for value, text in shown if isinstance(value, (int, float))]
