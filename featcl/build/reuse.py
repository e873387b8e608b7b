"""What one process need not work out twice: chosen directions, and how the base model scores, by all they depend on.

A worker of a sweep takes many runs of one model and stream. Their features are chosen anew only where something that
decides the choice differs, and row 0 of R, which is the base model's whatever is attached to it, is scored once.
A file counts by its size and time of change, which is enough for as long as a process lives.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from featcl.build.files import paths_of
from featcl.config import RunConfig
from featcl.evaluation.board import Board
from featcl.evaluation.forward import Targeted
from featcl.evaluation.material import Material
from featcl.evaluation.matrix import Measure
from featcl.features.sources import ASSETS
from featcl.files import digest_json

T = TypeVar("T")
KEPT = 32  # results; the oldest is dropped
INEXACT = ("osf", "mixture")  # kinds that round otherwise than the base model even before they have learned


class Reuse:
    """Results by the digest of everything that they depend on.

    Attributes:
        hits, misses: How often a result was there, and how often it had to be made.
    """

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self._found: OrderedDict[str, Any] = OrderedDict()

    def of(self, what: str, parts: Mapping[str, Any] | None, make: Callable[[], T]) -> T:
        """What `make` returns, or a copy of what it returned for the same parts.

        Args:
            what: Name of the result.
            parts: All that it depends on, as JSON data; None: it cannot be told, and is made every time.
            make: Makes it.
        """
        if parts is None:
            return make()
        key = digest_json([what, parts])
        if key in self._found:
            self.hits += 1
            self._found.move_to_end(key)
        else:
            self.misses += 1
            self._found[key] = copy.deepcopy(make())
            while len(self._found) > KEPT:
                self._found.popitem(last=False)
        return copy.deepcopy(self._found[key])  # nobody changes what others get


@dataclass(frozen=True, eq=False)
class BaseOnce:
    """A board whose scores of the base model are taken from an earlier run, where there was one.

    Attributes:
        board: Scores.
        reuse: Where results are.
        parts: All that they depend on; None: they are not kept.
        untouched: Whether the model is still the base model.
    """

    board: Board
    reuse: Reuse
    parts: Mapping[str, Any] | None
    untouched: Callable[[], bool]

    @property
    def measure(self) -> Measure:
        """What the scores are."""
        return self.board.measure

    def score(self, model: nn.Module, answering: Any = None) -> dict[str, dict[str, float]]:
        """As the board's own."""
        if answering is not None or not self.untouched():
            return self.board.score(model, answering)
        return self.reuse.of("base row", self.parts, lambda: self.board.score(model))

    def targets(self, item: str) -> tuple[Targeted, ...]:
        """As the board's own."""
        return self.board.targets(item)


def selection_parts(config: RunConfig, model: Any, material: Material, digest: str) -> dict[str, Any] | None:
    """What the choice of features depends on; None where it reads explanations, which may lie in a cache of their own.

    Args:
        config: The run's.
        model: Features are selected on its activations.
        material: Brings the texts.
        digest: Of the model's weights.
    """
    wanted = config.features
    if wanted.bundle is not None or "explanations" in json.dumps(wanted.selector):
        return None
    saes = [wanted.sae] if isinstance(wanted.sae, str) else list(wanted.sae.values())
    texts = [*paths_of(wanted.positive), *paths_of(wanted.negative), *paths_of(wanted.background)]
    return {
        **_arithmetic(config, model, digest),
        "features": wanted.model_dump(mode="json"),
        "basis": config.adapter.basis,
        "seed": config.seed,
        "files": {path: _stamp(path) for path in (*saes, *texts, *paths_of(wanted.reviewed))},
        "calibration": {name: digest_json([_plain(text) for text in texts])
                        for name, texts in material.calibration.items()},
        "unseen": digest_json(sorted(material.unseen)),
        "named": config.stream.name is not None,  # a file's background is split
    }  # fmt: skip


def base_row_parts(config: RunConfig, model: Any, material: Material, digest: str) -> dict[str, Any] | None:
    """What row 0 depends on; None where the run's answers, or its count of operations, are not the base model's alone.

    Args:
        config: The run's.
        model: Before anything is attached to it.
        material: What is scored.
        digest: Of the model's weights.
    """
    if config.methods or config.memory is not None or config.evaluation.cost or config.adapter.kind in INEXACT:
        return None
    files = (*paths_of(config.stream.path), *paths_of(config.features.background))
    return {
        **_arithmetic(config, model, digest),
        "stream": config.stream.model_dump(mode="json"),
        "stream_digest": material.digest,
        "columns": list(material.columns),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "mask": config.learner.mask,
        "seed": config.seed,
        "files": {path: _stamp(path) for path in files},
    }


def _arithmetic(config: RunConfig, model: Any, digest: str) -> dict[str, Any]:
    """The model, its tokenizer's files, and what decides the last bits."""
    return {
        "model": config.model,
        "model_digest": digest,
        "model_files": _stamp(config.model),
        "residual_map": config.adapter.residual_map,
        "runtime": config.runtime.model_dump(mode="json"),
        "dtype": str(model.dtype),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def _stamp(source: str) -> list[Any]:
    """Files with size and time of change; nothing where the name is none of a file here."""
    path = ASSETS / source.removeprefix("lab/") if source.startswith("lab/") else Path(source).expanduser()
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
    else:
        files = [path] if path.is_file() else []
    return [[str(file), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]


def _plain(text: str | Sequence[int]) -> str | list[int]:
    return text if isinstance(text, str) else [int(token) for token in text]
