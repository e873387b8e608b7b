"""The state of SAE trainers on disk: one safetensors file for all layers, replaced atomically."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl import files
from featcl.errors import FeatclError
from featcl.features import saelens

STATE_FILE = "training-state.safetensors"


def save_state(path: Path, trainers: Mapping[int, Any], *, identity: str) -> None:
    """Write what the trainers need to go on: weights, Adam's moments, counters.

    Args:
        path: The file.
        trainers: Per layer; all after the same step.
        identity: Digest of what is being trained (model, data, settings, layers).
    """
    from safetensors.torch import save

    tensors, numbers = {}, {}
    for layer, trainer in trainers.items():
        found, numbers[str(layer)] = saelens.trainer_state(trainer)
        tensors |= {f"{layer}/{name}": tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    metadata = {"identity": identity, "numbers": json.dumps(numbers, sort_keys=True)}
    files.write_bytes(path, save(tensors, metadata=metadata))


def read_identity(path: Path) -> str | None:
    """What a state file belongs to; None where there is no file."""
    return _metadata(path)["identity"] if path.exists() else None


def restore_(path: Path, trainers: Mapping[int, Any]) -> int:
    """Put trainers where a state file says they were; returns the number of steps done."""
    from safetensors.torch import load_file

    tensors, numbers = load_file(path), json.loads(_metadata(path)["numbers"])
    for layer, trainer in trainers.items():
        prefix = f"{layer}/"
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        saelens.restore_trainer_(trainer, own, numbers[str(layer)])
    return int(next(iter(numbers.values()))["n_training_steps"])


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FeatclError(f"{path} is not a training state: {error}; delete it to train from the start") from None
    if not {"identity", "numbers"} <= metadata.keys():
        raise FeatclError(f"{path} is not a training state; delete it to train from the start")
    return metadata


@dataclass
class Stop:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


@contextmanager
def patient() -> Iterator[Stop]:
    """Within the block a first Ctrl-C or SIGTERM only sets `asked`, so that a step ends whole; a second interrupts."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(*_: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
