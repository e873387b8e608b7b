"""Whether an SAE fits where it is used, and if not, why: another layer, the BOS convention, or the scaling.

    fit of an SAE on rows x under a scale c:   x̂ = SAE(c x) / c,   FVU = Σ‖x − x̂‖² / Σ‖x − mean(x)‖²

The FVU alone hides the neighbouring layer, whose stream differs little. So it is compared with what the SAE would reach
at the other layers, with the other BOS convention and with the scalings that trainers use: a clearly better fit
elsewhere is the likely cause of a bad one here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features import hooks
from featcl.features.activations import capture
from featcl.features.hooks import Hook
from featcl.features.tokens import Text, adds_bos, token_batches, token_windows
from featcl.models import max_context, residual_map

SAMPLE_TOKENS = 512
FVU_LIMIT = 0.9
"""Above, an SAE explains next to nothing. Weak ones that are right stay far below: short training gives 0.1 to 0.7."""
CLEARLY_BETTER = 2 / 3
"""Another explanation counts if it leaves at most this share of the FVU, and 0.05 less of it."""

TEXTS = (
    "The committee met on Thursday to discuss the new bridge across the river. Several residents said that the old "
    "one had been closed too often, and that the detour cost them half an hour every morning.",
    "Once upon a time there was a little girl who lived near the forest. One day she found a small brown dog under a "
    "tree. 'Are you lost?' she asked, and the dog wagged its tail.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)",
    "In 1905 Albert Einstein published four papers. They dealt with the photoelectric effect, Brownian motion, "
    "special relativity, and the equivalence of mass and energy.",
    "To make the soup, chop two onions and fry them gently in butter for ten minutes. Add the carrots, a litre of "
    "water and a pinch of salt, and let everything simmer until it is soft.",
    "Thank you for your message. I am sorry that the parcel arrived late; we will refund the postage within three "
    "days. Please let me know whether there is anything else that I can do for you.",
)
"""Ordinary text for the check on loading, where the caller has given none."""


@dataclass(frozen=True)
class Fit:
    """How well an SAE reconstructs some rows: fraction of variance unexplained, and active features per row."""

    fvu: float
    l0: float


@torch.no_grad()
def fit(sae: Any, rows: Float[Tensor, "tokens width"], *, scale: float = 1.0) -> Fit:
    """FVU and L0 of an SAE on activations that are multiplied by `scale` before it and divided by it after."""
    rows = rows.to(sae.W_dec.device, torch.float32)
    error, active = 0.0, 0
    for part in rows.split(max(1, 2**24 // sae.cfg.d_sae)):
        feature_acts = sae.encode(scale * part)
        active += int((feature_acts != 0).sum())
        error += float((sae.decode(feature_acts) / scale - part).double().pow(2).sum())
    variance = float((rows - rows.mean(dim=0)).double().pow(2).sum())
    return Fit(error / variance if variance > 0 else math.nan, active / max(1, len(rows)))


def quick_check(sae: Any, model: Any, tokenizer: Any, texts: Iterable[Text] | None = None) -> Fit:
    """Reconstruct a few hundred tokens and raise if the SAE does not fit; what `load_sae` does when given a model.

    Args:
        sae: A `sae_lens.SAE`.
        model: The causal LM it will be used on.
        tokenizer: Its tokenizer.
        texts: What to read; by default a few sentences of ordinary text.

    Raises:
        FeatclError: If the SAE does not fit the model; the likely cause is named.
    """
    hook, sample = hooks.resolve(model, sae), []
    for _ in remember(TEXTS if texts is None else texts, sample):
        continue
    context = min(512, max_context(model))
    [rows] = _rows(model, tokenizer, sample, [hook], context=context, prepend_bos=sae.cfg.metadata["prepend_bos"])
    found = fit(sae, rows)
    judge(sae, model, tokenizer, sample, hook=hook, found=found, context=context)
    return found


def judge(
    sae: Any, model: Any, tokenizer: Any, texts: Sequence[Text], *, hook: Hook, found: Fit, context: int,
    far_off: bool = False,
) -> None:  # fmt: skip
    """Raise if an SAE does not fit, naming the most likely cause.

    Args:
        sae: A `sae_lens.SAE`.
        model: The causal LM.
        tokenizer: Its tokenizer.
        texts: A sample; `SAMPLE_TOKENS` of it are read again.
        hook: Where the SAE was trained.
        found: What was measured there.
        context: Longest window.
        far_off: Whether other numbers condemn it already.

    Raises:
        FeatclError: If FVU is above `FVU_LIMIT` or not a number, no feature fires, or another explanation fits clearly
            better.
    """
    far_off = far_off or not found.fvu <= FVU_LIMIT or found.l0 == 0
    here, causes = suspects(sae, model, tokenizer, texts, hook=hook, context=context, thorough=far_off)
    likely = [(fvu, cause) for cause, fvu in causes.items() if fvu <= CLEARLY_BETTER * here and fvu <= here - 0.05]
    if not far_off and not likely:
        return
    cause = min(likely)[1] if likely else (
        "none of the usual causes (another layer, BOS, scaling) explains it; was it trained on this model?"
    )  # fmt: skip
    raise FeatclError(
        f"SAE {sae.cfg.metadata['source']} does not fit the model at {hook.spelling}: fraction of variance unexplained "
        f"{found.fvu:.2f}, {found.l0:.1f} active features per token; likely cause: {cause}"
    )


def suspects(
    sae: Any, model: Any, tokenizer: Any, texts: Sequence[Text], *, hook: Hook, context: int, thorough: bool = False
) -> tuple[float, dict[str, float]]:
    """The FVU at the hook, and what it would be if something else were true.

    Args:
        sae: A `sae_lens.SAE`.
        model: The causal LM.
        tokenizer: Its tokenizer.
        texts: A sample.
        hook: Where the SAE was trained.
        context: Longest window.
        thorough: All layers and many scales instead of the neighbours and the two usual scales.

    Returns:
        FVU here, and FVU by cause.
    """
    stated = sae.cfg.metadata["prepend_bos"]
    bos = adds_bos(tokenizer) if stated is None else bool(stated)
    last = residual_map(model).n_layers - 1
    layers = range(last + 1) if thorough else (hook.layer - 1, hook.layer + 1)
    others = [hooks.at_layer(model, hook, layer) for layer in layers if 0 <= layer <= last and layer != hook.layer]
    places = sorted([hook, *others], key=lambda place: place.layer)
    found = _rows(model, tokenizer, texts, places, context=context, prepend_bos=bos)
    rows = found[places.index(hook)]
    causes = {
        f"wrong hook, at {place.hook_name} it would be {value:.2f}": value
        for place, other in zip(places, found, strict=True)
        if place != hook and math.isfinite(value := fit(sae, other).fvu)
    }
    for scale in _scales(rows, sae.cfg.d_in, thorough):
        value = fit(sae, rows, scale=scale).fvu
        causes[f"wrong scaling, on activations times {scale:.3g} it would be {value:.2f}; that is what "
               f"load_sae(…, activation_scale={scale:.3g}) assumes"] = value  # fmt: skip
    if tokenizer.bos_token_id is not None:
        [flipped] = _rows(model, tokenizer, texts, [hook], context=context, prepend_bos=not bos)
        value = fit(sae, flipped).fvu
        what = "BOS that it was not trained with, without" if bos else "missing BOS, with"
        causes[f"{what} BOS before the texts it would be {value:.2f}; load_sae(…, prepend_bos={not bos})"] = value
    return fit(sae, rows).fvu, {cause: value for cause, value in causes.items() if math.isfinite(value)}


def remember(texts: Iterable[Text], kept: list[Text]) -> Iterator[Text]:
    """Pass texts on, keeping the beginning of the first of them: enough for a sample of tokens."""
    room = 8 * SAMPLE_TOKENS  # characters or ids
    for text in texts:
        if room > 0:
            kept.append(text[:room])
            room -= len(text)
        yield text


def _scales(rows: Tensor, d_in: int, thorough: bool) -> list[float]:
    """√d_in / mean norm (SAELens, Anthropic), 1 / root mean square norm (Gemma Scope), and powers of 4."""
    norms = rows.float().norm(dim=-1)
    usual = [d_in**0.5 / float(norms.mean()), 1 / float(norms.square().mean().sqrt())]
    many = [4.0**power for power in range(-4, 5) if power] if thorough else []
    return [scale for scale in (*usual, *many) if math.isfinite(scale) and abs(math.log(scale)) > 0.2]


def _rows(
    model: Any, tokenizer: Any, texts: Sequence[Text], places: Sequence[Hook], *, context: int, prepend_bos: bool | None
) -> list[Float[Tensor, "tokens width"]]:
    """Activations of about `SAMPLE_TOKENS` counted tokens at several hooks."""
    context = min(context, 128 + bool(prepend_bos))  # windows of one content, whether BOS is counted in or not
    windows = token_windows(tokenizer, texts, context=context, prepend_bos=prepend_bos)
    parts: list[list[Tensor]] = [[] for _ in places]
    for batch in token_batches(islice(windows, max(1, SAMPLE_TOKENS // 16)), tokenizer, batch_tokens=SAMPLE_TOKENS):
        for part, rows in zip(parts, capture(model, batch.to(model.device), hooks=places), strict=True):
            part.append(rows)
        if sum(map(len, parts[0])) >= SAMPLE_TOKENS:
            break
    if not sum(map(len, parts[0])):
        raise FeatclError("checking an SAE needs texts of at least two tokens besides BOS")
    return [torch.cat(part) for part in parts]
