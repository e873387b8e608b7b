"""A text with its tokens coloured by KL."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from featcl.tracking.plots_data import TokenKL
from featcl.tracking.plots_style import SMALLEST, WIDTH, panels, styled

FONT = "DejaVu Sans Mono"  # ships with Matplotlib
COLUMNS, LINES = 52, 24  # letters in a line; most lines
STRONG = (0xE6 / 255, 0x9F / 255, 0x00 / 255)  # black text on it has a contrast of 9
LETTER, LINE = 0.602 * SMALLEST, 11.0  # points: advance of DejaVu Sans Mono, and from line to line
SCALE = 30.0  # points for the colour bar below


@styled
def token_kl(text: TokenKL) -> Any:
    """Tokens on a grid of equal letters, from white at zero to orange at the 95th percentile of KL.

    Args:
        text: Its tokens; line breaks are shown as ↵ and end the line. At most 24 lines are drawn.
    """
    cells = list(laid_out(text.pieces))
    lines = min(LINES, 1 + max((line for line, *_ in cells), default=0))
    figure, _ = panels(0, height=(lines * LINE + SCALE + 10) / 72)
    figure.set_layout_engine("none")
    top = top_of(text)
    axes = _grid(figure, lines)
    for line, column, piece, token in cells:
        if line >= lines:
            break
        share = _share(text.kl[token], top)
        _piece(axes, line, column, piece, share)
    last = next((token for line, _, _, token in cells if line >= lines), None)
    _scale(figure, top, left_out=0 if last is None else len(text.pieces) - last)
    return figure


def laid_out(tokens: tuple[str, ...]) -> Iterator[tuple[int, int, str, int]]:
    """(line, column, letters, number of the token) of every piece; a token goes to a new line where it does not fit."""
    line = column = 0
    for number, token in enumerate(tokens):
        for part in _parts(token):
            if column and column + len(part) > COLUMNS:
                line, column = line + 1, 0
            yield line, column, part, number
            column += len(part)
            if part.endswith("↵"):
                line, column = line + 1, 0


def top_of(text: TokenKL) -> float:
    """KL that has the strongest colour: the 95th percentile, so that one token does not pale all others."""
    known = [value for value in text.kl if not math.isnan(value)]
    return max(float(np.quantile(known, 0.95)) if known else 0.0, 1e-6)


def _parts(token: str) -> Iterator[str]:
    """A token's letters, cut after line breaks and where a line is full."""
    shown = "".join("↵" if char == "\n" else char if char in _letters() else "□" for char in token) or "□"
    for piece in shown.replace("↵", "↵\n").split("\n"):
        yield from (piece[i : i + COLUMNS] for i in range(0, len(piece), COLUMNS))


@cache
def _letters() -> frozenset[str]:
    """What the font draws one letter wide; the rest, such as what joins the letter before it, becomes a box."""
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    known = map(chr, FT2Font(findfont(FontProperties(family=FONT))).get_charmap())
    return frozenset(char for char in known if char.isprintable() and not unicodedata.combining(char))


def _share(kl: float, top: float) -> float:
    return 0.0 if math.isnan(kl) else min(1.0, max(0.0, kl / top))


def _grid(figure: Any, lines: int) -> Any:
    """Axes whose units are letters and lines."""
    width, height = 72 * figure.get_figwidth(), 72 * figure.get_figheight()
    size = (COLUMNS * LETTER / width, lines * LINE / height)
    axes = figure.add_axes(((1 - size[0]) / 2, 1 - size[1] - 4 / height, *size))
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    axes.axis("off")
    return axes


def _piece(axes: Any, line: int, column: int, piece: str, share: float) -> None:
    from matplotlib.patches import Rectangle

    colour = tuple(1 - share * (1 - part) for part in STRONG)
    axes.add_patch(Rectangle((column, line + 0.06), len(piece), 0.88, facecolor=colour, linewidth=0))
    axes.text(column, line + 0.52, piece, family=FONT, fontsize=SMALLEST, va="center", ha="left")


def _scale(figure: Any, top: float, *, left_out: int) -> None:
    """The colour bar, and how many tokens are not drawn."""
    height = 72 * figure.get_figheight()
    axes = figure.add_axes((0.3, 18 / height, 0.4, 6 / height))
    ramp = [[[1 - i / 63 * (1 - part) for part in STRONG] for i in range(64)]]
    axes.imshow(ramp, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, 1], ["0", f"≥ {top:.2g}"], fontsize=SMALLEST)
    axes.tick_params(length=2, pad=1)
    edge = 6 / (72 * WIDTH)
    figure.text(edge, 21 / height, "KL, nats", fontsize=SMALLEST, va="center")
    if left_out:
        figure.text(1 - edge, 21 / height, f"{left_out} more", fontsize=SMALLEST, va="center", ha="right")
