"""Choosing features: a selector ranks all of an SAE's features, then the first k independent ones are kept.

| selector | needs | ranks by |
|---|---|---|
| `ids` | feature_ids | the given order |
| `contrast` | positive, negative | effect size, features whose difference passes the false discovery rate first |
| `rarity` | stream, background | active on the stream, rare on background |
| `gradient_energy` | stream | share of the loss gradient's energy along the decoder row |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features.activations import replacing
from featcl.features.activity import activity, compare
from featcl.features.directions import Directions
from featcl.features.encoder import FeatureEncoder
from featcl.features.saelens import require_width, sae_hook
from featcl.features.tokens import Text, texts_digest, token_batches, token_windows
from featcl.models import max_context, residual_map, resolve_hook

NEEDS = {
    "ids": ("feature_ids",),
    "contrast": ("positive", "negative"),
    "rarity": ("stream", "background"),
    "gradient_energy": ("stream",),
}
NEW_DIRECTION = 0.05
"""A unit row whose part outside the span of the rows chosen before it is shorter than this adds no direction."""


@dataclass(frozen=True)
class Ranking:
    """Feature ids, best first, and what is reported of each of them."""

    order: Int[Tensor, " candidates"]
    scores: dict[str, Float[Tensor, " d_sae"]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def select_features(
    sae: Any,
    model: Any,
    tokenizer: Any,
    *,
    selector: str,
    k: int | None = None,
    positive: Sequence[Text] | None = None,
    negative: Sequence[Text] | None = None,
    stream: Sequence[Text] | None = None,
    background: Sequence[Text] | None = None,
    feature_ids: Sequence[int] | None = None,
    query: str | None = None,
    seed: int = 0,
) -> Directions:
    """The k features that a selector ranks highest, as directions with their provenance.

    Ranked selectors pass over a feature whose decoder row or encoder column lies in the span of those already chosen
    (its id is in `manifest["passed_over"]`); `ids` takes what it is given.

    Args:
        sae: A `sae_lens.SAE` of the residual stream.
        model: The causal LM it belongs to.
        tokenizer: Its tokenizer; texts are read with its BOS convention.
        selector: `ids`, `contrast`, `rarity` or `gradient_energy`.
        k: How many; for `ids` the number of ids, whatever k says.
        positive: Texts that show what is wanted (strings, or token ids).
        negative: Texts that do not.
        stream: Texts already observed, or a calibration split.
        background: Ordinary texts.
        feature_ids: SAE indices.
        query: Reserved for selectors that search explanations.
        seed: Recorded; no selector here draws random numbers.

    Raises:
        FeatclError: For an unknown selector, one that lacks its texts (naming those that work), or too large a k.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("positive", positive),
            ("negative", negative),
            ("stream", stream),
            ("background", background),
            ("feature_ids", feature_ids),
        )
        if value is not None and len(value) > 0
    }
    _require(selector, given)
    d_model = residual_map(model).d_model
    require_width(sae, d_model)
    ranking = _RANKINGS[selector](sae, model, tokenizer, given)
    if selector == "ids":
        chosen, passed_over = ranking.order.tolist(), []
    else:
        if k is None or not 1 <= k <= d_model:
            raise FeatclError(f"selector {selector!r} needs k between 1 and d_model = {d_model}, not {k}")
        chosen, passed_over = independent_features(sae, ranking.order, k)
    if len(chosen) < (k or 0) and selector != "ids":
        raise FeatclError(f"selector {selector!r} finds {len(chosen)} features, not the k = {k} asked for")
    manifest = {
        "sae": sae.cfg.metadata["source"],
        "selector": selector,
        "seed": seed,
        "data": {name: texts_digest(given[name]) for name in NEEDS[selector] if name != "feature_ids"},
        "scores": {name: values[chosen].tolist() for name, values in ranking.scores.items()},
        "passed_over": passed_over,
        **ranking.facts,
    }
    return directions_of(sae, model, chosen, selector=selector, manifest=manifest)


def directions_of(
    sae: Any, model: Any, feature_ids: Sequence[int], *, selector: str, manifest: dict[str, Any]
) -> Directions:
    """The decoder rows, encoder columns and restricted encoder of some features.

    Args:
        sae: A `sae_lens.SAE` of the residual stream.
        model: The causal LM it belongs to.
        feature_ids: SAE indices, distinct.
        selector: What to record as the way they were chosen.
        manifest: Further provenance.
    """
    _, layer = resolve_hook(model, sae_hook(sae))
    ids = list(feature_ids)
    return Directions.from_vectors(
        sae.W_dec.detach()[ids].cpu(),
        readers=sae.W_enc.detach()[:, ids].T.cpu(),
        layer=layer,
        feature_ids=ids,
        hook_name=sae_hook(sae),
        selector=selector,
        encoder=_on_cpu(FeatureEncoder.from_sae(sae, tuple(ids))),
        manifest=manifest,
    )


def independent_features(sae: Any, order: Int[Tensor, " candidates"], k: int) -> tuple[list[int], list[int]]:
    """The first k features of `order` whose decoder rows, and whose encoder columns, are independent.

    Returns:
        The chosen ids, and the ids passed over on the way.
    """
    sides = [sae.W_dec.detach().double().cpu(), sae.W_enc.detach().double().cpu().T]
    bases: list[list[Tensor]] = [[], []]
    chosen: list[int] = []
    passed_over: list[int] = []
    for feature in order.tolist():
        if len(chosen) == k:
            break
        rests = [_outside(side[feature], basis) for side, basis in zip(sides, bases, strict=True)]
        if any(rest is None for rest in rests):
            passed_over.append(feature)
            continue
        chosen.append(feature)
        for basis, rest in zip(bases, rests, strict=True):
            basis.append(rest)  # type: ignore[arg-type]
    return chosen, passed_over


