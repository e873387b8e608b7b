"""OSF: all of a weight is trained but its largest singular directions, through PEFT's own tuner.

    W₀ = U_h S_h V_hᵀ + U_l S_l V_lᵀ,     ΔW = U S Vᵀ - U_l S_l V_lᵀ,     U ⊥ U_h, V ⊥ V_h

with U, S, V starting at the low part. PEFT projects the gradients of U and V. That holds the constraint under plain SGD
alone: AdamW's element-wise scaling turns the step out of it. So U and V themselves are projected after every step here,
which is exact for every optimizer.

It is a rival, not a constraint by features: it writes along none and reads none, so it has no leak and no report.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl.adapters.adapter import DEFAULT_NAME, adapters_of, forget_adapters_
from featcl.adapters.unbounded import UnboundedAdapter
from featcl.errors import FeatclError
from featcl.models import inner_model, residual_map

TRAINED = ("U_low", "S_low", "V_low")


class OsfAdapter(UnboundedAdapter):
    """The low singular part of some weights, trained; made by `constrain_osf`.

    Attributes:
        layers: PEFT's OSF layers by module path.
        blocks: The block of each.
    """

    def __init__(self, model: Any, layers: dict[str, Any], blocks: dict[str, int], *, name: str) -> None:
        self.layers, self.blocks = layers, blocks
        rank = max(layer.osf_svd_params[name]["S_low"].numel() for layer in layers.values())
        super().__init__(model, kind="osf", rank=rank, name=name)

    # --- where it is

    @property
    def lowest_layer(self) -> int:
        """Lowest adapted block."""
        return min(self.blocks.values())

    @property
    def top_layer(self) -> int:
        """Highest adapted block."""
        return max(self.blocks.values())

    @property
    def linear(self) -> bool:
        """Never: U, S and V enter as a product."""
        return False

    # --- what is trained

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{name}.{which}", layer.osf_svd_params[self.name][which])
            for name, layer in self.layers.items()
            for which in TRAINED
        ]

    @torch.no_grad()
    def after_step_(self) -> None:
        """U ← U - U_h U_hᵀ U and V ← V - V V_hᵀ V_h, whatever the optimizer did."""
        for layer in self.layers.values():
            parts = layer.osf_svd_params[self.name]
            u, v = parts["U_low"], parts["V_low"]
            u.copy_(self._clear(u, layer._osf_U_high, layer._osf_U_low_init))
            v.copy_(self._clear(v.T, layer._osf_V_high, layer._osf_V_low_init, rows=True).T)

    def _clear(self, columns: Tensor, high: Any, low: Any, *, rows: bool = False) -> Tensor:
        """The part of columns outside the high subspace; where PEFT keeps no basis of it, the low one's is its rest."""
        outside = self.name in high
        basis = (high if outside else low)[self.name].double()
        basis = basis.T if rows else basis
        inside = basis @ (basis.T @ columns.double())
        return (columns.double() - inside if outside else inside).to(columns.dtype)

    def delta(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """ΔW of one module."""
        return self.layers[name].get_delta_weight(self.name).detach().float()

    def distance_squared(self) -> Float[Tensor, ""]:
        """‖ΔW‖² with its gradient."""
        return torch.stack([layer.get_delta_weight(self.name).square().sum() for layer in self.layers.values()]).sum()

    def delta_norm(self) -> float:
        """‖ΔW‖ (Frobenius) of all modules together."""
        return sum(float(self.delta(name).double().square().sum()) for name in self.layers) ** 0.5

    # --- the switch

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        before = [(layer, layer.disable_adapters) for layer in self.layers.values()]
        flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        try:
            for layer, _ in before:
                layer.enable_adapters(False)
            yield
        finally:
            for layer, off in before:
                layer.enable_adapters(not off)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def remove(self) -> Any:
        """Take the adapter off; returns the Hugging Face model."""
        base = inner_model(self.model)
        self._forget_()
        self.model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config
        return base.requires_grad_(False)

    # --- export

    def save(self, folder: str | Path) -> None:
        """Write PEFT's own OSF folder."""
        self.model.save_pretrained(str(folder))

    def merge(self) -> Any:
        """A plain Hugging Face model with W + ΔW in a copy; this one stays as it is."""
        plain: Any = copy.deepcopy(self.model).unload()
        if hasattr(plain, "peft_config"):
            del plain.peft_config
        forget_adapters_(plain)
        with torch.no_grad():
            for name in self.layers:
                weight = plain.get_submodule(name).weight
                weight.copy_(weight.float() + self.delta(name))
        return plain


def constrain_osf(
    model: nn.Module, *, layers: Sequence[int], preserved: int | float = 0.5, name: str = DEFAULT_NAME
) -> OsfAdapter:
    """Train the low singular part of every reader and writer of some blocks.

    Args:
        model: A model without other adapters; PEFT replaces its linears in place.
        layers: Blocks to adapt.
        preserved: Largest singular directions of each weight that are kept: how many, or a share of all, below 1.
        name: Of the adapter.

    Raises:
        FeatclError: If the model has an adapter, a layer is out of range, or nothing or all of a weight would be kept.

    Source: Nayak et al. 2025, arXiv:2504.07097 (Sculpting Subspaces), as PEFT 0.21 has it.
    """
    from peft import OSFConfig, get_peft_model
    from peft.tuners.osf import OSFLayer

    if adapters_of(model):
        raise FeatclError("kind 'osf' cannot stand beside other adapters: take them off first (adapter.remove())")
    residual = residual_map(model)
    if wrong := sorted(set(layers) - set(range(residual.n_layers))):
        raise FeatclError(f"layer {wrong[0]} is out of range: the model has blocks 0 to {residual.n_layers - 1}")
    sites = [site for site in (*residual.writers, *residual.readers) if site.layer in set(layers)]
    small = min((min(inner_model(model).get_submodule(site.name).weight.shape) for site in sites), default=0)
    kept = int(small * preserved) if isinstance(preserved, float) else preserved
    if not 1 <= kept < small:
        raise FeatclError(
            f"osf: {preserved} would keep {kept} of {small} singular directions; 1 to {small - 1} is right"
        )
    config = OSFConfig(effective_rank=preserved, target_modules=[site.name for site in sites])
    peft_model = get_peft_model(inner_model(model), config, adapter_name=name)
    modules = {site.name: inner_model(peft_model).get_submodule(site.name) for site in sites}
    assert all(isinstance(module, OSFLayer) for module in modules.values())
    return OsfAdapter(peft_model, modules, {site.name: site.layer for site in sites}, name=name)
