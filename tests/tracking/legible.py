"""What of a drawn figure a reader could not read."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

from matplotlib.text import Text

WIDTH, SMALLEST = 3.3, 7.0  # inches, points


def drawn_texts(figure: Any) -> list[Text]:
    """Every text that reaches the canvas: ticks out of view and empty ones do not."""
    found: list[Text] = []
    draw = Text.draw

    def recorded(self: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            found.append(self)
        draw(self, renderer, *args, **kwargs)

    with mock.patch.object(Text, "draw", recorded):
        figure.canvas.draw()
    return found


def problems(figure: Any) -> list[str]:
    """Too wide, letters below 7 points, letters outside the figure, letters on each other."""
    texts, renderer = drawn_texts(figure), figure.canvas.get_renderer()
    found = [f"{figure.get_figwidth():.2f} inches wide"] if figure.get_figwidth() > WIDTH + 1e-6 else []
    found += [f"{t.get_text()!r} has {t.get_fontsize()} points" for t in texts if t.get_fontsize() < SMALLEST]
    boxes = [(text, text.get_window_extent(renderer)) for text in texts]
    inside = figure.bbox.padded(1.0)
    for text, box in boxes:
        if box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1:
            found.append(f"{text.get_text()!r} leaves the figure")
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        if _collide(one, a, other, b, pixels=figure.dpi / 72):
            found.append(f"{one.get_text()!r} lies on {other.get_text()!r}")
    return found


def _collide(one: Text, a: Any, other: Text, b: Any, *, pixels: float) -> bool:
    """Boxes that share more than a pixel or two; of turned texts, lines that are nearer than their letters are high."""
    turn = one.get_rotation()
    if turn % 90 and turn == other.get_rotation():
        away = abs(a.x1 - b.x1) * math.sin(math.radians(turn))
        return away < 0.9 * one.get_fontsize() * pixels
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width > 2 and height > 2
