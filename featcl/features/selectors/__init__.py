"""Ways to rank an SAE's features, one small file per family; `featcl.features.select` keeps the first k of them."""

from featcl.features.selectors.base import Ranking, Selector, needs
from featcl.features.selectors.combine import COMBINATIONS, intersection, rank_aggregation, union
from featcl.features.selectors.spec import SELECTORS, Spec, label_text, resolve

__all__ = [
    "COMBINATIONS",
    "SELECTORS",
    "Ranking",
    "Selector",
    "Spec",
    "intersection",
    "label_text",
    "needs",
    "rank_aggregation",
    "resolve",
    "union",
]
