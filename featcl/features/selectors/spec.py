"""A selector as it is written: a name, a function, or a combination of these.

contrast
{union: [contrast, rarity]}
{rank: [contrast, {intersection: [persona, attribution]}]}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from featcl.errors import FeatclError
from featcl.features.selectors.base import Selector
from featcl.features.selectors.combine import COMBINATIONS, combination
from featcl.features.selectors.contrast import contrast, persona
from featcl.features.selectors.explanations import explanations
from featcl.features.selectors.gradients import attribution, gradient_energy
from featcl.features.selectors.listed import hand, ids
from featcl.features.selectors.rarity import rarity

SELECTORS: dict[str, Selector] = {
    "ids": ids,
    "contrast": contrast,
    "rarity": rarity,
    "gradient_energy": gradient_energy,
    "attribution": attribution,
    "persona": persona,
    "explanations": explanations,
    "hand": hand,
}

Spec: TypeAlias = str | Selector | Mapping[str, Sequence[Any]]


def resolve(spec: Any) -> tuple[Selector, Any]:
    """The selector that a spec means, and the spec as plain data for the manifest.

    Args:
        spec: A name of `SELECTORS`, a function of the same signature, or `{union | intersection | rank: [spec, …]}`.

    Raises:
        FeatclError: For an unknown name, with the nearest one, or a malformed combination.
    """
    if callable(spec):  # any function of the form in `base`
        function: Selector = spec  # pyright: ignore[reportAssignmentType]
        return function, getattr(spec, "label", None) or _path(spec)
    if isinstance(spec, str):
        if spec not in SELECTORS:
            raise FeatclError(f"selector {spec!r} is unknown{_nearest(spec)}: one of {', '.join(SELECTORS)}")
        return SELECTORS[spec], spec
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise FeatclError(f"selector {spec!r}: a name, a function, or one of {', '.join(COMBINATIONS)} with a list")
    [(how, members)] = spec.items()
    if how not in COMBINATIONS:
        raise FeatclError(f"selector: {how!r} is no combination{_nearest(how)}: one of {', '.join(COMBINATIONS)}")
    if isinstance(members, str) or not isinstance(members, Sequence) or len(members) < 2:
        raise FeatclError(f"selector {how}: expected a list of two or more selectors, got {members!r}")
    resolved = [resolve(member) for member in members]
    labels = [label if isinstance(label, str) else next(iter(label)) for _, label in resolved]
    return combination(how, [member for member, _ in resolved], labels), {how: [label for _, label in resolved]}


def label_text(label: Any) -> str:
    """The plain data of a spec on one line: `union(contrast, rarity)`."""
    if isinstance(label, str):
        return label
    [(how, members)] = label.items()
    return f"{how}({', '.join(map(label_text, members))})"


def _nearest(word: Any) -> str:
    close = difflib.get_close_matches(str(word), [*SELECTORS, *COMBINATIONS], n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _path(function: Any) -> str:
    """Where a function is defined, as `module.name`."""
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
