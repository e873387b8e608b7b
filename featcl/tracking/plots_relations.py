"""Pictures of two numbers against each other: plasticity and retention, ‖ΔW‖ and retention, KL and forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcl.tracking.plots_data import Curve
from featcl.tracking.plots_style import COLOURS, DASHES, MARKERS, label, legend, panels, styled


@dataclass(frozen=True)
class FrontierPoint:
    """One arm at one setting: what it acquired and what it kept.

    Attributes:
        arm: Points of one arm are joined.
        plasticity, retention: The two numbers; more is better.
        plasticity_error, retention_error: How far their intervals reach down and up, or one number for both.
        lr: Learning rate of the setting; markers grow with it.
    """

    arm: str
    plasticity: float
    retention: float
    plasticity_error: float | tuple[float, float] = 0.0
    retention_error: float | tuple[float, float] = 0.0
    lr: float | None = None


@dataclass(frozen=True)
class Fit:
    """A straight line by least squares, and the share of the variance that it explains."""

    slope: float
    intercept: float
    r2: float
    points: int


def linear_fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """y = slope x + intercept with the least Σ(y − ŷ)²; R² = 1 − Σ(y − ŷ)² / Σ(y − ȳ)².

    Returns:
        The line; None for fewer than three points, or where x or y does not vary.
    """
    xs, ys = np.array(x, dtype=float), np.array(y, dtype=float)
    if len(xs) < 3 or np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return None
    slope, intercept = (float(value) for value in np.polyfit(xs, ys, 1))
    rest = float(((ys - slope * xs - intercept) ** 2).sum())
    return Fit(slope, intercept, 1.0 - rest / float(((ys - ys.mean()) ** 2).sum()), len(xs))


@styled
def relation(groups: Mapping[str, Curve], *, x_label: str, y_label: str, fit: str = "", joined: bool = False) -> Any:
    """Points of several groups.

    Args:
        groups: Name -> points.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        fit: `each`: a line through every group, `all`: one through all points; its R² stands in the legend.
        joined: Whether points are joined in their order, as a path.
    """
    figure, [axes] = panels()
    for index, (name, curve) in enumerate(groups.items()):
        colour = COLOURS[index % len(COLOURS)]
        found = linear_fit(curve.x, curve.y) if fit == "each" else None
        shown = label(name) if found is None else f"{label(name)}: R² {found.r2:.2f}, n {found.points}"
        line = {"linestyle": DASHES[0], "linewidth": 0.6} if joined else {"linestyle": "none"}
        axes.plot(curve.x, curve.y, color=colour, marker=MARKERS[index % len(MARKERS)], label=shown, **line)
        if found is not None:
            _line(axes, found, curve.x, color=colour, linestyle=DASHES[1 + index % 3])
    if fit == "all":
        x, y = ([value for curve in groups.values() for value in getattr(curve, name)] for name in "xy")
        if (found := linear_fit(x, y)) is not None:
            _line(axes, found, x, color="black", linestyle="--", label=f"fit: R² {found.r2:.2f}, n {found.points}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    legend(figure, [axes])
    return figure


@styled
def frontier(points: Sequence[FrontierPoint], *, x_label: str = "", y_label: str = "") -> Any:
    """Plasticity against retention, one line per arm through its settings, with intervals; upper right is better."""
    figure, [axes] = panels(height=2.6)
    rates = sorted({point.lr for point in points if point.lr is not None})
    for index, arm in enumerate(dict.fromkeys(point.arm for point in points)):
        members = [point for point in points if point.arm == arm]
        members.sort(key=lambda point: (point.lr is not None, point.lr or 0.0, point.plasticity))
        x, y = [point.plasticity for point in members], [point.retention for point in members]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        dashes = DASHES[index // len(COLOURS) % len(DASHES)]
        axes.errorbar(
            x,
            y,
            xerr=_reach([point.plasticity_error for point in members]),
            yerr=_reach([point.retention_error for point in members]),
            color=colour, linestyle=dashes, linewidth=0.8, capsize=1.5, elinewidth=0.6,
        )  # fmt: skip
        axes.scatter(x, y, [_size(point.lr, rates) for point in members], color=colour, marker=marker, zorder=3)
        axes.plot([], [], color=colour, linestyle=dashes, marker=marker, label=label(arm))
    axes.set_xlabel(x_label or "plasticity (learning accuracy)")
    axes.set_ylabel(y_label or "retention (1 − forgetting)")
    legend(figure, [axes])
    return figure


def _line(axes: Any, fit: Fit, x: Sequence[float], **style: Any) -> None:
    ends = np.array([min(x), max(x)])
    axes.plot(ends, fit.slope * ends + fit.intercept, **{"linewidth": 0.9, "zorder": 1, **style})


def _reach(errors: Sequence[float | tuple[float, float]]) -> np.ndarray:
    """[2, points]: how far down, how far up."""
    pairs = [error if isinstance(error, tuple) else (error, error) for error in errors]
    return np.array(pairs, dtype=float).reshape(-1, 2).T.clip(min=0.0)


def _size(lr: float | None, rates: Sequence[float]) -> float:
    """Area of a marker in square points; it grows with the rank of the learning rate."""
    return 14.0 if lr is None or len(rates) < 2 else 7.0 + 30.0 * rates.index(lr) / (len(rates) - 1)
