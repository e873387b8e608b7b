"""The few pieces of HTML that a report is made of: one file, no network, tables sorted by a click."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_ROWS, MAX_COLUMNS, MAX_TEXT = 400, 60, 2000
MAX_BYTES = 4_800_000  # of a page
LONG_WORD = 40  # letters after which a word is broken
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --back: #f6f8fa; --paper: #fff;
  --mark: #0072b2; --warn: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9ba6b2; --line: #3a424b; --back: #1e242b;
  --paper: #12161b; --mark: #6cb8ee; --warn: #f0873f; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 66rem;
  margin: 2rem auto; padding: 0 1.2rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.1rem 0 .3rem; } a { color: var(--mark); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .86rem; margin: 1rem 0; }
p.note { color: var(--soft); margin: .2rem 0 .8rem; }
p.warn { border-left: 4px solid var(--warn); padding-left: .7rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { background: var(--back); white-space: nowrap; } th[tabindex] { cursor: pointer; user-select: none; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
td.num { text-align: right; white-space: nowrap; } td.text { unicode-bidi: isolate; }
td.long { min-width: 14rem; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1.4rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; } figure img { width: 30rem; max-width: 100%; height: auto; background: #fff; }
figcaption { color: var(--soft); font-size: .82rem; max-width: 30rem; }
.tokens { font: .86rem/1.7 ui-monospace, monospace; white-space: pre-wrap; unicode-bidi: isolate; background: #fff;
  color: #1b1f24; border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; margin: .4rem 0; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--mark); }
@media print { nav { display: none; } body { max-width: none; } }
"""

_JS = """
document.querySelectorAll("th").forEach(function (head) {
  head.tabIndex = 0;
  head.addEventListener("keydown", function (event) { if (event.key === "Enter") head.click(); });
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


@dataclass(frozen=True)
class Part:
    """A section of a page that is linked from its top; one without a body is left out."""

    title: str
    body: str
    note: str = ""


def page(title: str, parts: Sequence[str | Part]) -> str:
    """A whole HTML document with links to its parts; what would make it larger than 5 MB is left out, and that is said.

    Args:
        title: Of the document.
        parts: In order; strings are HTML and stand as they are.
    """
    shown = [part for part in parts if (part.body if isinstance(part, Part) else part)]
    numbered = [(f"part-{number}", part) for number, part in enumerate(shown)]
    links = "".join(f'<a href="#{key}">{escape(part.title)}</a>' for key, part in numbered if isinstance(part, Part))
    first = next((number for number, part in enumerate(shown) if isinstance(part, Part)), len(shown))
    bodies, size = [], 0
    for key, part in numbered:
        body = part if isinstance(part, str) else section(part.title, part.body, note=part.note, key=key)
        if size + len(body.encode()) > MAX_BYTES:
            left_out = "This part is left out: the page would be larger than 5 MB. Its numbers lie in the run's folder."
            body = section(part.title if isinstance(part, Part) else "", f"<p>{left_out}</p>", key=key)
        bodies.append(body)
        size += len(body.encode())
    if links:
        bodies.insert(first, f"<nav>{links}</nav>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(bodies)
        + f"\n<script>{_JS}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, note: str = "", key: str = "") -> str:
    """A headed section, or nothing if all its parts are empty; `key` is what links lead to."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    return (
        (f'<section id="{escape(key)}">\n' if key else "<section>\n")
        + f"<h2>{escape(title)}</h2>\n"
        + (f'<p class="note">{escape(note)}</p>\n' if note else "")
        + body
        + "\n</section>"
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, shades: Sequence[Sequence[float | None]] | None = None
) -> str:
    """A table whose columns sort by a click; `shades` in [0, 1] colour its cells.

    At most 400 rows and 60 columns are shown, and that is said.
    """
    if not rows:
        return ""
    head = "".join(f"<th>{escape(cut(column, 80))}</th>" for column in columns[:MAX_COLUMNS])
    lines = []
    for i, row in enumerate(rows[:MAX_ROWS]):
        cells = [_cell(value, shades[i][j] if shades else None) for j, value in enumerate(row[:MAX_COLUMNS])]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    cuts = [(MAX_ROWS, len(rows), "rows"), (MAX_COLUMNS, len(columns), "columns")]
    said = " ".join(f"The first {most} of {there} {what}." for most, there, what in cuts if there > most)
    more = f'<p class="note">{said}</p>' if said else ""
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{more}'


def tokens(texts: Sequence[str], values: Sequence[float], top: float) -> str:
    """A text whose tokens are coloured from white at 0 to orange at `top`; a pointer on one shows its value."""
    spans = []
    for text, value in zip(texts, values, strict=True):
        share = 0.0 if math.isnan(value) else min(1.0, max(0.0, value / top))
        colour = ",".join(str(round(255 + share * (end - 255))) for end in (230, 159, 0))
        shown = escape(text).replace("\n", "↵\n")
        spans.append(f'<span style="background:rgb({colour})" title="{number(value)}">{shown}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


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


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def number(value: float | None) -> str:
    """Three decimals, or scientific for what three decimals cannot show."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def escape(text: Any) -> str:
    """Text as HTML; what no HTML may hold, such as control characters and half a surrogate pair, becomes �."""
    return html.escape(_FORBIDDEN.sub("�", str(text)), quote=True)


def cut(text: Any, most: int = MAX_TEXT) -> str:
    """Text of at most so many characters; how many are left out is said."""
    shown = str(text)
    return shown if len(shown) <= most else f"{shown[:most]}… ({len(shown) - most} more characters)"


def _cell(value: Any, shade: float | None) -> str:
    if isinstance(value, bool) or not (value is None or isinstance(value, (int, float))):
        text = cut(value)
        kind = "text long" if max(map(len, text.split()), default=0) > LONG_WORD else "text"
        return f'<td class="{kind}">{escape(text)}</td>'
    style = "" if shade is None else f' style="{_colour(shade)}"'
    key = "" if value is None or value != value else f' data-value="{value!r}"'
    return f'<td class="num"{key}{style}>{number(value)}</td>'


def _colour(shade: float) -> str:
    """White at 0 to blue at 1, with text that stays legible."""
    part = min(1.0, max(0.0, shade))
    red, green, blue = (round(255 + part * (end - 255)) for end in (0, 114, 178))
    return f"background:rgb({red},{green},{blue});color:{'#fff' if part > 0.55 else '#1b1f24'}"
