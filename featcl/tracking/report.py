"""`report.html`: one run on one page, built from the files of its folder alone.

The same files give the same bytes: no clock, no host name beyond what `env.json` holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.files import write_text
from featcl.tracking import page, plots
from featcl.tracking.base import flatten
from featcl.tracking.jsonl import MetricsFile, read_metrics
from featcl.tracking.names import FORMULAS

CHANGED = "changed_by_hand"  # in summary.json: what was done to the run after its numbers were measured

_HEADLINES = (
    ("acc", "final accuracy, mean over tasks"),
    ("learning_accuracy", "accuracy just after learning"),
    ("forgetting_max_past", "forgetting (max of the past − final)"),
    ("bwt", "backward transfer"),
    ("general_change", "change of general ability"),
)


def write_report(folder: str | Path, *, summary: dict[str, Any] | None = None) -> Path:
    """Draw a run's pictures and write its report.

    Args:
        folder: A run's folder with any of config.json, env.json, metrics.jsonl, R.json, summary.json, tables/*.json.
        summary: What summary.json will hold, where it is written after the report.

    Returns:
        Path of `report.html`; pictures lie in `plots/`.

    Raises:
        FeatclError: If it is not a run's folder, or one of the files is damaged.
    """
    folder = Path(folder)
    config, env = (_read_json(folder / f"{name}.json") for name in ("config", "env"))
    summary = _read_json(folder / "summary.json") if summary is None else summary
    metrics = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else MetricsFile((), None)
    if not config and not metrics.records:
        raise FeatclError(f"{folder}: not a run's folder; config.json and metrics.jsonl are both missing")
    matrix = _read_json(folder / "R.json")
    name = "/".join(str(config.get(key)) for key in ("study", "arm") if config.get(key)) or folder.name
    title = f"{name}, seed {config['seed']}" if "seed" in config else name
    pictures = draw_plots(folder, metrics=metrics, matrix=matrix)
    parts = [
        f"<h1>{page.escape(title)}</h1>",
        f'<p class="note">{page.escape(_subtitle(config, metrics))}</p>',
        *_warnings(metrics, summary),
        page.tiles(_headlines(summary)),
        _matrix_section(matrix),
        _pictures_section(folder, pictures),
        _metrics_section(summary),
        _flips_section(matrix),
        *_table_sections(folder),
        page.section("Config", page.folded("every key", page.table(("key", "value"), _pairs(config)))),
        page.section("Environment", page.folded("versions and machine", page.table(("key", "value"), _pairs(env)))),
    ]
    write_text(folder / "report.html", page.page(f"featcl: {title}", parts))
    return folder / "report.html"


def draw_plots(
    folder: str | Path, *, metrics: MetricsFile | None = None, matrix: dict[str, Any] | None = None
) -> dict[str, Path]:
    """Draw every picture that the files of a run allow into `plots/`.

    Args:
        folder: The run's folder.
        metrics: Its metrics file if it was read already.
        matrix: Its R.json if it was read already.

    Returns:
        Caption -> path, in the order of the report.
    """
    folder = Path(folder)
    if metrics is None:
        metrics = read_metrics(folder / "metrics.jsonl")
    if matrix is None:
        matrix = _read_json(folder / "R.json")
    out = folder / "plots"
    pictures: dict[str, Path | None] = {}
    if matrix.get("rows"):
        cells = {key: matrix[key] for key in ("rows", "columns", "values", "n_tasks", "measure")}
        pictures["Scores after each task; framed: the task just trained"] = plots.score_heatmap(out / "R.png", **cells)
    pictures["Forgetting at the canaries, and general ability"] = plots.forgetting_curves(
        out / "forgetting.png", metrics.records
    )
    pictures["Training loss; thin lines: new task"] = plots.loss_curve(out / "loss.png", metrics.records)
    pictures["Distance from the base model"] = plots.drift_curve(out / "drift.png", metrics.records)
    return {caption: path for caption, path in pictures.items() if path is not None}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatclError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise FeatclError(f"{path}: expected a JSON object, not {type(data).__name__}")
    return data


def _subtitle(config: dict[str, Any], metrics: MetricsFile) -> str:
    updates = max((record.get("update", 0) for record in metrics.records), default=0)
    model = config.get("model")
    adapter = config.get("adapter") or {}
    parts = [f"model {model}" if model else "", f"adapter {adapter['kind']}" if "kind" in adapter else ""]
    return ", ".join(part for part in (*parts, f"{updates} updates") if part)


def _warnings(metrics: MetricsFile, summary: dict[str, Any]) -> list[str]:
    texts = [metrics.torn] if metrics.torn else []
    if not summary:
        texts.append("summary.json is missing: this run has not finished; what follows is what it has measured so far.")
    for what in summary.get(CHANGED, ()):
        texts.append(
            f"Changed by hand after these numbers were measured: {what}; adapter/ and state/ are of that head."
        )
    return [f'<p class="warn">{page.escape(text)}</p>' for text in texts]


def _headlines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    found = {name.rsplit("/", 1)[-1]: value for name, value in reversed(flatten(summary).items())}
    shown = [(found.get(name), text) for name, text in _HEADLINES]
    return [(page.number(value), text) for value, text in shown if isinstance(value, (int, float))]


def _matrix_section(matrix: dict[str, Any]) -> str:
    if not matrix.get("rows"):
        return ""
    values = matrix["values"]
    known = [value for row in values for value in row if value is not None]
    low, high = (0.0, 1.0) if matrix["measure"] == "accuracy" else (min(known, default=0.0), max(known, default=1.0))
    shades = [[None, *(_shade(value, low, high) for value in row)] for row in values]
    rows = [[name, *row] for name, row in zip(matrix["rows"], values, strict=True)]
    note = "R[i, j]: score on column j after training on row i; the first row is the base model."
    if matrix["measure"] != "accuracy":
        note += " Held-out negative log-likelihood in nats per token: lower is better."
    tables = page.table(("after", *matrix["columns"]), rows, shades=shades)
    return page.section("Score matrix", tables, note=note)


def _shade(value: float | None, low: float, high: float) -> float | None:
    return None if value is None else (value - low) / ((high - low) or 1.0)


def _pictures_section(folder: Path, pictures: dict[str, Path]) -> str:
    figures = "\n".join(page.figure(path, caption) for caption, path in pictures.items())
    return page.section("Pictures", f'<div class="figures">\n{figures}\n</div>' if figures else "")


def _metrics_section(summary: dict[str, Any]) -> str:
    flat = {name: value for name, value in flatten(summary).items() if not isinstance(value, (list, tuple))}
    rows = [[name, value, FORMULAS.get(name.rsplit("/", 1)[-1], "")] for name, value in flat.items()]
    return page.section("Final numbers", page.table(("name", "value", "formula"), rows))


def _flips_section(matrix: dict[str, Any]) -> str:
    """What a mean hides: items that were right and are wrong at the end, and the other way round."""
    if matrix.get("measure") != "accuracy" or len(matrix.get("rows", ())) < 2:
        return ""
    rows, lists = [], []
    for index, column in enumerate(matrix["columns"]):
        items = matrix["items"].get(column, {})
        learned = index + 1 if index < min(matrix["n_tasks"], len(matrix["rows"]) - 1) else 0
        lost = [item for item, scores in items.items() if _flipped(scores[learned], scores[-1])]
        won = [item for item, scores in items.items() if _flipped(scores[-1], scores[learned])]
        rows.append([column, matrix["rows"][learned], len(items), len(lost), len(won)])
        lists += [[column, "right to wrong", ", ".join(lost)]] if lost else []
        lists += [[column, "wrong to right", ", ".join(won)]] if won else []
    columns = ("column", "compared with the row", "items", "right to wrong", "wrong to right")
    details = page.folded("which items", page.table(("column", "flip", "items"), lists))
    note = "Tasks are compared with the row in which they were trained, probes with the base model."
    return page.section("Flips up to the last row", page.table(columns, rows), details, note=note)


def _flipped(was: float | None, now: float | None) -> bool:
    return was is not None and now is not None and was > now


def _table_sections(folder: Path) -> list[str]:
    sections = []
    for path in sorted((folder / "tables").glob("*.json")):
        data = _read_json(path)
        if data["name"] == "R":  # the score matrix in long form, shown already
            continue
        title = "What the adapter does, feature by feature" if data["name"] == "features" else data["name"]
        sections.append(page.section(title, page.table(data["columns"], data["rows"])))
    return sections


def _pairs(values: dict[str, Any]) -> list[Sequence[Any]]:
    return [(name, _shown(value)) for name, value in sorted(flatten(values).items())]


def _shown(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str)) else json.dumps(value, sort_keys=True, ensure_ascii=False)
