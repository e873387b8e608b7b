"""The training loop: SAELens' trainers of several layers in lockstep over the same tokens, resumable and logged."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcl import files
from featcl.errors import FeatclError
from featcl.features import saelens
from featcl.features.checkpoint import STATE_FILE, patient, read_identity, restore_, save_state
from featcl.features.hooks import Hook, width
from featcl.features.settings import SAESettings
from featcl.features.shuffled import Windows, progress, shuffled_activations

METRICS_FILE = "metrics.jsonl"
SAVE_EVERY = 120.0
"""Seconds between two saved states."""
LOGGED = 200
"""About so many lines of metrics per layer."""
SAMPLE = 16384
"""Activations that scale the trainer at its start, and as many that set BatchTopK's threshold at its end."""


@dataclass(frozen=True)
class Job:
    """Everything that a training run is a function of."""

    model: Any
    tokenizer: Any
    windows: Windows
    hooks: dict[int, Hook]
    settings: SAESettings
    metadata: dict[str, Any]
    folders: dict[int, Path]
    out: Path
    identity: str


def fit(job: Job, *, overwrite: bool) -> dict[int, Any]:
    """Run SAELens' trainers in lockstep over the same tokens, from the start or from a saved state."""
    settings, state = job.settings, job.out / STATE_FILE
    steps, warm_up = max(1, settings.tokens // settings.batch_size), max(1, SAMPLE // settings.batch_size)
    trainers, done, batches = _begin(job, warm_up, resume=_belongs(state, job, overwrite=overwrite))
    metrics = {layer: folder / METRICS_FILE for layer, folder in job.folders.items()}
    for path in metrics.values():
        _keep_lines(path, done)
    saved, first = time.monotonic(), done
    with patient() as stop:
        for batch in progress(islice(batches, steps - first), "training", steps - first, lambda _: 1):
            measure = done % max(1, steps // LOGGED) == 0 or done == steps - 1
            for position, (layer, trainer) in enumerate(trainers.items()):
                found = saelens.train_step_(trainer, batch[:, position].contiguous(), measure=measure)
                _require_finite(found["loss"], layer, settings)
                if measure:
                    _append(metrics[layer], {"step": done, "tokens": (done + 1) * settings.batch_size, **found})
            done += 1
            if stop.asked or time.monotonic() - saved >= SAVE_EVERY:
                save_state(state, trainers, identity=job.identity)
                saved = time.monotonic()
            if stop.asked:
                raise KeyboardInterrupt(f"the state is saved in {job.out}; the same command goes on from there")
    if len(trainers) > 1:  # so that being killed between two SAEs loses none
        save_state(state, trainers, identity=job.identity)
    recent = torch.cat(list(islice(batches, warm_up)))
    return {
        layer: saelens.finish(trainer, recent[:, position], l0=float(settings.l0 or 1))
        for position, (layer, trainer) in enumerate(trainers.items())
    }


def _begin(job: Job, warm_up: int, *, resume: bool) -> tuple[dict[int, Any], int, Iterator[Tensor]]:
    """Trainers, how many steps they have done, and the batches that follow."""
    if resume:
        trainers = _trainers(
            job,
            torch.ones(1, len(job.hooks), width(job.model, next(iter(job.hooks.values()))), device=job.model.device),
        )
        done = restore_(job.out / STATE_FILE, trainers)
        return trainers, done, _batches(job, warm_up + done)
    batches = _batches(job, 0)
    sample = torch.cat(list(islice(batches, warm_up)))
    if not torch.isfinite(sample).all():
        raise FeatclError("the model's activations are not finite: no SAE can be trained on them")
    return _trainers(job, sample), 0, batches


def _trainers(job: Job, sample: Tensor) -> dict[int, Any]:
    return {
        layer: saelens.make_trainer(
            sample[:, position],
            asdict(job.settings),
            metadata=job.metadata | {"hook_name": hook.hook_name, "hf_hook_name": hook.hf_hook_name},
            seed=job.settings.seed + layer,
        )
        for position, (layer, hook) in enumerate(job.hooks.items())
    }


def _batches(job: Job, start: int) -> Iterator[Tensor]:
    settings = job.settings
    return shuffled_activations(
        job.model,
        job.tokenizer,
        job.windows,
        hooks=list(job.hooks.values()),
        batch_size=settings.batch_size,
        tokens=settings.tokens,
        seed=settings.seed,
        start=start,
    )


def _belongs(state: Path, job: Job, *, overwrite: bool) -> bool:
    """Whether there is a state to go on from; one of another training is an error, unless it may be overwritten."""
    found = read_identity(state)
    if found is not None and found != job.identity and not overwrite:
        raise FeatclError(
            f"{state} belongs to a training with another model, text, layers or settings: go on with those, choose "
            "another folder, or ask to overwrite it"
        )
    return found == job.identity


def _require_finite(loss: float, layer: int, settings: SAESettings) -> None:
    if not loss < float("inf"):
        raise FeatclError(f"the SAE of layer {layer} diverged (loss {loss}): use a smaller lr than {settings.lr}")


def _append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _keep_lines(path: Path, steps: int) -> None:
    """Drop what was logged after the state was saved, and half a line."""
    if not path.exists():
        return
    lines = path.read_text("utf-8").split("\n")[:-1]
    files.write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] < steps))
