"""Looking at features: where they fire in the user's own texts, how strongly, and what they do to the next token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from featcl import files
from featcl.errors import FeatclError
from featcl.features.activations import feature_rows
from featcl.features.activity import activity
from featcl.features.directions import Directions
from featcl.features.encoder import FeatureEncoder
from featcl.features.hooks import resolve
from featcl.features.html import card, cards, page
from featcl.features.logits import final_inverse_rms, logit_effects
from featcl.features.seen import Seen
from featcl.features.select import directions_of, sae_source
from featcl.features.tokens import Text, token_text
from featcl.html import facts_card, table_card


@dataclass(frozen=True)
class Context:
    """Where a feature fires: some tokens around its strongest activation in one window.

    Attributes:
        tokens: What the tokenizer reads each of them as.
        feature_acts: The feature's activation on each.
        peak: Index of the strongest.
    """

    tokens: tuple[str, ...]
    feature_acts: tuple[float, ...]
    peak: int

    @property
    def strength(self) -> float:
        """The strongest activation."""
        return self.feature_acts[self.peak]


@dataclass(frozen=True)
class FeatureDashboard:
    """What one feature does, measured on texts; shows itself in Jupyter.

    Attributes:
        feature_id: Its SAE index.
        label: Its name, or its id.
        hook_name: Where it lives.
        source: The SAE it belongs to.
        tokens: How many tokens were read, BOS and padding left out.
        active: On how many of them it fired.
        mean: Mean activation where it fired; 0 where it never did.
        histogram: Counts of the activations above zero, in equal bins from 0 to `top`.
        top: Upper edge of the last bin.
        contexts: Strongest windows, strongest first.
        promoted: Tokens whose logits it raises most, with the change per unit of the direction.
        suppressed: Tokens whose logits it lowers most.
        scores: What the selector said of it.
        neuronpedia: Its page there, where the SAE records an id; else None.
    """

    feature_id: int
    label: str
    hook_name: str
    source: str
    tokens: int
    active: int
    mean: float
    histogram: tuple[int, ...]
    top: float
    contexts: tuple[Context, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    scores: dict[str, float] = field(default_factory=dict)
    neuronpedia: str | None = None

    def __str__(self) -> str:
        share = self.active / self.tokens if self.tokens else 0.0
        raised = " ".join(repr(token) for token, _ in self.promoted[:4])
        where = ""
        if self.contexts:
            best = self.contexts[0]
            near = "".join(best.tokens[max(0, best.peak - 8) : best.peak + 3])
            where = f"  strongest {best.strength:.3g} in {near!r}"
        return f"{self.label:>14}  fires on {share:7.3%} of tokens  raises {raised}{where}"

    def _repr_html_(self) -> str:
        return card(self)

    def save(self, path: str | Path) -> None:
        """Write one HTML file that needs nothing else."""
        files.write_text(path, page(f"Feature {self.label}", [self]))


@dataclass(frozen=True)
class FeatureDashboards(Sequence[FeatureDashboard]):
    """Several of them, in the order they were asked for; shows itself in Jupyter."""

    features: tuple[FeatureDashboard, ...]
    title: str

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        return self.features[index]

    def __str__(self) -> str:
        return "\n".join([self.title, *map(str, self.features)])

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"title": self.title, "features": [asdict(feature) for feature in self.features]}

    def _repr_html_(self) -> str:
        return cards(self.features)

    def save(self, path: str | Path) -> None:
        """Write one HTML file that needs nothing else."""
        files.write_text(path, page(self.title, self.features))


def show(
    source: Any,
    model: Any,
    tokenizer: Any,
    texts: Iterable[Text],
    feature_ids: Sequence[int] | int | None = None,
    *,
    contexts: int = 8,
    effects: int = 10,
    context: int | None = None,
) -> FeatureDashboards:
    """Read texts once and show what features do on them; nothing of a batch is kept but the strongest windows.

    Args:
        source: A `sae_lens.SAE`, or `Directions` that were chosen from one.
        model: The causal LM they belong to.
        tokenizer: Its tokenizer.
        texts: Strings or token ids: the user's own.
        feature_ids: Which; for directions all of them by default.
        contexts: Most windows shown per feature.
        effects: Tokens shown whose logits rise most, and as many that fall most.
        context: Longest window; by default the model's, at most 512.

    Raises:
        FeatclError: If a feature does not exist, the directions carry no encoder, or the texts hold no token.
    """
    ids = [feature_ids] if isinstance(feature_ids, int) else feature_ids
    directions, encoder = _read(source, model, ids)
    seen, inverse_rms = Seen(directions.k, contexts), None
    for rows in feature_rows(
        encoder.to(model.device), model, tokenizer, texts, hook=resolve(model, directions.hook_name), context=context,
        prepend_bos=directions.manifest.get("prepend_bos"),
    ):  # fmt: skip
        inverse_rms = inverse_rms or final_inverse_rms(model, rows.batch)
        seen.add_(rows)
    if inverse_rms is None:
        raise FeatclError("the texts hold no tokens besides BOS: give texts in which the features may fire")
    moved = logit_effects(model, directions.vectors, inverse_rms=inverse_rms)
    wanted = directions.feature_ids if ids is None else ids
    shown = [
        _dashboard(directions, directions.feature_ids.index(one), seen, moved, tokenizer, effects) for one in wanted
    ]
    return FeatureDashboards(tuple(shown), f"{len(shown)} features of {directions.manifest.get('sae') or 'an SAE'}")


def _dashboard(
    directions: Directions, row: int, seen: Seen, moved: Tensor, tokenizer: Any, effects: int
) -> FeatureDashboard:
    scores = directions.manifest.get("scores", {})
    return FeatureDashboard(
        feature_id=directions.feature_ids[row],
        label=directions.labels[row],
        hook_name=directions.hook_name,
        source=str(directions.manifest.get("sae") or ""),
        tokens=seen.tokens,
        active=int(seen.active[row]),
        mean=float(seen.total[row] / seen.active[row].clamp(min=1)),
        histogram=tuple(seen.counts[row].tolist()),
        top=float(seen.top[row]),
        contexts=tuple(_context(found, tokenizer) for _, _, found in seen.best[row]),
        promoted=_extremes(moved[row], tokenizer, effects),
        suppressed=_extremes(-moved[row], tokenizer, effects, sign=-1),
        scores={name: values[row] for name, values in scores.items()},
        neuronpedia=neuronpedia_page(directions.manifest.get("neuronpedia_id"), directions.feature_ids[row]),
    )


def neuronpedia_page(neuronpedia_id: Any, feature: int) -> str | None:
    """Where Neuronpedia shows a feature; None for an SAE that has no id there, or none that an address can hold."""
    if not isinstance(neuronpedia_id, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", neuronpedia_id):
        return None
    return f"https://www.neuronpedia.org/{neuronpedia_id}/{feature}"


def _read(source: Any, model: Any, ids: Sequence[int] | None) -> tuple[Directions, FeatureEncoder]:
    """What to show, and the encoder that reads it at its hook."""
    if isinstance(source, Directions):
        if source.encoder is None:
            raise FeatclError(
                "these directions carry no encoder, so where they fire is unknown: give their SAE instead"
            )
        if ids is not None and (unknown := [one for one in ids if one not in source.feature_ids]):
            raise FeatclError(f"feature {unknown[0]} is not among these directions: {list(source.feature_ids)}")
        return source, source.encoder
    if not ids:
        raise FeatclError("an SAE has too many features to show all of them: name some by feature_ids")
    if wrong := [one for one in ids if not 0 <= one < source.cfg.d_sae]:
        raise FeatclError(f"feature {wrong[0]} does not exist: this SAE has features 0 to {source.cfg.d_sae - 1}")
    encoder = FeatureEncoder.from_sae(source, tuple(ids))
    if encoder is None:
        raise FeatclError(f"an SAE of architecture {source.cfg.architecture()} cannot be read feature by feature")
    manifest = {**sae_source(source), "prepend_bos": source.cfg.metadata["prepend_bos"]}
    return directions_of(source, model, ids, selector="ids", manifest=manifest), encoder


def _context(found: tuple[Tensor, Tensor, int], tokenizer: Any) -> Context:
    ids, acts, peak = found
    return Context(tuple(token_text(tokenizer, token) for token in ids.tolist()), tuple(acts.tolist()), peak)


def _extremes(effects: Tensor, tokenizer: Any, count: int, *, sign: int = 1) -> tuple[tuple[str, float], ...]:
    known = effects[: len(tokenizer)]  # rows that pad the vocabulary are no tokens
    values, ids = known.topk(min(count, len(known)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple((token_text(tokenizer, token), sign * value) for token, value in pairs)


def directions_card(directions: Directions) -> str:
    """Directions as Jupyter shows them: which features, why, and where they come from; no texts are read."""
    manifest = directions.manifest
    scores = {name: values for name, values in manifest.get("scores", {}).items() if len(values) == directions.k}
    rows = []
    for row, feature in enumerate(directions.feature_ids):
        address = neuronpedia_page(manifest.get("neuronpedia_id"), feature)
        rows.append([(str(feature), address) if address else str(feature), directions.labels[row],
                     *(values[row] for values in scores.values())])  # fmt: skip
    note = f"{directions.hook_name} (layer {directions.layer}), d_model {directions.d_model}"
    note += f", selector {directions.selector}, digest {directions.digest[:8]}"
    if "sae" in manifest:
        note = f"{manifest['sae']} at {note}"
    if directions.without_effect:
        note += f"; validated: no effect of {', '.join(map(str, directions.without_effect))}"
    return table_card(f"{directions.k} directions", note, ("feature", "name", *scores), rows)


def sae_card(sae: Any) -> str:
    """An SAE as Jupyter shows it: where it lives and what it is made of."""
    metadata = sae.cfg.metadata
    names = ("source", "hook_name", "hf_hook_name", "model_name", "prepend_bos", "context_size", "neuronpedia_id")
    facts = {"architecture": sae.cfg.architecture(), "features": sae.cfg.d_sae, "width": sae.cfg.d_in}
    facts |= {name: metadata[name] for name in names if metadata[name] is not None}
    facts["input processing"] = sae.cfg.normalize_activations
    norms = sae.W_dec.detach().float().norm(dim=-1)
    facts["decoder norms"] = f"{norms.min():.3g} to {norms.max():.3g}"
    return facts_card(f"SAE {metadata['source'] or ''}", facts)


def most_active(sae: Any, model: Any, tokenizer: Any, texts: Iterable[Text], *, k: int) -> list[int]:
    """The k features that fire on most tokens, those on more than half of them left out."""
    seen = activity(sae, model, tokenizer, texts)
    order = seen.active.argsort(descending=True, stable=True).tolist()
    found = [feature for feature in order if 0 < seen.active[feature] <= seen.tokens / 2][:k]
    if not found:
        raise FeatclError("no feature fires on these texts, or all on more than half of the tokens: name some by id")
    return found
