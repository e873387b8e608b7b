"""Features as HTML: one file, every text escaped, and nothing that loads from the network before it is opened."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from featcl.html import STYLE, escape, note, table

if TYPE_CHECKING:
    from featcl.features.show import Context, FeatureDashboard

_CSS = (
    STYLE
    + """
.featcl .columns { display: flex; flex-wrap: wrap; gap: 1.4rem; margin: .5rem 0; }
.featcl .text b { font-weight: 700; text-decoration: underline; } .featcl .text i { opacity: .6; }
.featcl summary { cursor: pointer; } .featcl iframe { width: 100%; height: 24rem; border: 1px solid #8886; }
"""
)
# An iframe gets its address when it is opened: until then nothing is fetched, whatever the browser preloads.
_OPEN = "var f=this.querySelector('iframe');if(this.open&amp;&amp;!f.src)f.src=f.dataset.src;"


def page(title: str, features: Iterable[FeatureDashboard]) -> str:
    """A whole document."""
    body = "\n".join(_card(feature) for feature in features)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def card(feature: FeatureDashboard) -> str:
    """One feature, as Jupyter shows it."""
    return f"<style>{_CSS}</style>\n{_card(feature)}"


def cards(features: Iterable[FeatureDashboard]) -> str:
    """Several features, as Jupyter shows them."""
    return f"<style>{_CSS}</style>\n" + "\n".join(_card(feature) for feature in features)


def _card(feature: FeatureDashboard) -> str:
    share = feature.active / feature.tokens if feature.tokens else 0.0
    title = feature.label if feature.label == str(feature.feature_id) else f"{feature.label} ({feature.feature_id})"
    facts = [f"{feature.hook_name} of {feature.source}" if feature.source else feature.hook_name]
    facts.append(
        f"fires on {feature.active} of {feature.tokens} tokens ({share:.3%}), mean {feature.mean:.3g} where it does"
    )
    facts += [f"{name} {value:.4g}" for name, value in feature.scores.items() if isinstance(value, (int, float))]
    contexts = "".join(_context(context) for context in feature.contexts)
    return (
        f'<div class="featcl"><h3>Feature {escape(title)}</h3>{note(" · ".join(facts))}<div class="columns">'
        f"<div>{_histogram(feature.histogram, feature.top)}</div>"
        f"<div>{_effects('raises', feature.promoted)}</div><div>{_effects('lowers', feature.suppressed)}</div>"
        f"</div>{contexts or note('It fires nowhere in these texts.')}{_neuronpedia(feature.neuronpedia)}</div>"
    )


def _context(context: Context) -> str:
    """Tokens shaded by activation relative to the strongest; the strongest underlined."""
    parts = []
    for index, (token, act) in enumerate(zip(context.tokens, context.feature_acts, strict=True)):
        shown = escape(token).replace("\n", "<i>⏎</i>\n")
        if index == context.peak:
            shown = f"<b>{shown}</b>"
        if act > 0:
            share = min(1.0, act / context.strength)
            shown = (
                f'<span style="background:rgba(230,130,0,{0.12 + 0.6 * share:.2f})" title="{act:.4g}">{shown}</span>'
            )
        parts.append(shown)
    return f'<div class="text">{context.strength:8.3g}  {"".join(parts)}</div>'


def _effects(what: str, pairs: Sequence[tuple[str, float]]) -> str:
    """Tokens in quotes, so that a space or a line feed can be seen, with the change of their logit."""
    return table((what, "logit"), [(json.dumps(token, ensure_ascii=False), value) for token, value in pairs])


def _histogram(counts: Sequence[int], top: float) -> str:
    """Bars of log(1 + count), which shows the rare strong activations too."""
    if not any(counts):
        return ""
    width, height, highest = 10, 80, math.log1p(max(counts))
    bars = []
    for i, count in enumerate(counts):
        tall = height * math.log1p(count) / highest
        title = f"{i * top / len(counts):.3g} to {(i + 1) * top / len(counts):.3g}: {count} tokens"
        bars.append(
            f'<rect x="{i * width}" y="{height - tall:.1f}" width="{width - 1}" height="{tall:.1f}" fill="#e68200">'
            f"<title>{title}</title></rect>"
        )
    label = f'<text x="0" y="{height + 13}" font-size="11" fill="currentColor">0</text>'
    label += (
        f'<text x="{width * len(counts)}" y="{height + 13}" font-size="11" text-anchor="end" fill="currentColor">'
        f"{top:.3g}</text>"
    )
    size = f'width="{width * len(counts)}" height="{height + 16}"'
    return f'<svg {size} role="img" aria-label="activations, log counts">{"".join(bars)}{label}</svg>'


def _neuronpedia(address: str | None) -> str:
    if address is None:
        return ""
    link = f'<a href="{escape(address)}" target="_blank" rel="noopener noreferrer">{escape(address)}</a>'
    return (
        f'<details ontoggle="{_OPEN}"><summary>On Neuronpedia (asks its server)</summary>{link}'
        f"{note('Offline, or where the frame stays empty: everything above was computed here.')}"
        f'<iframe data-src="{escape(address)}?embed=true" title="Neuronpedia" loading="lazy" '
        'referrerpolicy="no-referrer" sandbox="allow-scripts allow-same-origin"></iframe></details>'
    )
