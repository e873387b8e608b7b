"""The SAE of a config that says how it is trained: made where it is not there yet, and held to what it has to reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featcl.config import SAETrainingConfig
from featcl.errors import FeatclError
from featcl.features import read_documents, train_saes
from featcl.features.provenance import Digests, refuse_overlap
from featcl.features.training import MANIFEST_FILE

OPTIONS = ("d_sae", "l0", "tokens", "context")
AT_MOST, AT_LEAST = ("fvu", "dead_fraction"), ("loss_recovered",)


def trained_sae(
    wanted: SAETrainingConfig, folder: Path, model: Any, tokenizer: Any, *, unseen: Digests
) -> dict[str, Any]:
    """Train the SAE, unless the folder holds one; one that misses its gate is an error, however it came there.

    Of several processes that want it one trains, and the others wait; an interrupted training goes on.

    Args:
        wanted: How, and the gate.
        folder: Where it is to lie.
        model: Whose activations it is trained on, with nothing learned yet.
        tokenizer: The model's.
        unseen: Digests of what is taught and scored.

    Returns:
        Its health on held-out text.

    Raises:
        FeatclError: If a text is missing or is taught or scored, or the SAE misses its gate.
    """
    with _alone(folder):
        if not (folder / MANIFEST_FILE).is_file():
            texts = [text for file in wanted.text for text in _read(file, tokenizer)]
            refuse_overlap({"features.train.text": texts}, unseen, tokenizer)
            train_saes(
                model, tokenizer, texts, layers=[wanted.layer], out=folder, **wanted.model_dump(include={*OPTIONS})
            )
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    if manifest.get("layer") != wanted.layer:
        raise FeatclError(f"{folder} was trained at block {manifest.get('layer')}, features.train.layer {wanted.layer}")
    health = manifest["held_out"]
    missed = [f"{name} {health[name]:.3g}, at most {getattr(wanted, name):g}" for name in AT_MOST
              if not health[name] <= getattr(wanted, name)]  # fmt: skip
    missed += [f"{name} {health[name]:.3g}, at least {getattr(wanted, name):g}" for name in AT_LEAST
               if not health[name] >= getattr(wanted, name)]  # fmt: skip
    if missed:
        raise FeatclError(
            f"{folder}: the SAE misses its gate on held-out text: {'; '.join(missed)}; train longer or wider into "
            "another folder, or move the gate in features.train"
        )
    return health


def _read(file: str, tokenizer: Any) -> list[Any]:
    if not Path(file).expanduser().is_file():
        raise FeatclError(f"features.train.text: {file} does not exist")
    return list(read_documents(file, tokenizer))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; a lock beside the folder, which its holder's death frees."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
