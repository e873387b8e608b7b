"""The constraint as PEFT's own LoRA: one factor is the frozen basis, the other holds the trained coordinates.

| role  | rank == k                   | rank < k                                                   |
|-------|-----------------------------|------------------------------------------------------------|
| write | lora_B = Q_w, lora_A = C    | lora_B = Q_w C₂, lora_A = A frozen, row-orthonormal        |
| read  | lora_A = Q_rᵀ, lora_B = C   | lora_A = C₂ Q_rᵀ, lora_B = P frozen, column-orthonormal    |

C and C₂ are 0 at the start. The product with C₂ is formed anew whenever the weight is read, so it is never stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl import files
from featcl.adapters.plan import SitePlan
from featcl.errors import FeatclError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER = "default"
FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, eq=False)
class LoraSite:
    """One adapted linear layer.

    Attributes:
        plan: What it was made from.
        module: PEFT's LoRA layer in the model.
        trained: Trained tensors by name: one for the constrained kinds, both factors for `none`.
        frozen: Float32 master copies of the frozen tensors by name, safe from `.to(bfloat16)`.
    """

    plan: SitePlan
    module: Any
    trained: dict[str, nn.Parameter]
    frozen: dict[str, Tensor]

    @property
    def name(self) -> str:
        """Full module path in the model."""
        return self.plan.name

    def factor(self, which: str) -> nn.Module:
        """PEFT's `lora_A` or `lora_B` linear."""
        return getattr(self.module, which)[ADAPTER]

    def factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """(A, B) in float32 with ΔW = B A, detached; frozen parts from their master copies."""
        with torch.no_grad():
            return self._weight("lora_A"), self._weight("lora_B")

    def _weight(self, which: str) -> Tensor:
        if which in self.frozen:
            return self.frozen[which]
        weight = self.trained[which].detach().float()
        basis = self.frozen.get(f"{which}.basis")
        if basis is None:
            return weight
        return basis @ weight if which == "lora_B" else weight @ basis.T

    def restore_(self) -> None:
        """Put the float32 masters back into the model and make the coordinates float32 again."""
        for which in FACTORS:
            linear: Any = self.factor(which)
            if which in self.frozen:
                linear.weight.data = self.frozen[which].clone()
            else:
                self.trained[which].data = self.trained[which].data.float()
            if (basis := self.frozen.get(f"{which}.basis")) is not None:
                linear.parametrizations.weight[0].basis = basis.clone()


class SpanFactor(nn.Module):
    """Parametrisation of a LoRA factor that can only move in a span: `Q C₂` as columns, `C₂ Qᵀ` as rows."""

    basis: Tensor

    def __init__(self, basis: Float[Tensor, "d_model k"], side: Literal["columns", "rows"]) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, coordinates: Tensor) -> Tensor:
        """The factor's weight for these coordinates."""
        return self.basis @ coordinates if self.side == "columns" else coordinates @ self.basis.T


def attach(
    model: Any, plans: Sequence[SitePlan], *, kind: str, rank: int, seed: int
) -> tuple[PeftModel, tuple[LoraSite, ...]]:
    """Put PEFT LoRA layers into the model and fix what the constraint fixes.

    Args:
        model: The Hugging Face model; its linears are replaced in place, as PEFT does.
        plans: The linears.
        kind: `none` keeps PEFT's own initialisation (seeded) and trains both factors.
        rank: One for all; a site whose basis is smaller is padded with zeros.
        seed: Of PEFT's initialisation and of the frozen random factors.
    """
    from peft import get_peft_model

    free = max(plan.fold.basis.shape[1] for plan in plans)
    if kind != "none" and rank < free:
        _check_free_side(model, plans, rank)
    config = lora_config([plan.name for plan in plans], rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model: Any = get_peft_model(model, config)
    sites = []
    for plan in plans:
        module = model.get_submodule(plan.name)
        if kind == "none":
            trained = {which: getattr(module, which)[ADAPTER].weight for which in FACTORS}
            sites.append(LoraSite(plan, module, trained, {}))
        elif rank >= free:
            sites.append(_full_rank(plan, module, rank))
        else:
            sites.append(_low_rank(plan, module, rank, seed))
    return peft_model, tuple(sites)


def lora_config(names: Sequence[str], rank: int) -> LoraConfig:
    """A plain LoRA of one rank with unit scaling on exactly these modules."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(names), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )


def _full_rank(plan: SitePlan, module: Any, rank: int) -> LoraSite:
    frozen_name, trained_name = ("lora_B", "lora_A") if plan.role == "write" else ("lora_A", "lora_B")
    frozen, trained = (getattr(module, which)[ADAPTER].weight for which in (frozen_name, trained_name))
    basis = _padded(plan.fold.basis, rank)
    with torch.no_grad():
        frozen.copy_(basis if plan.role == "write" else basis.T)
        trained.zero_()
    frozen.requires_grad_(False)
    return LoraSite(plan, module, {trained_name: trained}, {frozen_name: frozen.detach().float().clone()})


def _low_rank(plan: SitePlan, module: Any, rank: int, seed: int) -> LoraSite:
    from torch.nn.utils import parametrize

    frozen_name, trained_name = ("lora_A", "lora_B") if plan.role == "write" else ("lora_B", "lora_A")
    frozen, linear = getattr(module, frozen_name)[ADAPTER].weight, getattr(module, trained_name)[ADAPTER]
    with torch.no_grad():
        frame = _random_frame(max(frozen.shape), rank, f"{seed} {plan.name}")
        frozen.copy_(frame.T if frozen_name == "lora_A" else frame)
    frozen.requires_grad_(False)
    basis = plan.fold.basis.to(linear.weight)
    k, side = basis.shape[1], "columns" if plan.role == "write" else "rows"
    shape = (k, rank) if plan.role == "write" else (rank, k)
    linear.weight = nn.Parameter(torch.zeros(shape, dtype=basis.dtype, device=basis.device))
    parametrize.register_parametrization(linear, "weight", SpanFactor(basis, side), unsafe=True)
    masters = {frozen_name: frozen.detach().float().clone(), f"{trained_name}.basis": basis.float().clone()}
    return LoraSite(plan, module, {trained_name: linear.parametrizations.weight.original}, masters)


def _padded(basis: Float[Tensor, "d_model k"], rank: int) -> Float[Tensor, "d_model rank"]:
    return torch.nn.functional.pad(basis, (0, rank - basis.shape[1]))


def _check_free_side(model: nn.Module, plans: Sequence[SitePlan], rank: int) -> None:
    for plan in plans:
        linear: Any = model.get_submodule(plan.name)
        width = linear.in_features if plan.role == "write" else linear.out_features
        if rank > width:
            raise FeatclError(f"{plan.name} has only {width} dimensions on its free side, too few for rank {rank}")


def _random_frame(width: int, rank: int, purpose: str) -> Float[Tensor, "width rank"]:
    """Seeded orthonormal columns."""
    generator = torch.Generator().manual_seed(int(files.digest_bytes(purpose.encode())[:15], 16))
    return torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]
