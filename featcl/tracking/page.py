"""The few pieces of HTML that a report is made of: one file, no network, tables sorted by a click."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_ROWS = 400

_CSS = """
:root { --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --back: #f6f8fa; --mark: #0072b2; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p.note { color: var(--soft); margin: .2rem 0 .8rem; } p.warn { border-left: 4px solid #d55e00; padding-left: .7rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { background: var(--back); cursor: pointer; white-space: nowrap; user-select: none; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
td.num { text-align: right; } td.text { overflow-wrap: anywhere; min-width: 8.5rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; } figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .82rem; max-width: 30rem; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--mark); }
"""

_JS = """
document.querySelectorAll("th").forEach(function (head) {
  head.addEventListener("click", function () {
    var table = head.closest("table"), body = table.tBodies[0], index = head.cellIndex;
    var up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    function key(row) { var cell = row.cells[index]; return cell.dataset.value || cell.textContent; }
    Array.from(body.rows).sort(function (a, b) {
      var x = key(a), y = key(b), p = parseFloat(x), q = parseFloat(y);
      var order = isNaN(p) || isNaN(q) ? (isNaN(p) - isNaN(q)) || x.localeCompare(y) : p - q;
      return up ? order : -order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{_JS}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A headed section, or nothing if all its parts are empty."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n"
        + (f'<p class="note">{escape(note)}</p>\n' if note else "")
        + body
        + "\n</section>"
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, shades: Sequence[Sequence[float | None]] | None = None
) -> str:
    """A table whose columns sort by a click; `shades` in [0, 1] colour its cells. At most 400 rows are shown."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for i, row in enumerate(rows[:MAX_ROWS]):
        cells = [_cell(value, shades[i][j] if shades else None) for j, value in enumerate(row)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    more = f'<p class="note">The first {MAX_ROWS} of {len(rows)} rows.</p>' if len(rows) > MAX_ROWS else ""
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{more}'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Headline numbers: (value, what it is)."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in values
    )
    return f'<div class="tiles">{inner}</div>' if inner else ""


def figure(path: Path, caption: str) -> str:
    """A PNG as part of the page itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def folded(summary: str, body: str) -> str:
    """Something shown on a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>" if body else ""


def number(value: float | None) -> str:
    """Three decimals, or scientific for what three decimals cannot show."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def escape(text: Any) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=True)


def _cell(value: Any, shade: float | None) -> str:
    if isinstance(value, bool) or not (value is None or isinstance(value, (int, float))):
        return f'<td class="text">{escape(value)}</td>'
    style = "" if shade is None else f' style="{_colour(shade)}"'
    key = "" if value is None or value != value else f' data-value="{value!r}"'
    return f'<td class="num"{key}{style}>{number(value)}</td>'


def _colour(shade: float) -> str:
    """White at 0 to blue at 1, with text that stays legible."""
    part = min(1.0, max(0.0, shade))
    red, green, blue = (round(255 + part * (end - 255)) for end in (0, 114, 178))
    return f"background:rgb({red},{green},{blue});color:{'#fff' if part > 0.55 else '#1b1f24'}"
