"""Choosing features: a selector ranks all of an SAE's features, then the first k independent ones are kept.

| selector | needs | ranks by |
|---|---|---|
| `ids` | feature_ids | the given order |
| `hand` | reviewed | the order of a reviewed list with a reason for each |
| `explanations` | query | how well the feature's explanation fits the query |
| `contrast` | positive, negative | effect size, features whose difference passes the false discovery rate first |
| `persona` | positive, negative | nearness to the difference of mean residual vectors |
| `attribution` | positive or stream | activation × gradient: what the task's loss would lose without the feature |
| `gradient_energy` | stream | share of the loss gradient's energy along the decoder row |
| `rarity` | stream, background | active on the stream, rare on background |

`{union | intersection | rank: [selector, …]}` combines them, and any function of the same form is a selector
(`featcl.features.selectors.base`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from featcl import models
from featcl.errors import FeatclError
from featcl.features import hooks
from featcl.features.activity import SIGNIFICANT
from featcl.features.chosen import directions_of, independent_features, sae_source
from featcl.features.directions import Directions
from featcl.features.provenance import Digests, refuse_overlap
from featcl.features.selectors import SELECTORS, Ranking, Spec, label_text, needs, resolve
from featcl.features.selectors.base import missing, rank
from featcl.features.tokens import Text, texts_digest

TEXTS = ("positive", "negative", "stream", "background")


def select_features(
    sae: Any,
    model: Any,
    tokenizer: Any,
    *,
    selector: Spec,
    k: int | None = None,
    positive: Sequence[Text] | None = None,
    negative: Sequence[Text] | None = None,
    stream: Sequence[Text] | None = None,
    background: Sequence[Text] | None = None,
    feature_ids: Sequence[int] | None = None,
    query: str | None = None,
    explanations: str | Path | None = None,
    reviewed: str | Path | Sequence[Mapping[str, Any]] | None = None,
    loss: Any = None,
    held_out: Collection[Text] | Digests | None = None,
    model_digest: str | None = None,
    seed: int = 0,
) -> Directions:
    """The k features that a selector ranks highest, as directions with their provenance.

    Ranked selectors pass over a feature whose decoder row or encoder column lies in the span of those already chosen
    (its id is in `manifest["passed_over"]`); `ids` and `hand` take what they are given. Where `contrast` keeps features
    whose difference does not pass its false discovery rate, a line on standard error and
    `manifest["chosen_significant"]` say how many do.

    Args:
        sae: A `sae_lens.SAE` of the residual stream, of `mlp_out`, or of attention at `hook_z`.
        model: The causal LM it belongs to.
        tokenizer: Its tokenizer; texts are read with its BOS convention.
        selector: A name of the table above, a function of the same form, or a combination.
        k: How many; for `ids` and `hand` as many as are listed, whatever k says.
        positive: Texts that show what is wanted (strings, or token ids).
        negative: Texts that do not.
        stream: Texts already observed, or a calibration split.
        background: Ordinary texts.
        feature_ids: SAE indices.
        query: Words to search explanations for.
        explanations: File or folder of exported explanations; None is the local cache.
        reviewed: YAML file of features with a reason each, or its entries.
        loss: Of the task, for the selectors by gradient: `loss(logits, batch)`, summed; None is the next token's NLL.
        held_out: Texts of the stream still to come and of the evaluation, or their digests; a text of any other
            argument that is among them is refused.
        model_digest: `featcl.models.model_digest(model)` where it is known already.
        seed: Recorded; no selector here draws random numbers.

    Raises:
        FeatclError: For an unknown selector, one that lacks its texts (naming those that work), an overlap with
            `held_out`, or too large a k.
    """
    values: dict[str, Any] = {  # what selectors may ask for
        "positive": positive, "negative": negative, "stream": stream, "background": background,
        "feature_ids": feature_ids, "query": query, "explanations": explanations, "reviewed": reviewed, "loss": loss,
        "k": k,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in values.items() if not _absent(value)} | {"seed": seed}
    chosen_by, label = resolve(selector)
    hook = hooks.resolve(model, sae)
    _require(chosen_by, label, given, too_few=stream is not None and "stream" not in given)
    texts = {name: given[name] for name in TEXTS if name in given}
    if held_out is not None:
        refuse_overlap(texts, held_out, tokenizer)
    found = rank(chosen_by, sae, model, tokenizer, given)
    used = _used(chosen_by, label)
    manifest = {
        **sae_source(sae),
        "hook": hook.spelling,
        "model": model_digest or models.model_digest(model),
        "selector": label,
        "seed": seed,
        "data": {name: texts_digest(these) for name, these in texts.items() if used is None or name in used},
    }
    if isinstance(found, Directions):
        return replace(found, manifest={**found.manifest, **manifest})
    return _keep_first(found, sae, model, k=k, label=label, manifest=manifest)


def _keep_first(
    ranking: Ranking, sae: Any, model: Any, *, k: int | None, label: Any, manifest: dict[str, Any]
) -> Directions:
    text = label_text(label)
    if ranking.fixed:
        chosen, passed_over = ranking.order.tolist(), []
    else:
        d_model = hooks.width(model, hooks.resolve(model, "blocks.0.hook_resid_post"))
        if k is None or not 1 <= k <= d_model:
            raise FeatclError(f"selector {text!r} needs k between 1 and d_model = {d_model}, not {k}")
        chosen, passed_over = independent_features(sae, ranking.order, k, model=model)
        if len(chosen) < k:
            raise FeatclError(f"selector {text!r} finds {len(chosen)} features, not the k = {k} asked for")
    manifest |= {
        "scores": {name: values[chosen].tolist() for name, values in ranking.scores.items()},
        "passed_over": passed_over,
        **ranking.facts,
    }
    if "q_value" in ranking.scores and not ranking.fixed:
        manifest["chosen_significant"] = _passing(ranking.scores["q_value"][chosen], text)
    if ranking.reasons:
        manifest["reasons"] = [ranking.reasons.get(feature) for feature in chosen]
    named = any(feature in ranking.names for feature in chosen)
    names = [ranking.names.get(feature, str(feature)) for feature in chosen] if named else None
    return directions_of(sae, model, chosen, selector=text, manifest=manifest, names=names)


def _passing(q_value: Float[Tensor, " k"], text: str) -> int:
    """How many chosen features pass the false discovery rate; where some do not, a line on standard error."""
    passing = int((q_value <= SIGNIFICANT).sum())
    if passing < len(q_value):
        print(
            f"{text}: {passing} of {len(q_value)} chosen features pass a false discovery rate of {SIGNIFICANT}; "
            "more texts would help",
            file=sys.stderr,
        )
    return passing


def _absent(value: Any) -> bool:
    """None, or an empty collection or text."""
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _require(selector: Any, label: Any, given: Mapping[str, Any], *, too_few: bool) -> None:
    """Refuse a selector that lacks something; `too_few`: there is a stream, but nothing of it to choose by."""
    lacking = missing(selector, given)
    if not lacking:
        return
    why = ""
    if too_few and any("stream" in need.split("|") for need in lacking):
        why = (
            " (a source of fewer than three trajectories, or one that repeats itself, has none to spare for choosing "
            "features: give more trajectories, or a selector that needs no stream)"
        )
    works = [name for name, one in SELECTORS.items() if not missing(one, given)]
    others = [f"{name} (needs {_listed(needs(one))})" for name, one in SELECTORS.items() if name not in works]
    raise FeatclError(
        f"selector {label_text(label)!r} lacks its {_listed(lacking)}{why}; with what is given these work: "
        f"{', '.join(works) or 'none'}; others: {', '.join(others)}"
    )


def _used(selector: Any, label: Any) -> set[str] | None:
    """Which texts the selector reads, for the manifest; None where that cannot be told from its signature."""
    if isinstance(label, Mapping):
        [members] = label.values()
        parts = [_used(SELECTORS.get(one), one) if isinstance(one, str) else _used(None, one) for one in members]
        return None if any(part is None for part in parts) else set().union(*(part or () for part in parts))
    if selector is None:
        return None
    parameters = inspect.signature(selector).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return None if open_ended else set(parameters) & set(TEXTS)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(name.replace("|", " or ") for name in names)
