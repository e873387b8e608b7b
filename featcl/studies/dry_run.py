"""`featcl run CONFIG --dry-run`: what a run would read, whether it is there, and what it would need.

Read are the config, the model's config.json and tokenizer, what the SAE says of itself, and the stream, as the run
would read it; no weights. Whatever is missing is named at once, and the numbers are left out that need it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from featcl.build.files import paths_of
from featcl.build.stream import check_suites, material_of
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.material import Material
from featcl.features.saelens import CONFIG_FILE, directory
from featcl.features.sources import ASSETS
from featcl.lab.acting import NAME as ACTING
from featcl.learning.learner import LONGEST
from featcl.models import DTYPES, LAB_ASSETS, load_tokenizer, max_context
from featcl.streams import Chat, Trajectory, encode_trajectory
from featcl.studies.estimate import SPEEDS, Estimate, Lengths, Speed, estimate, stand_in

T = TypeVar("T")
GIB = 2**30


@dataclass(frozen=True)
class DryRun:
    """What a run would be.

    Attributes:
        config: Resolved.
        found: What is there, a line each.
        missing: What is not, a line each; with any, the run would end with the first of them.
        lengths: Of the stream; None where it, or the tokenizer, is missing.
        estimate: None where something is missing that it needs.
        speed: That was assumed.
    """

    config: RunConfig
    found: tuple[str, ...]
    missing: tuple[str, ...]
    lengths: Lengths | None
    estimate: Estimate | None
    speed: Speed

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        numbers = None if self.estimate is None else self.estimate.to_json()
        return {"config": self.config.to_dict(), "digest": self.config.digest, "folder": str(self.config.folder),
                "found": list(self.found), "missing": list(self.missing), "estimate": numbers}  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.config.folder}: config {self.config.digest[:12]}", *self.found]
        if self.lengths is not None and self.estimate is not None:
            lines += _numbers(self.lengths, self.estimate, self.speed)
        return "\n".join([*lines, *(f"missing: {what}" for what in self.missing)])


def dry_run(config: RunConfig, *, teraflops: float | None = None) -> DryRun:
    """Resolve all that a run would read, and estimate memory, operations and time.

    Args:
        config: The run's.
        teraflops: What the device sustains, in 10¹² operations a second; None: 100 on CUDA, 0.05 on a CPU.

    Raises:
        FeatclError: For what no file could mend, such as a laboratory suite on another model.
    """
    check_suites(config)
    looked = _Looked()
    architecture = looked.at("model", lambda: _model_config(config.model))
    tokenizer = looked.at("tokenizer", lambda: load_tokenizer(_place(config.model)))
    saes = looked.at("SAE", lambda: _saes(config))
    for file in _files(config):
        if not Path(file).expanduser().exists():
            looked.missing.append(f"{file}: no such file")
    device = "cuda" if config.runtime.device.startswith("cuda") else config.runtime.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    usual = SPEEDS.get(device, SPEEDS["cpu"])
    speed = usual if teraflops is None else Speed(teraflops * 1e12, usual.bytes)
    lengths = needed = None
    if architecture is not None:
        dtype = _dtype(config, architecture, device)
        model = stand_in(architecture, dtype)
        looked.found.append(f"model {config.model}: {type(model).__name__}, {str(dtype).removeprefix('torch.')}")
        if tokenizer is not None and not any(file in line for file in _files(config) for line in looked.missing):
            lengths = looked.at("stream", lambda: _lengths(config, model, Chat(tokenizer)))
        if config.stream.name == ACTING:
            looked.found.append("episodes that the model has yet to play are in no number below")
        if lengths is not None and saes is not None:
            layers, d_sae = saes
            needed = looked.at("adapter", lambda: estimate(config, model, lengths, hook_layers=layers, d_sae=d_sae,
                                                           speed=speed))  # fmt: skip
    return DryRun(config, tuple(looked.found), tuple(dict.fromkeys(looked.missing)), lengths, needed, speed)


def dry_table(runs: Sequence[DryRun]) -> str:
    """A sweep's runs: the first in full, then what each needs, and what all are missing."""
    first, *_ = runs
    lines = [str(first), "", f"{'run':48}{'memory':>12}{'minutes':>10}"]
    for run in runs:
        known = run.estimate
        name = f"{run.config.arm}.seed-{run.config.seed}"
        lines.append(f"{name:48}" + ("  not known" if known is None else
                     f"{known.memory / GIB:9.2f} GiB{known.seconds / 60:10.1f}"))  # fmt: skip
    known = [run.estimate.seconds for run in runs if run.estimate is not None]
    if len(known) == len(runs):
        lines.append(f"{f'{len(runs)} runs, one after the other':60}{sum(known) / 60:10.1f}")
    return "\n".join(lines)


@dataclass
class _Looked:
    """What was found and what was not."""

    found: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def at(self, what: str, look: Callable[[], T]) -> T | None:
        """The result; None, with a line, where it is bad input."""
        try:
            return look()
        except FeatclError as error:
            self.missing.append(f"{what}: {' '.join(str(error).split())}")
            return None


def _place(name: str) -> Path:
    """The folder of a model; of one on the hub what is small, without its weights.

    Raises:
        FeatclError: If it is neither here, nor in the cache, nor to be fetched.
    """
    if name.startswith("lab/"):
        return LAB_ASSETS / name.removeprefix("lab/")
    if (folder := Path(name).expanduser()).exists():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FeatclError(f"no folder {name!r} here, and no such model from the hub or its cache") from error


def _model_config(name: str) -> Any:
    """What config.json says."""
    from transformers import AutoConfig

    folder = _place(name)
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FeatclError(f"{folder} has no config.json of a model: {' '.join(str(error).split())[:120]}") from error


