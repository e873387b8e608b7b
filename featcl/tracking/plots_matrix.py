"""The score matrix as a heat-map."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from featcl.tracking.plots_data import Scores
from featcl.tracking.plots_style import SMALLEST, WARNING, WIDTH, label, panels, styled

NAME = 14  # letters of a task's name
PITCH = 9.0  # points between two names


@styled
def heatmap(scores: Scores) -> Any:
    """Scores of every column after every row; frames mark the task just trained, a line parts the tasks from the rest.

    Numbers stand in the cells where those are wide enough, else a colour bar stands beside them.

    Args:
        scores: The matrix; accuracies are drawn from 0 to 1, log-likelihoods from their least to their largest.
    """
    values = np.array([[math.nan if v is None else v for v in row] for row in scores.values], dtype=float)
    values = values.reshape(len(scores.rows), len(scores.columns))
    accuracy = scores.measure == "accuracy"
    numbered = len(scores.columns) <= (12 if accuracy else 9)
    figure, [axes] = panels(height=min(4.6, max(1.7, 1.2 + 0.155 * len(scores.rows))))
    low, high = (0.0, 1.0) if accuracy else _bounds(values)
    image = axes.imshow(values, cmap="cividis" if accuracy else "cividis_r", vmin=low, vmax=high, aspect="auto")
    unit = "accuracy" if accuracy else "nats per token"
    if numbered:
        axes.set_title("accuracy, %" if accuracy else unit, loc="right")
        for i, j in np.ndindex(values.shape):
            _number(axes, i, j, float(values[i, j]), image.to_rgba(values[i, j]), accuracy=accuracy)
    else:
        figure.colorbar(image, ax=axes, pad=0.02, label=unit)
    axes.set_ylabel("after training on")
    _names(axes, scores, numbered=numbered)
    _marks(axes, scores)
    return figure


def _names(axes: Any, scores: Scores, *, numbered: bool) -> None:
    """Every name, or every second, third, … where there is no room for all."""
    across = 72 * WIDTH - (85 if numbered else 130)
    step = max(1, math.ceil(PITCH * len(scores.columns) / across))
    places = range(0, len(scores.columns), step)
    turn = 45 if len(places) <= 10 else 90
    names = [label(scores.columns[place], NAME) for place in places]
    axes.set_xticks(places, names, rotation=turn, ha="right" if turn < 90 else "center", va="top")
    if turn < 90:
        for text in axes.get_xticklabels():
            text.set_rotation_mode("anchor")
            text.set_verticalalignment("center")
    step = max(1, math.ceil(len(scores.rows) / 20))
    places = range(0, len(scores.rows), step)
    axes.set_yticks(places, [label(scores.rows[place], NAME) for place in places])


def _marks(axes: Any, scores: Scores) -> None:
    """Frames on the diagonal, and a line between the tasks and what is never trained."""
    from matplotlib.patches import Rectangle

    for j in range(min(scores.n_tasks, len(scores.rows) - 1)):
        width = 1.2 if len(scores.columns) <= 20 else 0.5
        axes.add_patch(Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, edgecolor=WARNING, linewidth=width, zorder=5))
    if scores.n_tasks < len(scores.columns):
        axes.axvline(scores.n_tasks - 0.5, color="white", linewidth=2.5, zorder=2)


def _number(axes: Any, row: int, column: int, value: float, colour: Any, *, accuracy: bool) -> None:
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALLEST}
    if math.isnan(value):
        axes.text(column, row, "–", color="#555555", **style)
        return
    text = f"{100 * value:.0f}" if accuracy else f"{value:.2f}"
    axes.text(column, row, text, color="black" if luminance(colour) > 0.18 else "white", **style)


def luminance(colour: Any) -> float:
    """Relative luminance of an sRGB colour; black and white text are equally legible on 0.18.

    Source: WCAG 2.1, definition of relative luminance.
    """
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _bounds(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
