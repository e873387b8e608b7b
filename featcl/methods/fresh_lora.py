"""A fresh LoRA per task on the same modules: what was learned is frozen beside it, and training starts from zero again.

The frozen part is the adapter's second LoRA, of which it knows: it is in `coordinates`, in what is saved and exported.
Logits do not change (up to rounding). The optimizer's moments belong to the old task; whoever steps must drop them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from featcl.adapters.kept import attach_kept_, concatenated
from featcl.adapters.lora import LoraSite
from featcl.errors import FeatclError


def lora_sites(adapter: Any, method: str) -> tuple[LoraSite, ...]:
    """The adapter's LoRA sites.

    Raises:
        FeatclError: If it has none: the hook kinds.
    """
    sites: tuple[Any, ...] = tuple(getattr(adapter, "sites", ()))
    if not sites or not all(isinstance(site, LoraSite) for site in sites):
        raise FeatclError(f"{method}: kind {adapter.kind!r} is no LoRA; use it with none, write, read or both")
    return sites


def need_kind_none(adapter: Any, method: str, why: str) -> None:
    """Raise FeatclError for an adapter of another kind than `none`."""
    if adapter.kind != "none":
        raise FeatclError(f"{method}: it {why}, on kind none; this is {adapter.kind!r}")


@torch.no_grad()
def freeze_and_restart_(adapter: Any, generator: torch.Generator, method: str) -> int:
    """Move all that was learned into the frozen LoRA and go on from ΔW = 0 on top of it.

    Args:
        adapter: A LoRA adapter; changed in place.
        generator: Of the new random A, where both factors are trained.
        method: Named in an error.

    Returns:
        Bytes of the frozen LoRA.
    """
    sites = lora_sites(adapter, method)
    kept = {}
    for site in sites:
        old = [(site.kept["lora_A"], site.kept["lora_B"])] if site.kept else []
        kept[site.name] = concatenated([*old, site.moving_factors()])
    attach_kept_(adapter.model, sites, kept)
    for site in sites:
        for which, parameter in site.trained.items():
            if which == "lora_A" and len(site.trained) == 2:
                parameter.copy_(random_factor(parameter, generator))
            else:
                parameter.zero_()
    return sum(tensor.nbytes for site in sites for tensor in site.kept.values())


def random_factor(like: Tensor, generator: torch.Generator) -> Tensor:
    """A as PEFT draws it: uniform, ± 1 / √d_in (Kaiming with a = √5)."""
    bound = 1.0 / math.sqrt(like.shape[1])
    return (2.0 * torch.rand(like.shape, generator=generator) - 1.0).to(like) * bound