def _dtype(config: RunConfig, architecture: Any, device: str) -> torch.dtype:
    wanted = config.runtime.dtype
    if wanted != "auto":
        if wanted not in DTYPES:
            raise FeatclError(f"unknown dtype {wanted!r}: auto, {', '.join(DTYPES)}")
        return DTYPES[wanted]
    own = getattr(architecture.get_text_config(), "dtype", None)
    return own if device == "cuda" and own is not None else torch.float32


def _saes(config: RunConfig) -> tuple[tuple[int, ...], int]:
    """The blocks of the SAEs, and the features of the largest."""
    sources, train = config.features.sae, config.features.train
    if train is not None and not (Path(str(sources)).expanduser() / CONFIG_FILE).is_file():
        return (train.layer,), train.d_sae or 0
    found = [_sae(source) for source in ([sources] if isinstance(sources, str) else sources.values())]
    layers = [layer for layer, _ in found] if isinstance(sources, str) else list(sources)
    return tuple(layers), max(width for _, width in found)


def _sae(source: str) -> tuple[int, int]:
    """Block and number of features of an SAE, from its cfg.json, or its name in a release."""
    path = ASSETS / source.removeprefix("lab/") if source.startswith("lab/") else Path(source).expanduser()
    if (path / CONFIG_FILE).is_file():
        facts = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        name = str((facts.get("metadata") or {}).get("hook_name") or facts.get("hook_name") or path.name)
        return _number(name, r"blocks\.(\d+)\.|resid_post_(\d+)", source), int(facts["d_sae"])
    release, _, sae_id = source.partition("/")
    sae_id = sae_id.partition("@")[0]
    if not path.exists() and release in directory():
        if sae_id not in directory()[release].saes_map:
            near = ", ".join(list(directory()[release].saes_map)[:3])
            raise FeatclError(f"{source}: the release {release} has no {sae_id}; there is {near}, …")
    elif not path.exists():
        raise FeatclError(f"{source}: no such folder, laboratory SAE or release; featcl features train makes one")
    size = re.search(r"width[_-](\d+)(k|m)", source)
    features = 0 if size is None else int(size[1]) * {"k": 1024, "m": 1024**2}[size[2]]
    return _number(source, r"layer[_-](\d+)|resid_post_(\d+)", source), features


def _number(text: str, pattern: str, source: str) -> int:
    if (match := re.search(pattern, text)) is None:
        raise FeatclError(f"{source}: neither its name nor its description says at which block it was trained")
    return int(next(part for part in match.groups() if part is not None))


def _files(config: RunConfig) -> list[str]:
    wanted = config.features
    named = [*paths_of(config.stream.path), *paths_of(wanted.positive), *paths_of(wanted.negative),
             *paths_of(wanted.background), *paths_of(wanted.reviewed), *paths_of(config.adapter.protect),
             *(wanted.train.text if wanted.train is not None else ())]  # fmt: skip
    methods = [value for method in config.methods for key, value in method.parameters.items()
               if key in ("material", "answers", "folder") and isinstance(value, str)]  # fmt: skip
    return [*named, *(value for value in methods if value not in ("instructions", "pretraining"))]


def _lengths(config: RunConfig, model: Any, chat: Chat) -> Lengths:
    """How long the stream is, read as the run reads it."""
    length = min(max_context(model), LONGEST)
    material = material_of(config, model, chat, length=length, quarantine=None)
    windows = [(len(window), sum(window.loss_mask)) for trajectory in _learned(config, material)
               for window in encode_trajectory(trajectory, chat, max_length=length, mask=config.learner.mask,
                                               max_windows=config.learner.max_windows).windows]  # fmt: skip
    held = [sum(len(w) for w in encode_trajectory(t, chat, max_length=length).windows)
            for found in material.heldout.values() for t in found]  # fmt: skip
    return Lengths(
        experiences=sum(1 for _ in _learned(config, material)),
        tokens=sum(tokens for tokens, _ in windows),
        targets=sum(targets for _, targets in windows),
        longest=max(windows, default=(0, 0)),
        scored=(len(held), sum(held)),
        rows=len(material.tasks) + 1,
    )


def _learned(config: RunConfig, material: Material) -> Iterator[Trajectory]:
    """Every experience of every phase; episodes that are still to be played are none yet."""
    for task in material.tasks:
        for learner in config.phases or (config.learner,):
            for trajectory in task.trajectories[: learner.experiences] * config.stream.passes:
                if isinstance(trajectory, Trajectory):
                    yield trajectory


def _numbers(lengths: Lengths, needed: Estimate, speed: Speed) -> Sequence[str]:
    def size(count: int) -> str:
        return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"

    return (
        f"stream: {lengths.experiences} experiences, {lengths.tokens} tokens, {lengths.targets} of them targets; "
        f"{lengths.rows} rows of R over {lengths.scored[0]} held-out texts",
        f"update: {needed.trained / 1e6:.3g} M of {needed.parameters / 1e9:.3g} G numbers, "
        f"blocks {needed.layers[0]} to {needed.layers[1]}",
        f"memory: about {size(needed.memory)}: weights {size(needed.weights)}, update {size(needed.update)}, optimizer "
        f"{size(needed.optimizer)}, kept versions {size(needed.versions)}, activations {size(needed.activations)}, "
        f"logits {size(needed.logits)}; SAE {size(needed.sae)} while features are chosen",
        f"operations: {needed.per_update / 1e12:.3g} TFLOP an update, {needed.learning / 1e15:.3g} PFLOP for all, "
        f"{needed.scoring / 1e15:.3g} PFLOP of scoring, {needed.written} tokens written",
        f"time: about {needed.seconds / 60:.3g} min at {speed.flops / 1e12:g} TFLOP/s (--teraflops)",
    )
