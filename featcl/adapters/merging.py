"""Several task adapters in one: average, TIES and DARE of their updates ΔW = B A.

    average     τ = mean_t τ_t
    ties        trim τ_t to its largest `density` share; elect the sign of Σ_t τ_t; τ = mean of the entries that agree
    dare        drop entries of τ_t with chance 1 - density, divide the rest by density; τ = mean_t
    dare_ties   drop and divide so; then elect and average as in ties

all times `scale`. τ_t is the whole ΔW of a task, never A and B apart: Σ B_i A_i is not (Σ B_i)(Σ A_i). Electing and
averaging are PEFT's functions. Its `add_weighted_adapter` is not used: `linear`, `ties`, `dare_linear`, `dare_ties` and
`magnitude_prune` merge A and B apart; `ties_svd` trims each module by itself, where the paper trims the whole update,
and cuts the result to the rank of the parts without saying so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.adapters.export import Factors, PlainLora
from featcl.errors import FeatclError

METHODS = ("average", "ties", "dare", "dare_ties")


@dataclass(frozen=True, eq=False)
class Merged:
    """What came of several adapters.

    Attributes:
        deltas: ΔW [d_out, d_in] by module path, float32.
    """

    deltas: Mapping[str, Float[Tensor, "d_out d_in"]]

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius) of all modules together."""
        return sum(float(delta.double().square().sum()) for delta in self.deltas.values()) ** 0.5

    def factors(self, rank: int) -> tuple[Factors, float]:
        """The nearest LoRA of a rank (by SVD, module by module), and ‖what it leaves out‖ / ‖ΔW‖."""
        found = {name: nearest_factors(delta, rank=rank) for name, delta in self.deltas.items()}
        left = [self.deltas[name].double() - b.double() @ a.double() for name, (a, b) in found.items()]
        lost = sum(float(rest.square().sum()) for rest in left) ** 0.5
        return found, lost / self.norm() if self.norm() else 0.0


def merge_adapters(
    deltas: Sequence[PlainLora | Factors],
    *,
    method: str,
    density: float = 0.2,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """One update from several of the same modules.

    Args:
        deltas: One per task: what `load_peft` read, or factors (A, B) by module path with ΔW = B A.
        method: `average`, `ties`, `dare` or `dare_ties`.
        density: Share of a task's entries that stay: the largest of all its modules together (ties), or as many drawn
            at random (dare); `average` keeps all.
        scale: λ, what the merged update is multiplied by; the number of tasks turns a mean into task arithmetic's sum.
        seed: Of what is dropped.

    Raises:
        FeatclError: No adapters; adapters of different bases, modules or shapes; an unknown method; a density or scale
            out of range.

    Source: TIES: Yadav et al. 2023, arXiv:2306.01708, algorithm 1; DARE: Yu et al. 2023, arXiv:2311.03099, section 3.2;
    task arithmetic: Ilharco et al. 2022, arXiv:2212.04089.
    """
    if method not in METHODS:
        raise FeatclError(f"merging method {method!r} is not available: there is {', '.join(METHODS)}")
    if not 0.0 < density <= 1.0 or not 0.0 < scale < float("inf"):
        raise FeatclError(f"merging: density is above 0 and at most 1, scale above 0, not {density} and {scale}")
    tasks = _same_modules(deltas)
    generator = torch.Generator().manual_seed(seed)
    bounds = [_magnitude(task, density) if method == "ties" else 0.0 for task in tasks]
    merged = {}
    for name in tasks[0]:
        parts = [_product(task[name]) for task in tasks]
        if method == "ties":
            parts = [part * (part.abs() >= bound) for part, bound in zip(parts, bounds, strict=True)]
        elif method != "average":
            parts = [_dropped(part, density, generator) for part in parts]
        merged[name] = scale * _combined(torch.stack(parts), elect=method.endswith("ties"))
    return Merged(merged)


def _combined(parts: Float[Tensor, "tasks d_out d_in"], *, elect: bool) -> Float[Tensor, "d_out d_in"]:
    """The mean of all, or of those that have the elected sign."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    if not elect:
        return parts.mean(0)
    return disjoint_merge(parts, calculate_majority_sign_mask(parts, method="total"))


def _magnitude(task: Factors, density: float) -> float:
    """The magnitude that a `density` share of a task's entries reaches, over all its modules."""
    sizes = torch.cat([_product(pair).abs().flatten() for pair in task.values()])
    kept = max(1, round(density * sizes.numel()))
    return float(sizes.kthvalue(sizes.numel() - kept + 1).values)


def _dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """m ⊙ ΔW / density with independent m ~ Bernoulli(density): its mean is ΔW."""
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) < density
    return delta * kept / density


def _product(pair: tuple[Tensor, Tensor]) -> Float[Tensor, "d_out d_in"]:
    a, b = pair
    return b.detach().float() @ a.detach().float()


def nearest_factors(
    delta: Float[Tensor, "d_out d_in"], *, rank: int
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    """(A, B) of that rank with B A nearest to ΔW; both carry the square root of the singular values."""
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    root = s[:rank].sqrt()
    missing = rank - len(root)
    a, b = root[:, None] * vt[:rank], u[:, :rank] * root
    return torch.nn.functional.pad(a, (0, 0, 0, missing)).float(), torch.nn.functional.pad(b, (0, missing)).float()


def _same_modules(deltas: Sequence[PlainLora | Factors]) -> list[Factors]:
    """Factors of every adapter, which change the same weights of the same model."""
    if not deltas:
        raise FeatclError("merging: there are no adapters to merge")
    bases = [each.base for each in deltas if isinstance(each, PlainLora) and each.base is not None]
    if differ := sorted(set(bases) - {bases[0]} if bases else ()):
        raise FeatclError(f"merging: adapters of different bases, {bases[0]} and {differ[0]}")
    tasks = [each.factors if isinstance(each, PlainLora) else each for each in deltas]
    first = tasks[0]
    for number, task in enumerate(tasks):
        if differ := sorted(set(first) ^ set(task)):
            raise FeatclError(
                f"merging: only one of adapters 0 and {number} changes {differ[0]}; their targets must agree"
            )
        for name in first:
            here, there = ((b.shape[0], a.shape[1]) for a, b in (first[name], task[name]))
            if here != there:
                raise FeatclError(f"merging: {name} is {list(here)} in adapter 0 and {list(there)} in adapter {number}")
    return list(tasks)
