"""A constrained adapter on a model: its coordinates, its switch, its measurements, its export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from featcl.adapters.export import merged_copy, save_peft
from featcl.adapters.leak import LeakReport, measure_leak
from featcl.adapters.lora import LoraSite
from featcl.adapters.report import FeatureReport, feature_report, squared_norm
from featcl.errors import FeatclError


class ConstrainedAdapter:
    """A LoRA whose frozen factor spans the chosen directions; only coordinates are trained.

    Attributes:
        model: The PeftModel; it shares the weights of the model that `constrain` was given.
        kind: `none`, `write`, `read` or `both`.
        rank: LoRA rank, the same at every site.
        sites: The adapted linears, block by block.
    """

    def __init__(self, model: Any, sites: tuple[LoraSite, ...], *, kind: str, rank: int) -> None:
        self.model = model
        self.sites = sites
        self.kind = kind
        self.rank = rank

    def __repr__(self) -> str:
        numbers = sum(parameter.numel() for parameter in self.parameters())
        layers = f"{self.lowest_layer}-{self.top_layer}"
        return (
            f"ConstrainedAdapter(kind={self.kind!r}, rank={self.rank}, layers={layers}, sites={len(self.sites)}, "
            f"trained={numbers:,}, delta_norm={self.delta_norm():.4g})"
        )

    @property
    def lowest_layer(self) -> int:
        """Lowest adapted block: nothing below it is ever in the autograd graph."""
        return min(site.plan.site.layer for site in self.sites)

    @property
    def top_layer(self) -> int:
        """Highest adapted block."""
        return max(site.plan.site.layer for site in self.sites)

    @property
    def hook_layer(self) -> int:
        """Block at whose output the directions live; the topmost, where there are several sets."""
        return max(site.plan.hook_layer for site in self.sites)

    @property
    def exempt(self) -> tuple[str, ...]:
        """Modules whose norm has a gain that could not be inverted, for which the constraint is not exact."""
        return tuple(site.name for site in self.sites if site.plan.fold.clamped)

    # --- what is trained

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors, in a fixed order: hand them to an optimizer."""
        return [parameter for _, parameter in self._named()]

    def coordinates(self) -> dict[str, Tensor]:
        """Copies of the trained tensors by name, detached."""
        return {name: parameter.detach().clone() for name, parameter in self._named()}

    @torch.no_grad()
    def load_coordinates_(self, coordinates: Mapping[str, Tensor]) -> None:
        """Overwrite the trained tensors with what `coordinates` returned.

        Raises:
            FeatclError: If a name is missing or unknown, or a shape differs; nothing is changed then.
        """
        named = dict(self._named())
        if differ := sorted(set(named) ^ set(coordinates)):
            where = "lack" if differ[0] in named else "hold the unknown"
            raise FeatclError(f"the coordinates {where} {differ[0]}: they belong to another adapter")
        for name, parameter in named.items():
            if parameter.shape != coordinates[name].shape:
                raise FeatclError(f"{name} is {list(coordinates[name].shape)}, here it is {list(parameter.shape)}")
        for name, parameter in named.items():
            parameter.copy_(coordinates[name])

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{site.name}.{which}", tensor) for site in self.sites for which, tensor in site.trained.items()]

    # --- the switch

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the block: logits bit-equal to a model that was never adapted.

        PEFT's own switch sets `requires_grad` on every LoRA tensor when it is turned back on, which would unfreeze the
        basis; the flags are put back as they were. Blocks may be nested.
        """
        was_on = [site.module for site in self.sites if not site.module.disable_adapters]
        flags = [(tensor, tensor.requires_grad) for module in was_on for tensor in module.parameters()]
        try:
            for module in was_on:
                module.enable_adapters(False)
            yield
        finally:
            for module in was_on:
                module.enable_adapters(True)
            for tensor, flag in flags:
                tensor.requires_grad_(flag)

    def restore_(self) -> None:
        """Put the float32 bases back, after `.to(torch.bfloat16)` or the like has rounded them in the live model."""
        for site in self.sites:
            site.restore_()

    def remove(self) -> Any:
        """Take the adapter off; returns the plain base model, which can be constrained anew."""
        base = self.model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config
        return base.requires_grad_(False)

    # --- what it does

    def delta_norms(self) -> dict[str, float]:
        """‖ΔW‖ (Frobenius) of every site, from the factors."""
        return {site.name: squared_norm(*site.factors()) ** 0.5 for site in self.sites}

    def delta_norm(self) -> float:
        """‖ΔW‖ (Frobenius) of all sites together."""
        return sum(norm**2 for norm in self.delta_norms().values()) ** 0.5

    def leak(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None = None,
    ) -> LeakReport:
        """How much of what is written lies outside the chosen span, on this batch.

        Args:
            input_ids: Token ids.
            attention_mask: 1 where there is a token; without it every position counts as one.

        Returns:
            NaN, never 0, for an adapter that has not moved.

        Raises:
            FeatclError: If no token counts, or the adapter is switched off.
        """
        return measure_leak(self, input_ids, attention_mask)

    def report(self, top: int = 20) -> FeatureReport:
        """The `top` features that the update writes, and the `top` that it reads, strongest first."""
        return feature_report(self.sites, self.delta_norm(), top=top)

    # --- export

    def save(self, folder: str | Path) -> None:
        """Write a plain PEFT folder; `PeftModel.from_pretrained` loads it without featcl."""
        save_peft(folder, self.model, self.sites)

    def merge(self) -> Any:
        """A plain Hugging Face model with the update merged into a copy; this one stays as it is."""
        return merged_copy(self.model, self.sites)
