"""Full fine-tuning: the weights of the blocks themselves are trained, behind what every adapter has.

    W = W₀ + ΔW,     trained: W of every linear and norm of the chosen blocks

One copy of the trained weights' W₀ is kept aside; the switch exchanges the two in place, without copying, so that the
base is bit-equal and costs no time. Coordinates are the weights W: weight decay pulls them to zero, as in ordinary
fine-tuning, not to W₀ (the method l2_to_start does that).

The output head stands still, and input embeddings that are tied to it with it (Gemma): whatever compares two models
here (trust region, anchors, distillation) compares their last hidden states through one head.

It is a rival, not a constraint by features: it writes along none and reads none, so it has no leak and no report.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl.adapters.adapter import DEFAULT_NAME, adapters_of, forget_adapters_
from featcl.adapters.norms import summed
from featcl.adapters.peft_host import lora_modules
from featcl.adapters.unbounded import UnboundedAdapter
from featcl.errors import FeatclError
from featcl.models import blocks, inner_model

EXACT = (torch.float32, torch.float64)


class TrainedWeight:
    """One weight of the model, and its other value, which is not in the model now.

    Attributes:
        name: Full path in the model.
        layer: Its block; None outside of the blocks.
        parameter: In the model: W, or W₀ while the adapter is switched off.
        aside: The other one.
    """

    def __init__(self, name: str, layer: int | None, parameter: nn.Parameter) -> None:
        self.name, self.layer, self.parameter = name, layer, parameter
        self.aside = parameter.detach().clone()

    def exchange_(self) -> None:
        """Put what is aside into the model and what is in the model aside; no number is copied."""
        self.parameter.data, self.aside = self.aside, self.parameter.data


class FullAdapter(UnboundedAdapter):
    """All weights of some blocks, trained; made by `constrain_full`.

    Attributes:
        sites: The trained weights, in the order of the model.
        blocks: Indices of the trained blocks, lowest first.
    """

    def __init__(self, model: Any, sites: Sequence[TrainedWeight], *, name: str = DEFAULT_NAME) -> None:
        self.sites = tuple(sites)
        self.blocks = sorted({site.layer for site in sites if site.layer is not None})
        rank = max(min(site.parameter.shape) for site in sites if site.parameter.ndim == 2)
        super().__init__(inner_model(model), kind="full", rank=rank, name=name)
        self._off = 0
        self._flags: list[bool] = []
        self.model.requires_grad_(False)
        for site in sites:
            site.parameter.requires_grad_(True)
        # a hook that does nothing tells `trunk_end` that the blocks below, and no others, go on computing the same
        self._mark = blocks(self.model)[self.lowest_layer].register_forward_pre_hook(_changes_here)

    # --- where it is

    @property
    def lowest_layer(self) -> int:
        """Lowest trained block."""
        return self.blocks[0]

    @property
    def top_layer(self) -> int:
        """Highest trained block."""
        return self.blocks[-1]

    # --- what is trained

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(site.name, site.parameter) for site in self.sites]

    def coordinates(self) -> dict[str, Tensor]:
        """Copies of the trained weights by name, detached."""
        with self._switched_on():
            return super().coordinates()

    @torch.no_grad()
    def load_coordinates_(self, coordinates: Mapping[str, Tensor]) -> None:
        """Overwrite the trained weights with what `coordinates` returned.

        Raises:
            FeatclError: If a name is missing or unknown, or a shape differs; nothing is changed then.
        """
        with self._switched_on():
            super().load_coordinates_(coordinates)

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(name, ΔW = W - W₀) of every weight, float32, one at a time."""
        for site in self.sites:
            own, base = (site.aside, site.parameter) if self._off else (site.parameter, site.aside)
            yield site.name, (own - base).detach().float()

    def distance_squared(self) -> Float[Tensor, ""]:
        """‖ΔW‖² with its gradient."""
        with self._switched_on():
            return summed([(site.parameter - site.aside).float().square().sum() for site in self.sites])

    def delta_norms(self) -> dict[str, float]:
        """‖ΔW‖ (Frobenius) of every weight."""
        return {name: float(delta.double().norm()) for name, delta in self.deltas()}

    def delta_norm(self) -> float:
        """‖ΔW‖ (Frobenius) of all weights together."""
        return sum(norm**2 for norm in self.delta_norms().values()) ** 0.5

    # --- the switch

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        self._off += 1
        if self._off == 1:
            self._flags = [site.parameter.requires_grad for site in self.sites]
            self._exchange_([False] * len(self.sites))
        try:
            yield
        finally:
            self._off -= 1
            if self._off == 0:
                self._exchange_(self._flags)

    @contextmanager
    def _switched_on(self) -> Iterator[None]:
        """The trained weights in the model inside the block, also within `disabled()`."""
        off, self._off = self._off, 0
        if off:
            self._exchange_(self._flags)
        try:
            yield
        finally:
            if off:
                self._exchange_([False] * len(self.sites))
            self._off = off

    def _exchange_(self, flags: Sequence[bool]) -> None:
        for site, flag in zip(self.sites, flags, strict=True):
            site.exchange_()
            site.parameter.requires_grad_(flag)

    def restore_(self) -> None:
        """Move what is aside to where the model is; there are no bases to put back."""
        for site in self.sites:
            site.aside = site.aside.to(site.parameter.device)

    def remove(self) -> Any:
        """Put the base weights back, bit for bit; returns the Hugging Face model, which can be constrained anew."""
        self._forget_()
        self._mark.remove()
        if not self._off:
            self._exchange_([False] * len(self.sites))
        return self.model.requires_grad_(False)

    # --- export

    def save(self, folder: str | Path) -> None:
        """Write a plain Hugging Face model folder, without tokenizer; `from_pretrained` loads it without featcl."""
        with self._switched_on():
            self.model.save_pretrained(str(folder))

    def merge(self) -> Any:
        """A plain Hugging Face model with the trained weights; this one stays as it is."""
        with self._switched_on():
            plain: Any = copy.deepcopy(self.model, {id(self): None})  # without what is aside
        forget_adapters_(plain)
        hooks = blocks(plain)[self.lowest_layer]._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _changes_here]:
            del hooks[key]
        return plain.requires_grad_(False)


