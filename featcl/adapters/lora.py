"""The constraint as PEFT's own LoRA: one factor is the frozen basis, the other holds the trained coordinates.

| role  | rank == k                   | rank < k                                                   |
|-------|-----------------------------|------------------------------------------------------------|
| write | lora_B = Q_w, lora_A = C    | lora_B = Q_w C₂, lora_A = A frozen, row-orthonormal        |
| read  | lora_A = Q_rᵀ, lora_B = C   | lora_A = C₂ Q_rᵀ, lora_B = P frozen, column-orthonormal    |

C and C₂ are 0 at the start. The product with C₂ is formed anew in each forward pass of its layer: never stale.
A site may also hold a second, frozen LoRA: what an earlier choice of directions learned (`change.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl import files
from featcl.adapters.peft_host import FACTORS, inject, kept_name, lora_config, sides
from featcl.adapters.plan import SitePlan
from featcl.adapters.span_factor import SpanFactor
from featcl.errors import FeatclError

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
FREE = ("project_update", "penalty", "project_gradient")  # trainings with PEFT's own free factors


@dataclass(frozen=True, eq=False)
class LoraSite:
    """One adapted linear layer.

    Attributes:
        plan: What it was made from.
        module: PEFT's LoRA layer in the model.
        trained: Trained tensors by factor: one for the constrained kinds, both for `none` and the ablations.
        frozen: Float32 master copies of the frozen tensors by name, safe from `.to(bfloat16)`.
        adapter: The adapter's name in PEFT.
        kept: Factors of the second, frozen LoRA in float32, by name; empty where there is none.
    """

    plan: SitePlan
    module: Any
    trained: dict[str, nn.Parameter]
    frozen: dict[str, Tensor]
    adapter: str = ADAPTER
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Full module path in the model."""
        return self.plan.name

    @property
    def scale(self) -> float:
        """alpha / rank: 1 unless an alpha was asked for."""
        return float(self.module.scaling[self.adapter])

    def factor(self, which: str) -> nn.Module:
        """PEFT's `lora_A` or `lora_B` linear of the part that is trained."""
        return getattr(self.module, which)[self.adapter]

    def factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """(A, B) in float32 with ΔW = B A, detached: all of the update, the kept part and the scale included."""
        a, b = self.moving_factors()
        if not self.kept:
            return a, b
        return torch.cat([a, self.kept["lora_A"].to(a)]), torch.cat([b, self.kept["lora_B"].to(b)], dim=1)

    def moving_factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """As `factors`, of the trained part alone; frozen parts from their master copies."""
        with torch.no_grad():
            return self._weight("lora_A"), self.scale * self._weight("lora_B")

    def live_factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """As `moving_factors`, of the model's own tensors, with their gradient."""
        a, b = (self.factor(which).weight for which in FACTORS)
        return a.float(), self.scale * b.float()  # type: ignore[operator, union-attr]

    def _weight(self, which: str) -> Tensor:
        if which in self.frozen:
            return self.frozen[which]
        weight = self.trained[which].detach().float()
        basis = self.frozen.get(f"{which}.basis")
        if basis is None:
            return weight
        return basis @ weight if which == "lora_B" else weight @ basis.T

    def release_(self) -> None:
        """Take hooks off the layer, before its factors are deleted."""
        for which in FACTORS:
            for factor in self.factor(which).modules():
                if isinstance(factor, SpanFactor):
                    factor.let_go_()

    def restore_(self) -> None:
        """Put the float32 masters back into the model and make the coordinates float32 again."""
        for which in FACTORS:
            linear: Any = self.factor(which)
            if which in self.frozen:
                linear.weight.data = self.frozen[which].to(linear.weight.device).clone()
            else:
                self.trained[which].data = self.trained[which].data.float()
            if (basis := self.frozen.get(f"{which}.basis")) is not None:
                linear.parametrizations.weight[0].basis = basis.to(self.trained[which].device).clone()
            if self.kept:
                kept = getattr(self.module, which)[kept_name(self.adapter)].weight
                kept.data = self.kept[which].to(kept.device).clone()


def attach(
    model: Any,
    plans: Sequence[SitePlan],
    *,
    kind: str,
    rank: int,
    seed: int,
    name: str = ADAPTER,
    training: str = "coordinates",
    alpha: float | None = None,
    host: PeftModel | None = None,
) -> tuple[PeftModel, tuple[LoraSite, ...]]:
    """Put PEFT LoRA layers into the model and fix what the constraint fixes.

    Args:
        model: The Hugging Face model; its linears are replaced in place, as PEFT does.
        plans: The linears.
        kind: `none` keeps PEFT's own initialisation (seeded) and trains both factors.
        rank: One for all; a site whose basis is smaller is padded with zeros.
        seed: Of PEFT's initialisation and of the frozen random factors.
        name: Of the adapter in PEFT.
        training: `coordinates`, or an ablation.
        alpha: LoRA scaling is alpha / rank; None is 1.
        host: The PeftModel to add to, where the model has one.
    """
    free = max(plan.fold.basis.shape[1] for plan in plans)
    if kind != "none" and training == "coordinates" and rank < free:
        _check_free_side(model, plans, rank)
    peft_model: PeftModel = inject(
        model, host, name, lora_config([plan.name for plan in plans], rank, alpha=alpha), seed=seed
    )
    sites = []
    for plan in plans:
        module = model.get_submodule(plan.name)
        if kind == "none" or training in FREE:
            sites.append(_free_factors(plan, module, name, training))
        elif training == "train_both_factors":
            sites.append(_both_factors(plan, module, name))
        elif rank >= free:
            sites.append(_full_rank(plan, module, name, rank))
        else:
            sites.append(_low_rank(plan, module, name, rank, seed))
    return peft_model, tuple(sites)


