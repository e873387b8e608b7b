"""How an SAE is trained: the settings, completed from the model and checked."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from featcl.errors import FeatclError
from featcl.features.saelens import ARCHITECTURES
from featcl.features.shuffled import Windows
from featcl.models import max_context

SITES = {
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_z": "blocks.{}.attn.hook_z",
}


@dataclass(frozen=True)
class SAESettings:
    """How an SAE is trained. None is filled in from the hook's width d: d_sae = 8 d, l0 = d / 5.

    Attributes:
        site: `resid_post` (the output of a block), `mlp_out` (what its MLP adds) or `attn_z` (its heads, before W_O).
        architecture: `batchtopk` (saved as JumpReLU), `topk`, `jumprelu` or `matryoshka_batchtopk`.
        d_sae: Number of features.
        l0: Active features per token, on average.
        tokens: How many activations are trained on; a shorter text is repeated.
        batch_size: Activations per step.
        lr: Adam's, constant, then linear to zero over the last 40 %.
        context: Longest window of tokens; None is the model's, at most 512.
        storage: `float32`, or `bfloat16` for half the file.
        seed: Of initial weights and shuffling.
    """

    site: str = "resid_post"
    architecture: str = "batchtopk"
    d_sae: int | None = None
    l0: float | None = None
    tokens: int = 1_000_000
    batch_size: int = 1024
    lr: float = 3e-3
    context: int | None = None
    storage: str = "float32"
    seed: int = 0


def given(options: dict[str, Any]) -> SAESettings:
    """Settings from options, as given."""
    known = {item.name for item in fields(SAESettings)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise FeatclError(f"SAE training has no option {unknown[0]!r}: one of {', '.join(sorted(known))}")
    settings = SAESettings(**{name: value for name, value in options.items() if value is not None})
    if settings.site not in SITES:
        raise FeatclError(f"SAE site {settings.site!r} is unknown: one of {', '.join(SITES)}")
    if settings.d_sae is not None and settings.d_sae < 1:
        raise FeatclError(f"d_sae = {settings.d_sae} must be at least 1")
    if settings.context is not None and settings.context < 2:
        raise FeatclError(f"context = {settings.context} must be at least 2 tokens")
    return settings


def complete(settings: SAESettings, model: Any, d_in: int) -> SAESettings:
    """What was left open, from the hook's width and the model's context."""
    implied = settings.l0 is None
    defaults = {"d_sae": 8 * d_in, "l0": d_in / 5, "context": min(512, max_context(model))}
    settings = replace(settings, **{name: value for name, value in defaults.items() if getattr(settings, name) is None})
    if settings.architecture not in ARCHITECTURES:
        raise FeatclError(f"SAE architecture {settings.architecture!r} is unknown: {', '.join(ARCHITECTURES)}")
    if implied and not settings.l0 < settings.d_sae:  # type: ignore[operator]
        raise FeatclError(
            f"d_sae = {settings.d_sae} is too small for the default l0 = {settings.l0}: raise it, or give l0 as well"
        )
    if not 1 <= settings.l0 < settings.d_sae:  # type: ignore[operator]
        raise FeatclError(f"l0 = {settings.l0} must lie between 1 and d_sae = {settings.d_sae}")
    if settings.storage not in ("float32", "bfloat16"):
        raise FeatclError(f"storage {settings.storage!r} is unknown: float32 or bfloat16")
    if min(settings.tokens, settings.batch_size) < 1 or not settings.lr > 0:
        raise FeatclError("tokens, batch_size and lr must be positive")
    return settings


def fit_batch(settings: SAESettings, windows: Windows) -> SAESettings:
    total = sum(len(window) - 1 for window in windows)
    if total < 256:
        raise FeatclError(
            f"{total} tokens of text are too few to train an SAE on: at least 256 are needed, better 100 000"
        )
    return replace(settings, batch_size=min(settings.batch_size, total))
