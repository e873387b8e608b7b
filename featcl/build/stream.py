"""The stream of a config, graded or from files, and what plays it where the model acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcl.build.files import append_line, paths_of
from featcl.build.methods import context_taken
from featcl.config import ActingConfig, DocumentsConfig, RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.acting import acting_material
from featcl.evaluation.material import Material, file_material, lab_material, suite_columns
from featcl.evaluation.segments import in_segments
from featcl.lab import acting
from featcl.lab.pairs import with_pairs
from featcl.lab.streams import load_stream
from featcl.learning import Learner
from featcl.learning.acting import Rounds
from featcl.learning.randomness import derived_generator
from featcl.streams import Chat, Trajectory, read_trajectories
from featcl.streams.acting import ActingSettings
from featcl.streams.documents import Filters, document_experiences
from featcl.streams.passages import DOCUMENTS, Document
from featcl.streams.writing import ModelAuthor


def check_suites(config: RunConfig) -> None:
    if not config.model.startswith("lab/") and any(suite.startswith("lab/") for suite in config.evaluation.suites):
        raise FeatclError(
            f"evaluation.suites: lab suites ask what the laboratory's models know, not {config.model}; "
            "use evaluation.suites='[]', or a model such as lab/olmo2"
        )


def material_of(config: RunConfig, model: Any, chat: Chat, *, length: int, quarantine: str | Path | None) -> Material:
    """The stream of the config, graded or from files, in its setting."""
    setting, length = config.stream.setting, length - context_taken(config, length)
    material = _material_of(config, model, chat, length=length, quarantine=quarantine)
    return in_segments(material, setting) if setting in ("domain", "joint") else material


def _material_of(config: RunConfig, model: Any, chat: Chat, *, length: int, quarantine: str | Path | None) -> Material:
    """Task by task."""
    stream, canaries = config.stream, config.evaluation.canaries
    suites = suite_columns(config.evaluation.suites)
    items = None if canaries is None else canaries.items
    if stream.name == acting.NAME:
        played = _acting(config)
        return acting_material(played, chat, suites=suites, settings=_acting_settings(config, length),
                               samples=(stream.acting or ActingConfig()).samples, canary_items=items,
                               limit=stream.limit)  # fmt: skip
    if stream.name is not None:
        lab = load_stream(
            stream.name,
            world=stream.world,  # type: ignore[arg-type]
            seed=config.seed,
            order=stream.order,
            garbage=stream.garbage,
            tasks=stream.tasks,
        )
        lab = with_pairs(lab, seed=config.seed) if stream.pairs else lab
        material = lab_material(lab, chat, suites=suites, canary_items=items, limit=stream.limit)
        return replace(material, segments=lab.recurring)  # to methods a task that comes again is the same task

    def reject(trajectory: Trajectory, error: FeatclError) -> None:
        if quarantine is not None:
            append_line(Path(quarantine), {"id": trajectory.id, "reason": str(error)})

    found = [
        trajectory
        for path in paths_of(stream.path)
        for trajectory in (
            _document(config, path, model, chat, length=length, quarantine=quarantine)
            if Path(path).suffix.lower() in DOCUMENTS
            else read_trajectories(path, strict=stream.strict, quarantine=quarantine, format=stream.format)
        )
    ]
    return file_material(
        found,
        chat,
        length=length,
        holdout=stream.holdout,
        calibration=stream.calibration,
        background=paths_of(config.features.background),
        suites=suites,
        canary_items=items,
        limit=stream.limit,
        mask=config.learner.mask,
        reject=None if stream.strict else reject,
    )


def _document(
    config: RunConfig, path: str, model: Any, chat: Chat, *, length: int, quarantine: str | Path | None
) -> Sequence[Trajectory]:
    """Questions on a document, asked and answered by templates and the base model; what is left out has its reason."""
    wanted = config.stream.documents or DocumentsConfig()
    document = Document.load(path)
    author = None
    if wanted.samples:
        author = ModelAuthor(
            model,
            chat,
            derived_generator(config.seed, document.digest, "document"),
            version="base",
            per_passage=wanted.per_passage,
            samples=wanted.samples,
            max_new_tokens=wanted.max_new_tokens,
            max_length=length,
        )
    filters = Filters(wanted.agreement, wanted.similarity, wanted.known, limit=wanted.limit)
    found = document_experiences(document, author=author, filters=filters)
    if quarantine is not None:
        for out in found.dropped:
            entry = {"file": path, "question": out.question.question, "reason": out.reason}
            append_line(Path(quarantine), entry)
    return found.trajectories


def _acting(config: RunConfig) -> acting.ActingStream:
    """The environments of the stream `lab/acting`."""
    stream, wanted = config.stream, config.stream.acting or ActingConfig()
    return acting.load_acting(
        world=stream.world,  # type: ignore[arg-type]
        seed=config.seed,
        tasks=stream.tasks,
        episodes=wanted.episodes,
        held_out=wanted.held_out,
    )


def _acting_settings(config: RunConfig, length: int) -> ActingSettings:
    wanted = config.stream.acting or ActingConfig()
    return ActingSettings(wanted.max_turns, wanted.max_new_tokens, wanted.temperature, length)


def acting_rounds(config: RunConfig, learner: Learner, folder: Path) -> Rounds | None:
    """What plays the episodes of a stream that the model acts in; None for other streams.

    Args:
        config: The run's.
        learner: Whose present version acts.
        folder: Where every round is written before it is learned from.
    """
    if config.stream.name != acting.NAME:
        return None
    wanted = config.stream.acting or ActingConfig()
    return Rounds(
        learner,
        {task.name: task for task in _acting(config).tasks},
        folder,
        at_once=wanted.at_once,
        samples=wanted.samples,
        source=acting.NAME,
        max_turns=wanted.max_turns,
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
    )
