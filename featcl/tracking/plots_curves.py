"""Pictures of what changes while a run goes on, or over versions, windows and items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from featcl.tracking.plots_data import Curve, Forgetting, Recall, RecallCurves
from featcl.tracking.plots_style import (
    COLOURS,
    DASHES,
    FAINT,
    GREY,
    HEIGHT,
    MARKERS,
    label,
    legend,
    look,
    panels,
    styled,
)

MANY = 7  # tasks; of more than so many, only the first and the mean are coloured
FEW = 40  # points that are marked one by one


@styled
def forgetting(data: Forgetting) -> Any:
    """Forgetting of every task at the canaries (lines) and the evaluations (dots); below, general ability."""
    both = bool(data.general)
    figure, parts = panels(1 + both, height=HEIGHT * (1.0 + 0.5 * both), ratios=[3, 2][: 1 + both])
    tasks = list(dict.fromkeys((*data.canaries, *data.evaluations)))
    _tasks(parts[0], data, tasks)
    parts[0].axhline(0.0, color=GREY, linewidth=0.6)
    parts[0].set_ylabel("forgetting\n(best so far − now)")
    if both:
        _lines(parts[1], data.general, start=min(len(tasks), MANY))
        parts[1].set_ylabel("general score")
    _starts(parts, data.starts)
    parts[-1].set_xlabel("tokens seen")
    legend(figure, parts)
    return figure


@styled
def losses(curves: Mapping[str, Curve], starts: Sequence[float] = ()) -> Any:
    """Losses of every update, faint, with their running mean."""
    figure, [axes] = panels()
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(curve.x, curve.y, color=COLOURS[index % len(COLOURS)], alpha=0.25, linewidth=0.7)
        axes.plot(curve.x, running_mean(curve.y), linewidth=1.4, label=label(name),
                  color=COLOURS[index % len(COLOURS)], linestyle=DASHES[index % len(DASHES)])  # fmt: skip
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _starts([axes], starts)
    legend(figure, [axes])
    return figure


@styled
def stacked(groups: Mapping[str, Mapping[str, Curve]], starts: Sequence[float] = (), *, x_label: str) -> Any:
    """Curves below each other, one panel per label of the vertical axis; what is empty is left out.

    Args:
        groups: Label of the vertical axis -> curves by name.
        starts: Where thin upright lines stand.
        x_label: Of the horizontal axis that all share.
    """
    shown = {name: curves for name, curves in groups.items() if any(curve.x for curve in curves.values())}
    figure, parts = panels(max(1, len(shown)), height=HEIGHT * (0.6 + 0.45 * max(1, len(shown))))
    first = 0
    for axes, (name, curves) in zip(parts, shown.items(), strict=False):
        _lines(axes, curves, start=first)
        axes.set_ylabel(label(name, 22))
        first += len(curves)
    parts[-1].set_xlabel(x_label)
    _starts(parts, starts)
    legend(figure, parts)
    return figure


@styled
def recall(data: RecallCurves) -> Any:
    """What is still known by how much came after it, one line per reader, with intervals where there are some."""
    figure, [axes] = panels()
    places = sorted({x for curve in data.curves.values() for x in curve.x})
    for index, (name, curve) in enumerate(data.curves.items()):
        x = [places.index(value) for value in curve.x]
        axes.plot(x, curve.y, marker=MARKERS[index % len(MARKERS)], label=label(name), **look(index))
        if low_high := _band(curve):
            axes.fill_between(x, *low_high, color=COLOURS[index % len(COLOURS)], alpha=0.15, linewidth=0)
    if data.chance is not None:
        axes.axhline(data.chance, color=GREY, linewidth=0.8, linestyle=":", label="chance")
    step = max(1, math.ceil(len(places) / 10))
    axes.set_xticks(range(0, len(places), step), [f"{places[i]:g}" for i in range(0, len(places), step)])
    axes.set_xlabel(data.x_label)
    axes.set_ylabel(data.y_label)
    legend(figure, [axes])
    return figure


def running_mean(values: Sequence[float], *, weight: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start: m_t = sum_i w^(t-i) v_i / sum_i w^(t-i)."""
    means, total, count = [], 0.0, 0.0
    for value in values:
        total, count = weight * total + value, weight * count + 1.0
        means.append(total / count)
    return means


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of the curves that have a point there, at every place where one has."""
    found: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in zip(curve.x, curve.y, strict=True):
            found.setdefault(x, []).append(y)
    return Curve(tuple(sorted(found)), tuple(sum(found[x]) / len(found[x]) for x in sorted(found)))


def _tasks(axes: Any, data: Forgetting, tasks: Sequence[str]) -> None:
    """One line per task; of many, the first, their mean, and the others in grey."""
    if len(tasks) <= MANY:
        for index, task in enumerate(tasks):
            _task(axes, data, task, label=label(task), **look(index))
        return
    for task in tasks[1:]:
        _task(axes, data, task, color=FAINT, linewidth=0.5)
    _task(axes, data, tasks[0], label=f"first: {label(tasks[0], 16)}", **look(0))
    mean = mean_curve(list((data.canaries or data.evaluations).values()))
    axes.plot(mean.x, mean.y, color="black", linewidth=1.8, label=f"mean of {len(tasks)}")


def _task(axes: Any, data: Forgetting, task: str, **style: Any) -> None:
    """Canaries as a thin line, evaluations as dots in the same colour; only one of the two has the name."""
    name = style.pop("label", None)
    if task in data.canaries:
        axes.plot(data.canaries[task].x, data.canaries[task].y, label=name, **{"linewidth": 0.9, **style})
        name = None
    if task in data.evaluations:
        line = {"linestyle": "none"} if task in data.canaries else {}
        marked = {**style, **line, "marker": "o", "markersize": 3.6 if name or "linewidth" not in style else 2.0}
        axes.plot(data.evaluations[task].x, data.evaluations[task].y, label=name, **marked)


def _lines(axes: Any, curves: Mapping[str, Curve], *, start: int = 0) -> None:
    for index, (name, curve) in enumerate(curves.items(), start):
        axes.plot(curve.x, curve.y, marker="o" if len(curve.x) <= FEW else None, label=label(name), **look(index))


def _band(curve: Recall) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    known = len(curve.low) == len(curve.high) == len(curve.x)
    return (curve.low, curve.high) if known and not any(map(math.isnan, (*curve.low, *curve.high))) else None


def _starts(parts: Sequence[Any], starts: Sequence[float]) -> None:
    """A thin upright line wherever a new task of the stream begins; none where there would be a curtain of them."""
    if len(starts) <= 60:
        for axes in parts:
            for x in starts:
                axes.axvline(x, color=FAINT, linewidth=0.5, zorder=0)