def _outside(row: Tensor, basis: list[Tensor]) -> Tensor | None:
    """The unit vector of what `row` adds to an orthonormal basis, or None where that is next to nothing."""
    length = row.norm()
    if not length > 1e-8:
        return None
    rest = row / length
    if basis:
        columns = torch.stack(basis, dim=1)
        for _ in range(2):  # twice is enough: Giraud et al. 2005
            rest = rest - columns @ (columns.T @ rest)
    return rest / rest.norm() if rest.norm() > NEW_DIRECTION else None


def _require(selector: str, given: dict[str, Any]) -> None:
    if selector not in NEEDS:
        raise FeatclError(f"selector {selector!r} is unknown: one of {', '.join(NEEDS)}")
    missing = [name for name in NEEDS[selector] if name not in given]
    if missing:
        works = [name for name, needs in NEEDS.items() if set(needs) <= given.keys()]
        others = [f"{name} (needs {' and '.join(needs)})" for name, needs in NEEDS.items() if name not in works]
        raise FeatclError(
            f"selector {selector!r} lacks its {' and '.join(missing)}; with what is given these work: "
            f"{', '.join(works) or 'none'}; others: {', '.join(others)}"
        )


# --- rankings ---------------------------------------------------------------------------------------------------------


def _by_ids(sae: Any, model: Any, tokenizer: Any, given: dict[str, Any]) -> Ranking:
    ids = [int(feature) for feature in given["feature_ids"]]
    wrong = [feature for feature in ids if not 0 <= feature < sae.cfg.d_sae]
    if wrong:
        raise FeatclError(f"feature {wrong[0]} does not exist: this SAE has features 0 to {sae.cfg.d_sae - 1}")
    if len(set(ids)) != len(ids):
        raise FeatclError("feature_ids: a feature occurs twice")
    return Ranking(torch.tensor(ids))


def _by_contrast(sae: Any, model: Any, tokenizer: Any, given: dict[str, Any]) -> Ranking:
    sides = [activity(sae, model, tokenizer, given[name]) for name in ("positive", "negative")]
    found = compare(*sides)
    order = found.effect.argsort(descending=True, stable=True)
    order = order[(~found.significant[order]).int().argsort(stable=True)]  # significant ones first
    order = order[found.difference[order] > 0]
    scores = {"effect": found.effect, "difference": found.difference, "q_value": found.q_value}
    return Ranking(order, scores, {"significant": int(found.significant.sum())})


def _by_rarity(sae: Any, model: Any, tokenizer: Any, given: dict[str, Any]) -> Ranking:
    """TF-IDF with tokens as documents: tf · log(tf / background frequency), half a token added to each count."""
    stream, background = (activity(sae, model, tokenizer, given[name]) for name in ("stream", "background"))
    on_stream, on_background = ((seen.active.double() + 0.5) / (seen.tokens + 1) for seen in (stream, background))
    score = on_stream * (on_stream / on_background).log()
    order = score.argsort(descending=True, stable=True)
    order = order[stream.active[order] > 0]
    return Ranking(order, {"tf_idf": score, "on_stream": on_stream, "on_background": on_background})


def _by_gradient_energy(sae: Any, model: Any, tokenizer: Any, given: dict[str, Any]) -> Ranking:
    """Σ_t (g_t · d)² / Σ_t ‖g_t‖², g_t the gradient of the next-token loss at the hook; chance is 1 / d_model."""
    hook_name = sae_hook(sae)
    _, layer = resolve_hook(model, hook_name)
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=-1)
    energy, total = torch.zeros(len(rows), dtype=torch.float64), 0.0
    windows = token_windows(
        tokenizer, given["stream"], context=min(512, max_context(model)), prepend_bos=sae.cfg.metadata["prepend_bos"]
    )
    for batch in token_batches(windows, tokenizer, batch_tokens=1024):
        batch = batch.to(model.device)
        if not batch.counted[:, :-1].any():
            continue
        gradient = _loss_gradient(model, batch, layer)[batch.counted].float().to(rows.device)
        energy += (gradient @ rows.T).double().pow(2).sum(dim=0).cpu()
        total += float(gradient.double().pow(2).sum())
    if total == 0:
        raise FeatclError("gradient_energy: the loss on the stream has no gradient at this hook")
    share = energy / total
    return Ranking(share.argsort(descending=True, stable=True), {"energy_share": share}, {"chance": 1 / rows.shape[1]})


def _loss_gradient(model: Any, batch: Any, layer: int) -> Float[Tensor, "batch seq d_model"]:
    leaves: list[Tensor] = []

    def leaf(hidden: Tensor) -> Tensor:
        leaves.append(hidden.detach().requires_grad_())
        return leaves[0]

    with torch.enable_grad(), replacing(model, layer, leaf):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        targets = batch.counted[:, :-1] & batch.attention_mask[:, 1:].bool()
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1][targets].float(), batch.input_ids[:, 1:][targets], reduction="sum"
        )
        return torch.autograd.grad(nll, leaves[0])[0]


def _on_cpu(encoder: FeatureEncoder | None) -> FeatureEncoder | None:
    return None if encoder is None else encoder.to("cpu")


_RANKINGS: dict[str, Callable[[Any, Any, Any, dict[str, Any]], Ranking]] = {
    "ids": _by_ids,
    "contrast": _by_contrast,
    "rarity": _by_rarity,
    "gradient_energy": _by_gradient_energy,
}
