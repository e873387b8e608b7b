"""The directions of a config: chosen features, or the control that stands in for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from featcl.build.files import paths_of
from featcl.build.sae import trained_sae
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.material import Material
from featcl.features import (
    Bundle,
    Directions,
    hooks,
    load_sae,
    pca_directions,
    random_directions,
    random_features,
    read_texts,
    select_features,
)
from featcl.features.provenance import Digests, refuse_overlap
from featcl.features.tokens import Text


def directions_of(
    config: RunConfig, model: Any, tokenizer: Any, material: Material, digest: str
) -> tuple[Directions | dict[int, Directions], Directions | dict[int, Directions], dict[str, str]]:
    """The directions, or the control that stands in for them; the chosen features; and which module each hook is."""
    sources = config.features.sae
    if config.features.train is not None:
        trained_sae(config.features.train, Path(str(sources)).expanduser(), model, tokenizer, unseen=material.unseen)
    select = partial(_directions_of, config, model, tokenizer, _selection_texts(config, tokenizer, material),
                     held_out=material.unseen, digest=digest)  # fmt: skip
    if isinstance(sources, str):
        basis, chosen = select(sources)
        return basis, chosen, _hooks(model, [chosen])
    found = {layer: select(sae) for layer, sae in sources.items()}
    sets, gates = ({layer: pair[which] for layer, pair in found.items()} for which in (0, 1))
    for layer, chosen in gates.items():
        if chosen.layer != layer:
            raise FeatclError(f"features.sae.{layer}: {sources[layer]} was trained at {chosen.hook_name}, not there")
    return sets, gates, _hooks(model, list(gates.values()))


def _hooks(model: Any, sets: Sequence[Directions]) -> dict[str, str]:
    return {chosen.hook_name: hooks.resolve(model, chosen.hook_name).module for chosen in sets}


def _selection_texts(config: RunConfig, tokenizer: Any, material: Material) -> dict[str, Sequence[Text]]:
    """What features are selected on: the calibration split, or files; nothing to come, nothing that is scored."""
    given = {name: _texts(getattr(config.features, name)) for name in ("positive", "negative", "background")}
    if not config.stream.name:
        given.pop("background")  # is split: its last fifth is scored
    files = {name: texts for name, texts in given.items() if texts}
    refuse_overlap({f"features.{name}": texts for name, texts in files.items()}, material.unseen, tokenizer)
    calibration = {name: texts for name, texts in material.calibration.items() if name not in files}
    refuse_overlap(calibration, material.unseen, tokenizer, parts=False)
    return {**calibration, **files}


def _directions_of(
    config: RunConfig, model: Any, tokenizer: Any, texts: Mapping[str, Sequence[Text]], source: str, *,
    held_out: Digests, digest: str,
) -> tuple[Directions, Directions]:  # fmt: skip
    """What stands in for the chosen features (themselves, or a control of the same k), and the chosen features."""
    wanted = config.features
    sae = load_sae(source, device=model.device, model=model, tokenizer=tokenizer, check=wanted.check)
    if wanted.bundle is not None:
        chosen = Bundle.load(wanted.bundle).merged(
            sae, model, tokenizer, explanations=wanted.explanations, held_out=held_out, model_digest=digest,
            seed=config.seed,
        )  # fmt: skip
    else:
        chosen = select_features(
            sae, model, tokenizer, selector=wanted.selector, k=wanted.k, feature_ids=wanted.feature_ids,
            query=wanted.query, explanations=wanted.explanations, reviewed=wanted.reviewed, model_digest=digest,
            seed=config.seed, **texts,
        )  # fmt: skip
    if config.adapter.basis == "random":
        return random_directions(chosen, seed=config.seed), chosen
    if config.adapter.basis == "pca":
        return pca_directions(chosen, model, tokenizer, texts.get("background") or texts["stream"]), chosen
    if config.adapter.basis == "random_features":
        return random_features(chosen, sae, model, seed=config.seed), chosen
    return chosen, chosen


def _texts(paths: str | Sequence[str] | None) -> list[str]:
    return [text for path in paths_of(paths) for text in read_texts(path)]
