"""`constrain`: a model and chosen directions in, an adapter that can only move along them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from featcl.adapters.adapter import ConstrainedAdapter
from featcl.adapters.lora import attach
from featcl.adapters.plan import KINDS, DirectionSet, plan_sites
from featcl.errors import FeatclError


def constrain(
    model: nn.Module,
    directions: DirectionSet | Mapping[int, DirectionSet],
    *,
    kind: str = "both",
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    modules: Sequence[str] | None = None,
    protect: Any = None,
    fold_norms: bool = True,
    seed: int = 0,
) -> ConstrainedAdapter:
    """Adapt a model so that its update can only write along, or react to, the chosen features.

    Writers get ΔW = Q_w C, Q_w = orth(D ⊘ g); readers ΔW = C Q_rᵀ, Q_r = orth(E ⊘ g); C is 0 at the start.

    Args:
        model: A model whose residual map is known; PEFT replaces its linears in place.
        directions: One set, or one per layer. `.vectors` (decoder rows) bound writers, `.readers` (encoder columns,
            else `.vectors`) bound readers.
        kind: `write`, `read`, `both`, or `none`, plain LoRA on the modules of `both`.
        rank: LoRA rank; None is k. A smaller one moves in `rank` fixed random combinations of inputs (or outputs).
        layers: Blocks to adapt. None: the block of the hook and the n_layers // 3 before it, or the mapping's keys.
        modules: Short names to keep, such as `down_proj`; all of the kind by default.
        protect: What must stay untouched: a `Subspace`, rows, or directions; or a mapping with `write` and `read`.
        fold_norms: False leaves the norms' gains out, as a control; the update then leaks.
        seed: Of random factors; `none` and ranks below k have some.

    Returns:
        The adapter; logits are those of the base until it is trained.

    Raises:
        FeatclError: Unknown kind or architecture; empty, too many, too wide or near-dependent directions; a layer out
            of range or above the hook; an unknown module; a rank above k; nothing left after protecting.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if kind not in KINDS:
        raise FeatclError(f"adapter kind {kind!r} is not available: there is {', '.join(KINDS)}")
    if kind == "none" and protect is not None:
        raise FeatclError("kind 'none' promises nothing, so it cannot protect anything: choose write, read or both")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise FeatclError("the model already holds an adapter: take it off first (adapter.remove())")
    plans = plan_sites(
        model,
        directions,
        kind=kind,
        layers=layers,
        modules=modules,
        protect=protect,
        fold_norms=fold_norms,
    )
    k = max(len(plan.fold.vectors) for plan in plans)
    if rank is not None and not 1 <= rank <= k:
        raise FeatclError(f"rank {rank} is not between 1 and k = {k}, the number of directions")
    rank = rank or k
    peft_model, sites = attach(model, plans, kind=kind, rank=rank, seed=seed)
    return ConstrainedAdapter(peft_model, sites, kind=kind, rank=rank)
