"""The README's pictures and its table of what was found.

    python scripts/docs/pictures.py       writes docs/images/idea.svg, docs/images/recall.svg and the table in README.md

The idea is drawn; recall is read from the results that experiments/memory keeps. The same results give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcl.studies.memory_arms import GAPS, TAUGHT
from featcl.studies.memory_recall import interval
from featcl.tracking.plots_style import COLOURS, GREY, save, style

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
STUDY = ROOT / "experiments" / "memory"
ARMS = {  # in the order of the legend: name in the results, name in the picture
    "full": "the model, full context",
    "linear": "truncated, with a linear memory",
    "base": "truncated, with a deep memory",
    "lora": "truncated, with a LoRA trained on the text",
    "truncated": "truncated",
}
BEGIN, END = "<!-- found: scripts/docs/pictures.py -->", "<!-- /found -->"


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure with axes beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.set_facecolor("white")
    return drawn, list(drawn.subplots(1, columns, squeeze=False)[0])


# --- the idea ---------------------------------------------------------------------------------------------------------


def idea() -> Any:
    """Left, the loop; right, what an update may and may not do."""
    with style():
        drawn, (loop, span) = figure(7.0, 2.5, columns=2)
        _loop(loop)
        _span(span)
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
    return drawn


def _loop(axes: Any) -> None:
    axes.set(xlim=(0, 10), ylim=(0, 7))
    axes.axis("off")
    boxes = {  # text: place
        "live trajectory": (2.2, 5.9),
        "gradient": (7.6, 5.9),
        "step of the coordinates C\nalong chosen features only": (7.6, 3.5),
        "trust region, guard": (7.6, 1.1),
        "ledger of versions,\nR: learned and forgotten": (2.2, 1.1),
        "model + adapter": (2.2, 3.5),
    }
    for text, (x, y) in boxes.items():
        bold = "chosen" in text
        axes.text(
            x, y, text, ha="center", va="center", fontsize=7.5, zorder=3,
            bbox={"boxstyle": "round,pad=0.45", "facecolor": "#E6F1F8" if bold else "white",
                  "edgecolor": COLOURS[0] if bold else GREY, "linewidth": 1.0 if bold else 0.7},
        )  # fmt: skip
    ways = [((3.9, 5.9), (6.6, 5.9)), ((7.6, 5.4), (7.6, 4.3)), ((7.6, 2.7), (7.6, 1.6)), ((5.7, 1.1), (4.4, 1.1)),
            ((2.2, 1.9), (2.2, 3.0)), ((2.2, 4.0), (2.2, 5.4))]  # fmt: skip
    for start, end in ways:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9})
    axes.text(2.4, 4.7, "acts", fontsize=7, color=GREY)


def _span(axes: Any) -> None:
    """The plane of two features in a space of three dimensions, drawn in perspective."""
    axes.set(xlim=(-1.3, 5.4), ylim=(-1.9, 2.6))
    axes.axis("off")
    one, other, up = np.array([2.6, -0.5]), np.array([1.3, 1.2]), np.array([0.0, 1.0])
    plane = np.array([-0.25 * one - 0.5 * other, 1.15 * one - 0.5 * other, 1.15 * one + 1.5 * other,
                      -0.25 * one + 1.5 * other])  # fmt: skip
    axes.fill(*plane.T, facecolor="#E6F1F8", edgecolor=COLOURS[0], linewidth=0.8)
    inside = 0.7 * one + 0.45 * other
    gradient = inside + 1.55 * up
    arrows = [(one, COLOURS[0], 1.0, "-"), (other, COLOURS[0], 1.0, "-"), (gradient, GREY, 1.2, "-"),
              (inside, COLOURS[1], 1.6, "-")]  # fmt: skip
    for end, colour, wide, line in arrows:
        axes.annotate(
            "", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": wide, "linestyle": line}
        )
    axes.plot(*np.array([inside, gradient]).T, color=GREY, linewidth=0.8, linestyle=":")
    names = [
        (one, (-0.75, -0.2), "feature 77", COLOURS[0], "center"),
        (other, (-0.1, 0.22), "feature 1 203", COLOURS[0], "center"),
        (gradient, (0.1, 0.05), "what the gradient asks for", GREY, "left"),
        (inside, (0.1, -0.05), "the update", COLOURS[1], "left"),
        (
            np.zeros(2),
            (-0.9, -1.5),
            "span of the chosen features: what an\nupdate writes, and reacts to, lies in it",
            "black",
            "left",
        ),
    ]
    for place, moved, text, colour, side in names:
        axes.text(*(place + np.array(moved)), text, color=colour, ha=side, va="center", fontsize=7.5)


# --- what was found ---------------------------------------------------------------------------------------------------


def answers(arm: str, gaps: Sequence[int]) -> np.ndarray:
    """[seed, test] of an arm: whether the reply was right."""
    files = sorted((STUDY / "results" / "memory" / "recall" / arm).glob("seed-*.json"))
    found = [json.loads(file.read_text(encoding="utf-8"))["right"] for file in files]
    return np.array([[right for gap in gaps for right in seed[str(gap)]] for seed in found], dtype=float)


def recall() -> Any:
    """Share of right replies by gap, with 95 % intervals over seeds and tests."""
    with style():
        drawn, (axes,) = figure(6.0, 2.6)
        places = np.arange(len(GAPS))
        for number, (arm, name) in enumerate(ARMS.items()):
            values = np.array([interval(answers(arm, (gap,)), groups=1) for gap in GAPS])
            shifted = places + 0.07 * (number - (len(ARMS) - 1) / 2)
            errors = np.abs(values[:, 1:] - values[:, :1]).T
            look = {"color": COLOURS[number], "marker": "osD^v"[number], "linewidth": 1.0, "elinewidth": 0.8}
            axes.errorbar(shifted, values[:, 0], yerr=errors, label=name, **look)
        axes.set_xticks(places, [str(gap) for gap in GAPS])
        axes.set(ylim=(-0.03, 1.03), ylabel="share of right replies")
        axes.set_xlabel("exchanges between what is told and what is asked")
        drawn.legend(loc="outside right center")
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
    return drawn


def found_table() -> str:
    """The README's rows: near, far, with intervals; the commit is that of the study's README."""
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    commit = re.search(r"\*\*Finding\*\* \(([\d-]+), code ([0-9a-f]+)", text)
    assert commit is not None, "experiments/memory/README.md names no commit"
    far = tuple(gap for gap in GAPS if gap not in TAUGHT)
    rows = []
    for arm, name in ARMS.items():
        values = [interval(answers(arm, gaps), groups=len(gaps)) for gaps in (TAUGHT, far)]
        rows.append(f"| {name} | {' | '.join(shown(value) for value in values)} |")
    seeds, tests = len(answers("base", TAUGHT)), len(answers("base", (1,))[0])
    head = f"| reads the conversation | near ({_listed(TAUGHT)}) | far ({_listed(far)}) |\n|---|---|---|"
    note = (
        f"Share of right replies, {seeds} seeds, {tests} tests a gap, 95 % intervals over both; code `{commit[2]}`, "
        f"{commit[1]}.\nQuestion, prediction and the other arms: [experiments/memory](experiments/memory/README.md)."
    )
    return "\n".join([head, *rows, "", note, "", garbage()])


def garbage() -> str:
    """What wrong experiences cost with and without weighing and guard, from the results of scripts/guard."""
    found = json.loads((ROOT / "scripts" / "guard" / "results" / "garbage.json").read_text(encoding="utf-8"))
    share, seeds, items = found["settings"][0]["garbage"], len(found["seeds"]), found["items"]
    with_guard, without = (
        "{:.1f} points [{:.1f}, {:.1f}]".format(*(value + 0.0 for value in _lost(found["arms"][arm])))
        for arm in ("guarded", "unguarded")
    )
    return (
        f"*{share:.0%} garbage in a stream* (wrong, contradictory, adversarial) costs {without} of a hundred, and\n"
        f"{with_guard} with weighing by a teacher and a guard: {seeds} seeds, {items} items each,\n"
        f"a world that no setting was chosen on; code `{found['commits'][0][:7]}`, "
        "[scripts/guard/garbage.py](scripts/guard/garbage.py)."
    )


def _lost(arm: Mapping[str, Any]) -> tuple[float, float, float]:
    """Points lost, rounded, with their interval."""
    low, high = arm["interval"]
    mean, low, high = (round(value, 1) for value in (arm["lost_points"], low, high))
    return mean, low, high


def shown(values: tuple[float, float, float]) -> str:
    """As the study prints it."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def with_table(readme: str, table: str) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _listed(gaps: Mapping[int, Any] | Sequence[int]) -> str:
    return ", ".join(str(gap) for gap in gaps)


def main() -> None:
    """Write them."""
    for name, drawn in (("idea", idea()), ("recall", recall())):
        print(save(drawn, IMAGES / f"{name}.svg"))
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), found_table()), encoding="utf-8")
    print(readme)


if __name__ == "__main__":
    main()
