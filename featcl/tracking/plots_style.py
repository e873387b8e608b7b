"""One style for all pictures: half a column wide, no letter below 7 points, colours that keep apart, the same bytes.

Nothing global is touched: figures are made without pyplot, and the style holds only while one is drawn or written.
Names come from data that nobody has checked, such as what a model wrote: they are drawn as plain text in one line,
never read as mathematics, and cut where they would not fit.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from featcl.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 3.3, 2.3  # inches
SMALLEST = 7.0  # points
DPI = 200
# Okabe & Ito 2008: eight colours that the common forms of colour blindness keep apart; yellow is too faint for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX"
GREY, FAINT, WARNING = "#777777", "#BBBBBB", "#D55E00"
MAX_ENTRIES = 12  # of a legend
P = ParamSpec("P")

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with Matplotlib: the same letters everywhere
    "font.size": 7.5,
    "text.parse_math": False,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.0,
    "legend.frameon": False,
    "legend.fontsize": SMALLEST,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "featcl",
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    """The house style, whatever else is set in this process."""
    import matplotlib

    defaults: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context(defaults | _RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks is drawn as a box
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A function that makes a figure does so in the house style; where everything lies is settled once."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            _fix_ticks(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # else every format that it is written in would move things anew
        return figure

    return drawn


def _fix_ticks(figure: Figure) -> None:
    """As many ticks as there is room for in a small figure, whatever room the layout then leaves."""
    from matplotlib.ticker import AutoLocator, MaxNLocator

    for axes in figure.axes:
        for axis, most in ((axes.xaxis, 6), (axes.yaxis, 5)):
            if isinstance(axis.get_major_locator(), AutoLocator):
                axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))


def panels(
    count: int = 1, *, height: float = HEIGHT, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Any]]:
    """A figure with axes below each other that share their horizontal axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0] if count else ()
    return figure, list(axes)


def render(figure: Figure, form: str) -> bytes:
    """A figure as `png` or `svg`; the same figure gives the same bytes."""
    metadata: dict[str, Any] = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure atomically in the form that the file's ending names: .png or .svg."""
    path = Path(path)
    write_bytes(path, render(figure, path.suffix.removeprefix(".")))
    return path


def label(text: object, limit: int = 24) -> str:
    """A name as it is drawn: one line of letters, the middle left out where it is long.

    Args:
        text: Any text.
        limit: Most characters.
    """
    plain = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    if len(plain) > limit:
        head = (limit - 1) // 2
        plain = f"{plain[:head]}…{plain[len(plain) - (limit - 1 - head) :]}"
    return f" {plain}" if plain.startswith("_") else plain  # Matplotlib leaves names with _ out of legends


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of the line with this number; lines that share a colour differ in their dashes."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def legend(figure: Figure, parts: Sequence[Any]) -> None:
    """One legend below all axes, in as many columns as its longest name allows; the figure grows with its lines."""
    pairs = [pair for axes in parts for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if not pairs:
        return
    shown = pairs[:MAX_ENTRIES]
    if len(pairs) > MAX_ENTRIES:
        from matplotlib.lines import Line2D

        shown.append((Line2D([], [], linestyle="none"), f"and {len(pairs) - MAX_ENTRIES} more"))
    longest = max(len(name) for _, name in shown)
    columns = int(72 * WIDTH / (28 + 4.5 * longest))  # points: of the handle and its gaps, and of a letter
    handles, names = zip(*shown, strict=True)
    columns = max(1, min(3, columns, len(shown)))
    figure.set_figheight(figure.get_figheight() + 0.15 * (math.ceil(len(shown) / columns) - 1))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=1.8, columnspacing=1.2)
