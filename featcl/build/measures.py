"""What a config asks to be measured beside R and the canaries; what cannot be measured is known before the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcl.adapters import ConstrainedAdapter
from featcl.adapters.sets import feature_names
from featcl.config import DriftConfig, RunConfig, ShiftConfig
from featcl.errors import FeatclError
from featcl.evaluation.cost import CostMeter
from featcl.evaluation.harness import HarnessTier, require_harness
from featcl.evaluation.material import Material
from featcl.evaluation.measures import (
    BeforeLearning,
    DriftMeasure,
    HarnessMeasure,
    LeakMeasure,
    Measures,
    PerplexityMeasure,
    SampleMeasure,
    ShiftMeasure,
    Spending,
    WatchedSae,
)
from featcl.evaluation.segments import answering_in
from featcl.evaluation.shift import cut_segments
from featcl.features import Directions, load_sae, read_texts
from featcl.features.explanations import cache_folder, explanation_files, neuronpedia_id, read_explanations
from featcl.features.tokens import Text
from featcl.learning import Learner
from featcl.learning.randomness import derived_generator
from featcl.streams import Encoded, Trajectory, encode_trajectory

HARNESS_CACHE = "harness"  # in the folder of all results


def check_measures(config: RunConfig) -> None:
    """Before a model is loaded: what is missing on this machine.

    Raises:
        FeatclError: If a frozen text cannot be read, or lm-eval is wanted and not installed.
    """
    _frozen_texts(config)
    if config.evaluation.harness is not None:
        require_harness()


def measures_of(
    config: RunConfig, material: Material, learner: Learner, chosen: Directions | Mapping[int, Directions]
) -> Measures:
    """Everything that the config asks for.

    Args:
        config: The run's.
        material: The stream's part.
        learner: With methods and memory, its adapter at the zero start.
        chosen: The directions, whose features may have names.

    Raises:
        FeatclError: If something cannot be measured on this stream, this model or this machine.
    """
    wanted, chat, adapter = config.evaluation, learner.student.chat, learner.adapter
    samples = SampleMeasure(
        adapter, chat, material.heldout, count=config.tracking.samples,
        generator=lambda row: derived_generator(config.seed, row, "samples"),
    )  # fmt: skip
    rows = [samples, *_harness(config, adapter, learner), *_perplexity(config, adapter, chat.tokenizer)]
    if wanted.shift is not None:
        rows.append(_shift(config, wanted.shift, material, learner))
    if wanted.drift is not None:
        rows.append(_drift(config, wanted.drift, material, learner, chosen))
    return Measures(
        LeakMeasure(adapter, chat.tokenizer, material.probe_texts),
        rows,
        before=_before(config, material, adapter, learner) if wanted.online else None,
        spending=Spending(_meter(config, adapter)) if wanted.cost else None,
    )


def _meter(config: RunConfig, adapter: ConstrainedAdapter) -> CostMeter:
    if config.adapter.kind in ("mixture", "osf"):
        raise FeatclError(f"evaluation.cost: the FLOPs of kind {config.adapter.kind} are not counted; leave it out")
    return CostMeter(adapter.model)


def _before(config: RunConfig, material: Material, adapter: ConstrainedAdapter, learner: Learner) -> BeforeLearning:
    tasks = {task.name: [t for t in task.trajectories if isinstance(t, Trajectory)] for task in material.tasks}
    return BeforeLearning(
        adapter,
        learner.student.chat,
        tasks,
        length=learner.student.max_length,
        max_windows=config.learner.max_windows,
        mask=config.learner.mask,
        answering=lambda: answering_in(learner.answering(), material.segments),
    )


# --- the model's abilities


def _perplexity(config: RunConfig, adapter: ConstrainedAdapter, tokenizer: Any) -> list[PerplexityMeasure]:
    wanted, texts = config.evaluation.perplexity, _frozen_texts(config)
    if wanted is None:
        return []
    return [PerplexityMeasure(adapter.model, tokenizer, texts, context=wanted.context, stride=wanted.stride)]


def _frozen_texts(config: RunConfig) -> dict[str, list[str]]:
    """Name -> documents."""
    texts: dict[str, list[str]] = {}
    wanted = config.evaluation.perplexity
    for path in () if wanted is None else wanted.files:
        name = Path(path).name.split(".")[0]
        if name in texts:
            raise FeatclError(f"evaluation.perplexity.files: two files are called {name}; each is a number of its own")
        texts[name] = read_texts(path)
    return texts


def _harness(config: RunConfig, adapter: ConstrainedAdapter, learner: Learner) -> list[HarnessMeasure]:
    wanted = config.evaluation.harness
    if wanted is None:
        return []
    if not learner.answering().plain:
        names = ", ".join(method.name for method in config.methods)
        raise FeatclError(
            f"evaluation.harness: it asks the model as it stands, and methods ({names}) have a say in how questions "
            "are answered; leave one of the two out"
        )
    tiers = [
        HarnessTier(name, tier.tasks, tier.limit)
        for name in ("smoke", "quick", "full")
        if (tier := getattr(wanted, name)) is not None
    ]
    if not tiers:
        raise FeatclError("evaluation.harness: no tier is wanted; set smoke, quick or full, or leave it out")
    cache = None if learner.memory is not None else Path(wanted.cache or Path(config.output) / HARNESS_CACHE)
    return [
        HarnessMeasure(adapter, learner.student.chat.tokenizer, tiers, include=wanted.include, cache=cache,
                       batch_size=wanted.batch_size)
    ]  # fmt: skip


# --- distances


def _shift(config: RunConfig, wanted: ShiftConfig, material: Material, learner: Learner) -> ShiftMeasure:
    """Segments of the stream, or as many of equal length, each with evenly spread sequences."""
    tasks: dict[str, list[Encoded]] = {}
    for task in material.tasks:
        taught = [each for each in task.trajectories if isinstance(each, Trajectory)]
        if len(taught) < len(task.trajectories):
            raise FeatclError(f"evaluation.shift: the episodes of {config.stream.name} are not known before the run")
        tasks[task.name] = [
            window
            for trajectory in taught
            for window in encode_trajectory(
                trajectory, learner.student.chat, max_length=learner.student.max_length, mask=config.learner.mask,
                max_windows=config.learner.max_windows,
            ).windows
        ]  # fmt: skip
    whole = [window for windows in tasks.values() for window in windows]
    if wanted.segments is None and len(tasks) < 2:
        raise FeatclError("evaluation.shift: the stream has one task; give the number of segments that it is cut in")
    segments = tasks if wanted.segments is None else cut_segments(whole, wanted.segments)
    chosen = {name: _spread(windows, wanted.sequences) for name, windows in segments.items()}
    return ShiftMeasure(learner.adapter.model, chosen, layers=wanted.layers)


def _drift(
    config: RunConfig, wanted: DriftConfig, material: Material, learner: Learner,
    chosen: Directions | Mapping[int, Directions],
) -> DriftMeasure:  # fmt: skip
    adapter, tokenizer = learner.adapter, learner.student.chat.tokenizer
    heldout = [each for found in material.heldout.values() for each in _spread(found, wanted.texts)]
    new = [_as_text(each, learner) for each in _spread(heldout, wanted.texts)]
    background = _spread(list(material.calibration.get("background", ())), wanted.texts)
    saes = _watched(config, adapter, tokenizer, chosen) if wanted.features else []
    texts = {"new": new, "background": background}
    return DriftMeasure(adapter, tokenizer, texts, saes=saes, top=wanted.top, scales=wanted.scales, seed=config.seed)


def _as_text(trajectory: Trajectory, learner: Learner) -> Text:
    if trajectory.text is not None:
        return trajectory.text
    return learner.student.chat.encode(trajectory.messages, mask="none", tools=trajectory.tools).input_ids


def _watched(
    config: RunConfig, adapter: ConstrainedAdapter, tokenizer: Any, chosen: Directions | Mapping[int, Directions]
) -> list[WatchedSae]:
    """The SAEs of the config, with the names of their features where they are at hand."""
    sources = config.features.sae
    if isinstance(sources, str):
        assert isinstance(chosen, Directions)
        each = [("", sources, chosen)]
    else:
        assert isinstance(chosen, Mapping)
        each = [(f"_{layer}", source, chosen[layer]) for layer, source in sources.items()]
    found = []
    for suffix, source, directions in each:
        sae = load_sae(source, device=adapter.model.device, model=adapter.model, tokenizer=tokenizer, check=False)
        names = {**_explained(sae, config.features.explanations), **feature_names(directions)}
        found.append(WatchedSae(sae, names, suffix))
    return found


def _explained(sae: Any, explanations: str | None) -> dict[int, str]:
    """Feature -> its first explanation; none where nobody named a file and the cache has none."""
    source = neuronpedia_id(sae)
    if explanations is None and (source is None or not (cache_folder() / source).is_dir()):
        return {}
    names: dict[int, str] = {}
    for each in read_explanations(explanation_files(explanations, source), source, d_sae=int(sae.cfg.d_sae)):
        names.setdefault(each.index, each.description)
    return names


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most so many, evenly spread."""
    step = max(1.0, len(values) / count)
    return [values[int(index * step)] for index in range(min(count, len(values)))]
