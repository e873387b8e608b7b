"""How objects show themselves in Jupyter: tables with every text escaped, no script, nothing loaded from anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STYLE = """
.featcl { font: 14px/1.45 system-ui, sans-serif; border: 1px solid #8886; border-radius: 6px; padding: .7rem 1rem;
  margin: .8rem 0; max-width: 68rem; overflow-x: auto; }
.featcl h3 { margin: 0 0 .2rem; font-size: 1.05rem; } .featcl .note { opacity: .7; font-size: .85rem; }
.featcl table { border-collapse: collapse; margin: .3rem 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
.featcl td, .featcl th { padding: .08rem .5rem; text-align: left; border-bottom: 1px solid #8884; }
.featcl td.number { text-align: right; }
.featcl .text { margin: .15rem 0; font: .85rem ui-monospace, monospace; overflow-wrap: anywhere;
  white-space: pre-wrap; }
"""
SHOWN = 24  # rows of a table that may be long


@dataclass(frozen=True)
class Shade:
    """A number on a colour.

    Attributes:
        value: The number; NaN is shown as a dash without colour.
        share: From 0, no colour, to 1, the strongest.
        framed: Whether a frame marks it.
    """

    value: float
    share: float
    framed: bool = False


def card(title: str, *parts: str) -> str:
    """A titled box of parts that are HTML already."""
    return f'<style>{STYLE}</style>\n<div class="featcl"><h3>{escape(title)}</h3>{"".join(parts)}</div>'


def table_card(title: str, about: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A titled table with a line about it."""
    return card(title, note(about), table(columns, rows))


def facts_card(title: str, facts: Mapping[str, Any], *parts: str) -> str:
    """A titled list of names and values, and what follows it; a value that is None is left out."""
    return card(title, table((), [pair for pair in facts.items() if pair[1] is not None]), *parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows of cells: numbers to the right, NaN as a dash, a `Shade` on its colour, a pair (text, address) as a link."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ["<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows]
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{''.join(lines)}</table>"


def long_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The first rows of a table that may be long, and how many there are more."""
    return table(columns, rows[:SHOWN]) + note(f"and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def coloured(tokens: Sequence[str], values: Sequence[float]) -> str:
    """A text, each token on a colour that is strongest at the largest value; the value is told on hovering."""
    top = max((value for value in values if not math.isnan(value)), default=0.0)
    return '<div class="text">' + "".join(map(_token, tokens, values, [top] * len(tokens))) + "</div>"


def note(text: str) -> str:
    """A line of small print; nothing for no text."""
    return f'<div class="note">{escape(text)}</div>' if text else ""


def escape(text: Any) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=True)


def _cell(value: Any) -> str:
    if isinstance(value, Shade):
        return _shaded(value)
    if isinstance(value, float):
        return f'<td class="number">{"–" if math.isnan(value) else format(value, ".4g")}</td>'
    if isinstance(value, tuple):
        text, address = value
        return f'<td><a href="{escape(address)}" target="_blank" rel="noopener noreferrer">{escape(text)}</a></td>'
    return f"<td>{escape('' if value is None else value)}</td>"


def _token(token: str, value: float, top: float) -> str:
    share = value / top if top > 0 and value > 0 else 0.0
    return f'<span style="background:rgba(230,130,0,{0.7 * share:.2f})" title="{value:.4g}">{escape(token)}</span>'


def _shaded(cell: Shade) -> str:
    """Blue that lets the page's own text colour be read, whether the page is light or dark."""
    if math.isnan(cell.value):
        return '<td class="number">–</td>'
    frame = ";outline:2px solid #d55e00;outline-offset:-2px" if cell.framed else ""
    share = min(1.0, max(0.0, cell.share))
    return (
        f'<td class="number" style="background:rgba(0,114,178,{0.5 * share:.2f}){frame}" title="{cell.value!r}">'
        f"{cell.value:.3f}</td>"
    )
