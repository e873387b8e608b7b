"""From a config to objects: the only room that knows both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from featcl.adapters import ConstrainedAdapter, constrain
from featcl.build.directions import directions_of
from featcl.build.measures import check_measures, measures_of
from featcl.build.memory import memory_of, training_of
from featcl.build.methods import methods_of
from featcl.build.reuse import BaseOnce, Reuse, base_row_parts, selection_parts
from featcl.build.stream import acting_rounds, check_suites, material_of
from featcl.build.watching import denoising_of, guard_of, weigher_of
from featcl.config import LearnerConfig, RunConfig
from featcl.evaluation import Canaries
from featcl.evaluation.material import Material
from featcl.evaluation.measures import Measures
from featcl.features import Directions
from featcl.learning import Learner
from featcl.learning.heap import keep_heap_
from featcl.learning.learner import LONGEST
from featcl.learning.memorizing import MemoryTraining
from featcl.models import declare_residual_map_, load_model, max_context, model_digest
from featcl.streams import Chat

__all__ = ["Experiment", "acting_rounds", "apply_runtime", "build"]


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs, built from its config.

    Attributes:
        config: What it was built from.
        material: The stream's part.
        adapter, learner: On the model, at the zero start.
        phases: Settings for `Learner.reconfigure`, run in order on each task.
        experiences: How many of each task's trajectories each phase learns from, the first ones; None is all.
        canaries: Scored between evaluations, or None.
        memorizing: Trains the memory's slow weights before the stream; None where there is no memory, or a trained one.
        directions: One set, or one per layer.
        measures: What is measured beside R and the canaries.
        facts: What env.json records beside the machine.
    """

    config: RunConfig
    material: Material
    adapter: ConstrainedAdapter
    learner: Learner
    phases: tuple[Mapping[str, Any], ...]
    experiences: tuple[int | None, ...]
    canaries: Canaries | None
    memorizing: MemoryTraining | None
    directions: Directions | Mapping[int, Directions]
    measures: Measures
    facts: Mapping[str, Any] = field(default_factory=dict)


def build(
    config: RunConfig,
    *,
    quarantine: str | Path | None = None,
    files: Path | None = None,
    reuse: Reuse | None = None,
) -> Experiment:
    """Load, select, constrain: every object of a run, at its start.

    Args:
        config: The run's.
        quarantine: Where malformed lines of a stream that is not strict go.
        files: Folder in which methods have files of their own; None: in a temporary place.
        reuse: What earlier runs of this process have worked out; None: everything is worked out here.

    Raises:
        FeatclError: Whatever cannot be found, read or combined, in one line.
    """
    apply_runtime(config)
    check_suites(config)
    check_measures(config)
    model, tokenizer = load_model(config.model, dtype=config.runtime.dtype, device=config.runtime.device)
    if config.adapter.residual_map is not None:
        declare_residual_map_(model, config.adapter.residual_map)
    chat = Chat(tokenizer)
    material = material_of(config, model, chat, length=min(max_context(model), LONGEST), quarantine=quarantine)
    methods = methods_of(config, material, chat, folder=files)
    digest = model_digest(model)
    facts = {"model_digest": digest, "stream_digest": material.digest}
    reuse = Reuse() if reuse is None else reuse
    directions, gates, modules = reuse.of(
        "directions",
        selection_parts(config, model, material, digest),
        lambda: directions_of(config, model, tokenizer, material, digest),
    )
    base_row = base_row_parts(config, model, material, digest)
    learners = config.phases or (config.learner,)
    phases = tuple(_settings(learner) for learner in learners)
    experiences = tuple(learner.experiences for learner in learners)
    teacher = load_model(config.teacher, device=config.runtime.device) if config.teacher else None
    adapter = constrain(
        model,
        directions,
        kind=config.adapter.kind,
        rank=config.adapter.rank,
        layers=config.adapter.layers,
        modules=config.adapter.modules,
        protect=Directions.load(config.adapter.protect) if config.adapter.protect else None,
        gate=gates if config.adapter.kind == "gated" else None,
        near_dependent=config.adapter.near_dependent,
        training=config.adapter.training,
        alpha=config.adapter.alpha,
        penalty=config.adapter.penalty,
        remainder=config.adapter.remainder,
        preserved=config.adapter.preserved,
        experts=config.adapter.experts,
        top=config.adapter.top,
        seed=config.seed,
    )
    # what they compare with is the base model: before a trained memory is attached
    canaries = Canaries(adapter.model, chat, **material.canaries) if material.canaries else None
    guard = guard_of(config, adapter.model, chat)
    memory = memory_of(config, model, gates)
    learner = Learner(
        model,
        tokenizer,
        adapter,
        **phases[0],
        methods=methods,
        weigher=weigher_of(config, material, memory),
        denoising=denoising_of(config, model, tokenizer, material, directions),
        guard=guard,
        memory=memory,
        teacher=teacher,
        background=material.plain_background,
        seed=config.seed,
    )
    material = replace(material, board=BaseOnce(material.board, reuse, base_row, lambda: learner.version == 0))
    memorizing = training_of(config, memory, learner.student.scorer, chat, unseen=material.unseen)
    facts |= {"hooks": modules, "directions_digest": _digest(directions), "seed": config.seed}
    if memorizing is not None:
        facts["memory_texts_digest"] = memorizing.texts.digest
    measures = measures_of(config, material, learner, directions)
    return Experiment(
        config, material, adapter, learner, phases, experiences, canaries, memorizing, directions, measures, facts
    )


def apply_runtime(config: RunConfig) -> None:
    """Set arithmetic, threads and memory for this process."""
    torch.set_float32_matmul_precision(config.runtime.float32_matmul)
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    if config.runtime.keep_heap:
        keep_heap_()


def _settings(learner: LearnerConfig) -> dict[str, Any]:
    """The arguments of `Learner.reconfigure`; an objective's options that are null are its own defaults."""
    settings = learner.model_dump(exclude={"objectives", "experiences", "weighing", "denoising", "guard"})
    return {"objective": [term.model_dump() for term in learner.objectives], **settings}


def _digest(directions: Directions | Mapping[int, Directions]) -> Any:
    if isinstance(directions, Directions):
        return directions.digest
    return {str(layer): chosen.digest for layer, chosen in directions.items()}
