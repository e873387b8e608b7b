"""A second, frozen LoRA beside the trained one: what earlier directions learned and the present ones cannot hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featcl.adapters.lora import LoraSite
from featcl.adapters.peft_host import FACTORS, eject, inject, kept_name, lora_config
from featcl.errors import FeatclError

RANK_TOLERANCE = 1e-6
"""A singular value below this share of the whole update carries no more than rounding errors."""

KEPT = "kept"  # in the names of coordinates
Factors = tuple[Tensor, Tensor]


def attach_kept_(host: Any, sites: Sequence[LoraSite], kept: Mapping[str, Factors]) -> None:
    """Replace the frozen LoRA of these sites; without factors it is taken out.

    Args:
        host: The PeftModel.
        sites: What it belongs to; their `kept` is overwritten.
        kept: (A, B) by site name, of any rank; padded with zeros to the largest, 0 where a site has none.
    """
    name = kept_name(sites[0].adapter)
    if name in host.peft_config:
        eject(host, name)
    for site in sites:
        site.kept.clear()
    rank = max((len(a) for a, _ in kept.values()), default=0)
    if rank == 0:
        return
    inject(host.get_base_model(), host, name, lora_config([site.name for site in sites], rank), seed=0)
    for site in sites:
        linears = {which: getattr(site.module, which)[name] for which in FACTORS}
        with torch.no_grad():
            for linear in linears.values():
                linear.weight.zero_()
            if site.name in kept:
                a, b = kept[site.name]
                linears["lora_A"].weight[: len(a)] = a.to(linears["lora_A"].weight)
                linears["lora_B"].weight[:, : len(a)] = b.to(linears["lora_B"].weight)
        for which, linear in linears.items():
            linear.weight.requires_grad_(False)
            site.kept[which] = linear.weight.detach().float().clone()


def concatenated(parts: Sequence[Factors], *, scale: float = 0.0) -> Factors:
    """One (A, B) with B A the sum of the parts' products, of the smallest rank: Σ Bᵢ Aᵢ = [B₁ B₂ …] [A₁; A₂; …].

    With the thin QR of B and Aᵀ, B A = Q_B (R_B R_Aᵀ) Q_Aᵀ; the small core's SVD says how many ranks it takes.

    Args:
        parts: (A, B) pairs for the same linear.
        scale: Norm of the update that they are parts of, against which rounding errors are judged.
    """
    a = torch.cat([part.double() for part, _ in parts])
    b = torch.cat([part.double() for _, part in parts], dim=1)
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    rank = int((s > RANK_TOLERANCE * max(float(s[0]), scale)).sum()) if len(s) else 0
    root = s[:rank].sqrt()
    return (root[:, None] * (vt[:rank] @ q_a.T)).float(), ((q_b @ u[:, :rank]) * root).float()


def kept_factors(kept: Mapping[str, Tensor], sites: Sequence[LoraSite]) -> dict[str, dict[str, Tensor]]:
    """Kept coordinates by site; complete pairs of the right widths, or an error."""
    found: dict[str, dict[str, Tensor]] = {}
    known = {site.name: site for site in sites}
    for key, tensor in kept.items():
        name, which = key.rsplit(f".{KEPT}_", 1)
        if name not in known or which not in FACTORS:
            raise FeatclError(f"the coordinates hold the unknown {key}: they belong to another adapter")
        found.setdefault(name, {})[which] = tensor
    for name, part in found.items():
        module = known[name].module
        if set(part) != set(FACTORS):
            raise FeatclError(f"the coordinates lack one of {name}'s kept factors")
        shapes = [list(part[which].shape) for which in FACTORS]
        if shapes != [[len(part["lora_A"]), module.in_features], [module.out_features, len(part["lora_A"])]]:
            raise FeatclError(f"{name}'s kept factors are {shapes[0]} and {shapes[1]}, which do not fit the module")
    return found


def same_factors(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether two sets of kept factors are bit-equal."""
    return set(one) == set(other) and all(
        one[name][which].shape == other[name][which].shape
        and torch.equal(one[name][which].to(other[name][which]), other[name][which])
        for name in one
        for which in FACTORS
    )