def _free_factors(plan: SitePlan, module: Any, name: str, training: str) -> LoraSite:
    """PEFT's own LoRA. With `project_gradient` a reader's random A starts inside the span, as B = 0 does."""
    trained = {which: getattr(module, which)[name].weight for which in FACTORS}
    if training == "project_gradient" and plan.role == "read":
        basis = plan.fold.basis.to(trained["lora_A"])
        with torch.no_grad():
            trained["lora_A"].copy_((trained["lora_A"] @ basis) @ basis.T)
    return LoraSite(plan, module, trained, {}, name)


def _full_rank(plan: SitePlan, module: Any, name: str, rank: int) -> LoraSite:
    frozen_name, trained_name = sides(plan.role)
    frozen, trained = (getattr(module, which)[name].weight for which in (frozen_name, trained_name))
    basis = _padded(plan.fold.basis, rank)
    with torch.no_grad():
        frozen.copy_(basis if plan.role == "write" else basis.T)
        trained.zero_()
    frozen.requires_grad_(False)
    return LoraSite(plan, module, {trained_name: trained}, {frozen_name: frozen.detach().float().clone()}, name)


def _low_rank(plan: SitePlan, module: Any, name: str, rank: int, seed: int) -> LoraSite:
    trained_name, frozen_name = sides(plan.role)
    frozen = getattr(module, frozen_name)[name].weight
    with torch.no_grad():
        frame = random_frame(max(frozen.shape), rank, f"{seed} {plan.name}")
        frozen.copy_(frame.T if frozen_name == "lora_A" else frame)
    frozen.requires_grad_(False)
    k = plan.fold.basis.shape[1]
    start = torch.zeros((k, rank) if plan.role == "write" else (rank, k))
    original, basis = _in_span_(plan, module, getattr(module, trained_name)[name], start)
    masters = {frozen_name: frozen.detach().float().clone(), f"{trained_name}.basis": basis}
    return LoraSite(plan, module, {trained_name: original}, masters, name)


def _both_factors(plan: SitePlan, module: Any, name: str) -> LoraSite:
    """A LoRA inside the span: Q_w B A, or B A Q_rᵀ. B starts at 0, A as PEFT's (a reader's in coordinates, A Q_r)."""
    bound, free = sides(plan.role)
    linear = getattr(module, bound)[name]
    with torch.no_grad():
        weight, span = linear.weight.double(), plan.fold.basis.to(linear.weight.device)
        start = span.T @ weight if plan.role == "write" else weight @ span
    original, basis = _in_span_(plan, module, linear, start)
    trained = {bound: original, free: getattr(module, free)[name].weight}
    return LoraSite(plan, module, {which: trained[which] for which in FACTORS}, {f"{bound}.basis": basis}, name)


def _in_span_(plan: SitePlan, module: Any, linear: Any, start: Tensor) -> tuple[nn.Parameter, Tensor]:
    """Parametrise a factor by its coordinates; returns them and the float32 master of the basis."""
    from torch.nn.utils import parametrize

    basis = plan.fold.basis.to(linear.weight)
    linear.weight = nn.Parameter(start.to(basis))
    side = "columns" if plan.role == "write" else "rows"
    factor = SpanFactor(basis, side)
    parametrize.register_parametrization(linear, "weight", factor, unsafe=True)
    factor.hold_during_(module)
    return linear.parametrizations.weight.original, basis.float().clone()


def _padded(basis: Float[Tensor, "d_model k"], rank: int) -> Float[Tensor, "d_model rank"]:
    return torch.nn.functional.pad(basis, (0, rank - basis.shape[1]))


def _check_free_side(model: nn.Module, plans: Sequence[SitePlan], rank: int) -> None:
    for plan in plans:
        linear: Any = model.get_submodule(plan.name)
        width = linear.in_features if plan.role == "write" else linear.out_features
        if rank > width:
            raise FeatclError(f"{plan.name} has only {width} dimensions on its free side, too few for rank {rank}")


def random_frame(width: int, rank: int, purpose: str) -> Float[Tensor, "width rank"]:
    """Seeded orthonormal columns."""
    generator = torch.Generator().manual_seed(int(files.digest_bytes(purpose.encode())[:15], 16))
    return torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]