def _changes_here(_block: nn.Module, _inputs: Any) -> None:
    """Marks the lowest block whose output changes."""


def constrain_full(model: nn.Module, *, layers: Sequence[int] | None = None, name: str = DEFAULT_NAME) -> FullAdapter:
    """Train the weights of a model themselves.

    Args:
        model: A model without adapters, in float32.
        layers: Blocks to train, all their linears and norms. None: all blocks, the last norm, and the input embeddings
            where they are not tied to the output head.
        name: Of the adapter.

    Raises:
        FeatclError: If the model has an adapter, no or unknown layers are asked for, or a weight is not float32.
    """
    causal = inner_model(model)
    if adapters_of(causal) or lora_modules(causal):
        raise FeatclError("kind 'full' cannot stand beside other adapters: take them off first (adapter.remove())")
    found = blocks(causal)
    wanted = range(len(found)) if layers is None else sorted(set(layers))
    if wrong := [layer for layer in wanted if layer not in range(len(found))]:
        raise FeatclError(f"layer {wrong[0]} is out of range: the model has blocks 0 to {len(found) - 1}")
    if not wanted:
        raise FeatclError("no layers to train: the list is empty")
    place = {id(parameter): layer for layer in wanted for parameter in found[layer].parameters()}
    around = _around(causal, found[0]) if layers is None else set()
    chosen = [(key, p) for key, p in causal.named_parameters() if id(p) in place or id(p) in around]
    for key, parameter in chosen:
        if parameter.dtype not in EXACT:
            raise FeatclError(
                f"kind 'full': {key} is {str(parameter.dtype).removeprefix('torch.')}, in which small steps are lost; "
                "load the model in float32"
            )
    return FullAdapter(causal, [TrainedWeight(key, place.get(id(p)), p) for key, p in chosen], name=name)


def _around(causal: Any, block: nn.Module) -> set[int]:
    """What the decoder has besides its blocks, but for what it shares with the output head, by id."""
    path = next(name for name, module in causal.named_modules() if module is block).rsplit(".", 2)[0]
    head = {id(parameter) for parameter in causal.get_output_embeddings().parameters()}
    return {id(parameter) for parameter in causal.get_submodule(path).parameters()} - head
