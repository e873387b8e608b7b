"""The ledger as a timeline, and bars by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featcl.tracking.plots_data import Bar, Timeline, Version
from featcl.tracking.plots_style import COLOURS, FAINT, GREY, HEIGHT, WARNING, label, legend, panels, styled

MANY = 6  # tasks with a colour of their own
Placed = tuple[int, Version]  # place among all, from 1


@styled
def timeline(data: Timeline) -> Any:
    """Every version in the order of events: KL of its update by task, and ‖ΔW‖; hollow: rolled back since."""
    figure, [top, bottom] = panels(2, height=HEIGHT * 1.2, ratios=[3, 2])
    places = list(enumerate(data.versions, 1))
    for name, colour, own in _groups(places):
        faces = [colour if version.on_line else "none" for _, version in own]
        top.scatter([x for x, _ in own], [version.kl or 0.0 for _, version in own], 8, edgecolors=colour,
                    facecolors=faces, linewidths=0.7)  # fmt: skip
        top.plot([], [], color=colour, linestyle="none", marker="o", label=name)
    if not all(version.on_line for version in data.versions):
        top.plot([], [], color=GREY, linestyle="none", marker="o", markerfacecolor="none", label="rolled back")
    top.vlines([x for x, _ in places], 0, [v.kl or 0.0 for _, v in places], color=FAINT, linewidth=0.4, zorder=0)
    top.set_ylabel("KL, nats/token")
    norms = [(x, version.delta_norm) for x, version in places if version.delta_norm is not None]
    bottom.plot([x for x, _ in norms], [norm for _, norm in norms], color="black", linewidth=1.0)
    bottom.set_ylabel("‖ΔW‖")
    bottom.set_xlabel("versions, in the order they were made")
    _marks(top, bottom, data)
    legend(figure, [top])
    return figure


@styled
def bars(values: Sequence[Bar], *, x_label: str, title: str = "") -> Any:
    """One bar per name with its interval, the first on top; what is below zero has another colour."""
    figure, [axes] = panels(height=max(1.2, 0.62 + 0.155 * len(values)))
    places = range(len(values))
    axes.barh(places, [bar.value for bar in values], height=0.7,
              color=[COLOURS[0] if bar.value >= 0 else COLOURS[1] for bar in values])  # fmt: skip
    limits = [(place, bar) for place, bar in zip(places, values, strict=True) if bar.low < bar.high]
    axes.hlines([place for place, _ in limits], [bar.low for _, bar in limits], [bar.high for _, bar in limits],
                color="black", linewidth=0.8)  # fmt: skip
    axes.set_yticks(places, [label(bar.name, 28) for bar in values])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.axvline(0.0, color=GREY, linewidth=0.6)
    axes.set_xlabel(label(x_label, 40))
    if title:
        axes.set_title(label(title, 40))
    return figure


def _groups(places: Sequence[Placed]) -> list[tuple[str, str, list[Placed]]]:
    """(name, colour, versions): the first tasks, all others as one, and what was taken back."""
    tasks = list(dict.fromkeys(version.task for _, version in places if version.kind == "update"))
    learned = [entry for entry in places if entry[1].kind == "update"]
    groups = [
        (label(task or "update"), COLOURS[i], [entry for entry in learned if entry[1].task == task])
        for i, task in enumerate(tasks[:MANY])
    ]
    rest = [entry for entry in learned if entry[1].task in tasks[MANY:]]
    groups.append(("other tasks", GREY, rest))
    groups.append(("taken back", "black", [entry for entry in places if entry[1].kind == "revert"]))
    return [group for group in groups if group[2]]


def _marks(top: Any, bottom: Any, data: Timeline) -> None:
    """Upright lines where versions were rolled back or an alarm was raised."""
    for kind, dashes in (("rollback", "-"), ("alarm", ":")):
        own = [place + 0.5 for place, what, _ in data.marks if what == kind]
        for axes in (top, bottom):
            for x in own:
                axes.axvline(x, color=WARNING, linewidth=0.8, linestyle=dashes, zorder=0)
        if own:
            top.plot([], [], color=WARNING, linewidth=0.8, linestyle=dashes, label=kind)
