"""The methods of a config, with what they rehearse, retain and answer from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.material import Material
from featcl.features.provenance import LINE_WORDS, text_digests
from featcl.methods.build import Sources, build_methods, parameters_of, plain_text
from featcl.methods.cartridge import Cartridge
from featcl.methods.method import Method
from featcl.methods.rehearsal import read_material
from featcl.methods.routed import Routed
from featcl.methods.together import check_together
from featcl.streams import Chat, Trajectory

FILES = "methods"  # folder of a run, in which methods have files of their own
_temporary: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends


def methods_of(config: RunConfig, material: Material, chat: Chat, *, folder: Path | None = None) -> tuple[Method, ...]:
    """The methods, with their material.

    Args:
        config: The run's.
        material: The stream's part, which brings instructions and pretraining texts with it.
        chat: The chat form of the model's tokenizer.
        folder: Where methods have files of their own; None: in a temporary place, for a learner that is not a run's.

    Raises:
        FeatclError: For an option out of range, material that is not there or is scored, or methods that make no sense
            together.
    """
    specs = [{"name": method.name, **method.parameters} for method in config.methods]
    if folder is None and any(spec.get("file") is not None for spec in specs):
        _temporary.append(tempfile.TemporaryDirectory(prefix="featcl-"))
        folder = Path(_temporary[-1].name)
    methods = build_methods(specs, Sources(material.sources, _reader(material, chat), folder or Path()))
    check_together(methods)
    for method in methods:
        if isinstance(method, Routed):
            method.check_tasks([material.segments.get(task.name, task.name) for task in material.tasks])
    return methods


def context_taken(config: RunConfig, length: int) -> int:
    """Tokens of the model's context that methods take in every pass: those of a cartridge's prefix.

    Args:
        config: The run's.
        length: Of the context.

    Raises:
        FeatclError: If they leave nothing.
    """
    given = [method.parameters for method in config.methods if method.name == Cartridge.name]
    found = [parameters.get("tokens", parameters_of(Cartridge.name)["tokens"].default) for parameters in given]
    taken = sum(tokens for tokens in found if isinstance(tokens, int))  # what is no number is refused by the method
    if taken >= length:
        raise FeatclError(f"cartridge: a prefix of {taken} tokens leaves nothing of the model's context of {length}")
    return taken


def own_files(folder: Path, *, resumed: bool) -> Path:
    """Where the methods of a run have files of their own; emptied where the run starts anew."""
    if not resumed:
        shutil.rmtree(folder / FILES, ignore_errors=True)
    return folder / FILES


def _reader(material: Material, chat: Chat) -> Any:
    """Reads a file for a method, unless it holds what the run teaches or scores."""

    def read(path: str) -> Sequence[Trajectory]:
        found = read_material(path)
        shared = [each for each in found if not material.unseen.isdisjoint(_digests(each, chat))]
        if shared:
            raise FeatclError(
                f"methods: {path}: {len(shared)} of {len(found)} texts belong to the stream or to the evaluation "
                f"({shared[0].id!r}): what is taught or scored is nobody's to rehearse; give other texts"
            )
        return found

    return read


def _digests(trajectory: Trajectory, chat: Chat) -> frozenset[str]:
    """What is compared with what is taught and scored: a conversation as a whole, a text also by its lines."""
    if trajectory.text is not None:
        return text_digests([trajectory.text], chat.tokenizer, lines=LINE_WORDS)
    ids = chat.encode(trajectory.messages, mask="none", tools=trajectory.tools).input_ids
    return text_digests([ids, plain_text(trajectory)], chat.tokenizer)
