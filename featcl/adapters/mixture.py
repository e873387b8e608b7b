"""A mixture of LoRA experts beside every adapted linear, chosen token by token.

    y = W x + Σ_e g_e(x) B_e A_e x,     g(x) = softmax over the `top` largest of G x, 0 elsewhere

x is the linear's own input at a token. A_e and G are random at the start and B_e = 0, so the first step starts from the
base model; all three are trained. Since G differs from 0, tokens that differ take different experts from the first step
on, and a new task changes the experts that its own tokens take.

The update depends on the token, so it is no LoRA and cannot be merged. It is a rival, not a constraint by features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl import files
from featcl.adapters.adapter import DEFAULT_NAME, adapters_of
from featcl.adapters.experts import MixtureSite
from featcl.adapters.norms import product_square, summed
from featcl.adapters.peft_host import lora_modules
from featcl.adapters.unbounded import UnboundedAdapter
from featcl.errors import FeatclError
from featcl.models import Site, inner_model, residual_map

WEIGHTS, FORMAT = "mixture.safetensors", 1
TRAINED = ("A", "B", "G")


class MixtureAdapter(UnboundedAdapter):
    """Experts and gates, trained together; made by `constrain_mixture`.

    Attributes:
        sites: The experts of every adapted linear, block by block.
    """

    def __init__(self, model: Any, sites: Sequence[MixtureSite], *, name: str = DEFAULT_NAME) -> None:
        self.sites = tuple(sites)
        super().__init__(inner_model(model), kind="mixture", rank=sites[0].A.shape[1], name=name)
        self.model.requires_grad_(False)

    # --- where it is

    @property
    def lowest_layer(self) -> int:
        """Lowest adapted block."""
        return min(site.site.layer for site in self.sites)

    @property
    def top_layer(self) -> int:
        """Highest adapted block."""
        return max(site.site.layer for site in self.sites)

    @property
    def linear(self) -> bool:
        """Never: G, A and B enter as a product."""
        return False

    # --- what is trained

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{site.name}.{which}", getattr(site, which)) for site in self.sites for which in TRAINED]

    def distance_squared(self) -> Float[Tensor, ""]:
        """Σ_e ‖B_e A_e‖² with its gradient: all experts of all sites, as if every gate were 1."""
        return summed([product_square(a, b) for site in self.sites for a, b in site.factors()])

    @torch.no_grad()
    def delta_norm(self) -> float:
        """√Σ_e ‖B_e A_e‖² (Frobenius) over all experts of all sites; gates are left out."""
        pairs = [pair for site in self.sites for pair in site.factors()]
        return sum(max(0.0, float(product_square(a.double(), b.double()))) for a, b in pairs) ** 0.5

    # --- the switch

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        for site in self.sites:
            site.off += 1
        try:
            yield
        finally:
            for site in self.sites:
                site.off -= 1

    def restore_(self) -> None:
        """Move the experts to the device of their linear; `.to(torch.bfloat16)` does not reach them."""
        for site in self.sites:
            site.to(next(self.model.get_submodule(site.name).parameters()).device)

    def remove(self) -> Any:
        """Take the hooks off; returns the Hugging Face model, which can be constrained anew."""
        for site in self.sites:
            site.detach_()
        self._forget_()
        return self.model

    # --- what it is not

    def merge(self) -> Any:
        """Not possible.

        Raises:
            FeatclError: Always.
        """
        raise FeatclError(
            "kind 'mixture' cannot be merged: its update depends on the token; keep the folder that `save` writes"
        )

    # --- export

    def save(self, folder: str | Path) -> None:
        """Write `mixture.safetensors`; `load_mixture` reads it, and the same adapter gives the same bytes."""
        from safetensors.torch import save

        shape = {"experts": len(self.sites[0].G), "rank": self.rank, "top": self.sites[0].top}
        facts = {"format": FORMAT, "sites": [site.name for site in self.sites], **shape}
        state = {name: tensor.cpu().contiguous() for name, tensor in self.coordinates().items()}
        files.write_bytes(Path(folder) / WEIGHTS, save(state, metadata={"mixture": json.dumps(facts, sort_keys=True)}))


def constrain_mixture(
    model: nn.Module,
    *,
    layers: Sequence[int],
    experts: int = 4,
    top: int = 2,
    rank: int = 8,
    modules: Sequence[str] | None = None,
    seed: int = 0,
    name: str = DEFAULT_NAME,
) -> MixtureAdapter:
    """Put a mixture of experts beside every reader and writer of some blocks.

    Args:
        model: A model without adapters; it stays as it is.
        layers: Blocks to adapt.
        experts: How many per linear.
        top: How many of them act on a token.
        rank: Of an expert.
        modules: Short names to keep, such as `down_proj`; all by default.
        seed: Of A and G.
        name: Of the adapter.

    Raises:
        FeatclError: If the model has an adapter, a layer or module is unknown, or a number out of range.

    Source: Zadouri et al. 2023, arXiv:2309.05444 (MoLoRA: a gate of each token over LoRA experts), with
    the `top` gates of Shazeer et al. 2017, arXiv:1701.06538, eqs. 3 and 5 without noise. SMoLoRA (Wang et al. 2024,
    arXiv:2411.13949) has two such banks, of which one is chosen by the image and one by the instruction, one expert of
    each for a whole sequence; with text alone there is one bank, and the gate is each token's.
    """
    causal = _alone(model)
    if not 1 <= top <= experts or rank < 1:
        raise FeatclError(f"mixture: top {top} is not between 1 and experts {experts}, or rank {rank} is below 1")
    sites = _sites(causal, layers, modules)
    linears: dict[str, Any] = {site.name: causal.get_submodule(site.name) for site in sites}
    narrow = min(min(linear.weight.shape) for linear in linears.values())
    if rank > narrow:
        raise FeatclError(f"mixture: rank {rank} is above {narrow}, the width of the narrowest linear")
    made = [MixtureSite(site, linears[site.name], experts=experts, rank=rank, top=top, seed=seed) for site in sites]
    return MixtureAdapter(causal, made, name=name)


def _alone(model: nn.Module) -> Any:
    """The Hugging Face model, which has no adapter yet."""
    causal = inner_model(model)
    if adapters_of(causal) or lora_modules(causal):
        raise FeatclError("kind 'mixture' cannot stand beside other adapters: take them off first (adapter.remove())")
    return causal


def _sites(causal: Any, layers: Sequence[int], modules: Sequence[str] | None) -> list[Site]:
    residual = residual_map(causal)
    if wrong := sorted(set(layers) - set(range(residual.n_layers))):
        raise FeatclError(f"layer {wrong[0]} is out of range: the model has blocks 0 to {residual.n_layers - 1}")
    found = [site for site in (*residual.writers, *residual.readers) if site.layer in set(layers)]
    have = sorted({site.name.rsplit(".", 1)[1] for site in found})
    if modules is not None and (unknown := sorted(set(modules) - set(have))):
        raise FeatclError(f"kind 'mixture' has no module {unknown[0]!r}: it adapts {', '.join(have)}")
    kept = [site for site in found if modules is None or site.name.rsplit(".", 1)[1] in set(modules)]
    if not kept:
        raise FeatclError("no modules to adapt: the list is empty")
    return sorted(kept, key=lambda site: site.layer)


def load_mixture(folder: str | Path, model: nn.Module, *, name: str = DEFAULT_NAME) -> MixtureAdapter:
    """Put a saved mixture on a model: logits are bit-equal to those of the one that was saved.

    Args:
        folder: What `MixtureAdapter.save` wrote.
        model: The model that it was trained on, without adapters.
        name: Of the adapter.

    Raises:
        FeatclError: If the folder holds something else, or does not fit the model.
    """
    from safetensors import SafetensorError, safe_open

    causal, path = _alone(model), Path(folder) / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["mixture"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FeatclError(f"{path} does not hold a saved mixture: {type(error).__name__}: {error}") from error
    if facts["format"] != FORMAT:
        raise FeatclError(f"{path}: saved in format {facts['format']}, this version reads format {FORMAT}")
    residual = residual_map(causal)
    known = {site.name: site for site in (*residual.writers, *residual.readers)}
    if missing := [site for site in facts["sites"] if site not in known]:
        raise FeatclError(f"{path}: the model has no linear {missing[0]}, which the mixture adapts")
    shape = {key: facts[key] for key in ("experts", "rank", "top")}
    made = [MixtureSite(known[site], causal.get_submodule(site), seed=0, **shape) for site in facts["sites"]]
    adapter = MixtureAdapter(causal, made, name=name)
    try:
        adapter.load_coordinates_(tensors)
    except FeatclError as error:
        adapter.remove()
        raise FeatclError(f"{path} does not fit the model: {error}") from error
    return adapter
