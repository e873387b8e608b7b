"""Combinations of selectors, themselves selectors. With r_m the rank that member m gives a feature (1 is best):

| combination | ranks by | candidates |
|---|---|---|
| `union` | min over m of r_m: the members take turns | of any member |
| `intersection` | max over m of r_m: good for the one it matters least to | of all members |
| `rank` | mean over m of r_m (Borda); one rank below a member's last where it is no candidate of its | of any member |

Source: Borda 1781; Dwork et al. 2001, "Rank aggregation methods for the Web".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features.directions import Directions
from featcl.features.selectors.base import Ranking, Selector, missing, needs, rank

COMBINATIONS = ("union", "intersection", "rank")


def union(*members: Selector) -> Selector:
    """A selector whose members take turns: first every member's first choice, then every second, …"""
    return combination("union", members)


def intersection(*members: Selector) -> Selector:
    """A selector of the features that every member ranks, by the worst of their ranks."""
    return combination("intersection", members)


def rank_aggregation(*members: Selector) -> Selector:
    """A selector by mean rank."""
    return combination("rank", members)


def combination(how: str, members: Sequence[Selector], labels: Sequence[str] | None = None) -> Selector:
    """The selector that combines others.

    Args:
        how: One of `COMBINATIONS`.
        members: Two or more selectors.
        labels: What to call them in the manifest; by default their names.
    """
    if len(members) < 2:
        raise FeatclError(f"selector {how}: a combination has at least two members")
    names = _distinct(labels or [getattr(member, "__name__", "selector") for member in members])

    def combined(sae: Any, model: Any, tokenizer: Any, **given: Any) -> Ranking:
        if lacking := {name: lacks for name, m in zip(names, members, strict=True) if (lacks := missing(m, given))}:
            raise FeatclError("; ".join(f"{name} lacks its {' and '.join(lacks)}" for name, lacks in lacking.items()))
        rankings = [_ranking(rank(member, sae, model, tokenizer, given)) for member in members]
        return combine(how, rankings, names, d_sae=sae.cfg.d_sae)

    combined.needs = tuple(dict.fromkeys(need for member in members for need in needs(member)))  # pyright: ignore[reportFunctionMemberAccess]
    combined.label = {how: names}  # pyright: ignore[reportFunctionMemberAccess]
    combined.__name__ = f"{how}({', '.join(names)})"
    return combined


def combine(how: str, rankings: Sequence[Ranking], names: Sequence[str], *, d_sae: int) -> Ranking:
    """One ranking from several, by the formulas above; ties go to the feature with the better mean rank.

    Args:
        how: `union`, `intersection` or `rank`.
        rankings: Of the members.
        names: Of the members; their scores are kept under `name.score`.
        d_sae: Number of features.
    """
    ranks = torch.stack([_ranks(ranking.order, d_sae) for ranking in rankings])  # [members, d_sae], inf: no candidate
    absent = torch.tensor([len(ranking.order) + 1.0 for ranking in rankings], dtype=torch.float64)
    mean = torch.where(ranks.isinf(), absent[:, None], ranks).mean(dim=0)
    key = {"union": ranks.min(dim=0).values, "intersection": ranks.max(dim=0).values, "rank": mean}[how]
    candidates = ranks.isfinite().all(dim=0) if how == "intersection" else ranks.isfinite().any(dim=0)
    order = mean.argsort(stable=True)
    order = order[key[order].argsort(stable=True)]
    together = list(zip(names, rankings, strict=True))
    return Ranking(
        order[candidates[order]],
        {f"{name}.{score}": values for name, one in together for score, values in one.scores.items()},
        names={feature: name for one in reversed(rankings) for feature, name in one.names.items()},
        reasons={feature: reason for one in reversed(rankings) for feature, reason in one.reasons.items()},
        facts={"members": {name: dict(one.facts) for name, one in together}},
    )


def _ranks(order: Tensor, d_sae: int) -> Tensor:
    ranks = torch.full((d_sae,), float("inf"), dtype=torch.float64)
    ranks[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return ranks


def _ranking(found: Ranking | Directions) -> Ranking:
    if isinstance(found, Directions):
        raise FeatclError("a member of a combination returned finished directions: it should return a ranking")
    return found


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where one occurs again."""
    return [
        name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)
    ]
