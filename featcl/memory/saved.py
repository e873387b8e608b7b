"""An attached memory as a folder, byte-stable: its weights, the kept state, its users' states, and a JSON manifest.

memory.safetensors   slow weights, gate, and what else the form has
state.safetensors    the kept state, where there is one
users.safetensors    the states by user
directions/          of a `FeatureMemory`
memory.json          what was attached where; the files' digests; written last
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from featcl import files
from featcl.errors import FeatclError
from featcl.features.directions import Directions
from featcl.memory.attach import AttachedMemory, attach_memory
from featcl.memory.features import FeatureMemory
from featcl.memory.neural import NeuralMemory
from featcl.memory.state import MemoryState
from featcl.memory.users import MemoryStates
from featcl.models import residual_map

MANIFEST, FORMAT = "memory.json", 1
WEIGHTS, STATE, USERS = "memory.safetensors", "state.safetensors", "users.safetensors"
DIRECTIONS = "directions"
_KEYS = ("family", "d_model", "layer", "form", "window", "kind", "memory", "directions")


def save_attached(folder: str | Path, attached: AttachedMemory) -> None:
    """Write the folder above; the same memory gives the same bytes.

    Args:
        folder: Made where it does not exist.
        attached: Of a `FeatureMemory` the directions are written too.

    Raises:
        FeatclError: If the folder cannot be written.
    """
    from safetensors.torch import save

    files.require_folder(folder)
    folder, here, read = Path(folder), residual_map(attached.model), attached.branch.read
    tensors = attached.tensors()
    files.write_bytes(folder / WEIGHTS, save({name: tensors[name].cpu().contiguous() for name in sorted(tensors)}))
    attached.users.save(folder / USERS)
    if isinstance(attached.memory, FeatureMemory):
        attached.memory.directions.save(folder / DIRECTIONS)
    if attached.state is None:
        (folder / STATE).unlink(missing_ok=True)
    else:
        attached.state.save(folder / STATE)
    manifest = {
        "format": FORMAT,
        "family": here.family,
        "d_model": here.d_model,
        "layer": attached.layer,
        "form": attached.form,
        "window": None if read is None else read.window,
        **made_of(attached.memory),
        "digests": {file: files.digest_file(folder / file) for file in _present(folder)},
    }
    files.write_json(folder / MANIFEST, manifest)


def load_memory(folder: str | Path, model: Any, *, memory: Any = None) -> AttachedMemory:
    """Attach to a model what `AttachedMemory.save` wrote, with its states; bit-equal.

    Args:
        folder: The folder.
        model: Of the family and width that the memory was attached to.
        memory: None makes one as it was.

    Raises:
        FeatclError: If the folder is damaged or made for another model or memory, or the block has a memory already.
    """
    folder = Path(folder)
    manifest, tensors = read_saved(folder)
    here, made_for = residual_map(model), (manifest["family"], manifest["d_model"])
    if (here.family, here.d_model) != made_for:
        raise FeatclError(
            f"{folder}: attached to {made_for[0]} of width {made_for[1]}, the model is {here.family} of {here.d_model}"
        )
    window = {} if manifest["window"] is None else {"window": manifest["window"]}
    memory = _again(folder, manifest) if memory is None else memory
    if made_of(memory) != {key: manifest[key] for key in made_of(memory)}:
        raise FeatclError(f"{folder}: another {manifest['kind']} was saved: settings or directions differ")
    attached = attach_memory(model, memory, layer=manifest["layer"], form=manifest["form"], **window)
    try:
        attached.branch.to(tensors["gate"].dtype)
        attached.load_tensors_(tensors)
        attached.state = MemoryState.load(folder / STATE) if STATE in manifest["digests"] else None
        attached.users = MemoryStates.load(folder / USERS)
    except FeatclError as error:
        attached.detach()
        raise FeatclError(f"{folder}: {error}") from error
    return attached


def _again(folder: Path, manifest: dict[str, Any]) -> NeuralMemory | FeatureMemory:
    """A memory of the same shape and features as the saved one."""
    try:
        if manifest["kind"] == FeatureMemory.__name__:
            return FeatureMemory(Directions.load(folder / DIRECTIONS), **manifest["memory"])
        return NeuralMemory(**manifest["memory"])
    except (TypeError, ValueError) as error:
        raise FeatclError(f"{folder} holds no memory that can be made again: {error}") from error


def read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and weights of a folder, every file as it was written.

    Raises:
        FeatclError: If it is no saved memory, of another format, or a file was changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        version, digests = manifest["format"], dict(manifest["digests"])
        tensors = load_file(folder / WEIGHTS)
        _ = [manifest[key] for key in _KEYS], tensors["gate"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FeatclError(f"{folder} holds no saved memory: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise FeatclError(f"{folder}: saved in format {version}, this featcl reads format {FORMAT}")
    for file in _present(folder) | digests.keys():
        if not (folder / file).is_file() or files.digest_file(folder / file) != digests.get(file):
            raise FeatclError(f"{folder}: {file} does not match its digest in {MANIFEST}; the file was changed")
    return manifest, tensors


def made_of(memory: Any) -> dict[str, Any]:
    """What a memory of the same shape is made of; a `FeatureMemory` has directions, of which the digest is kept."""
    directions = getattr(memory, "directions", None)
    digest = None if directions is None else directions.digest
    return {"kind": type(memory).__name__, "memory": memory.settings(), "directions": digest}


def _present(folder: Path) -> set[str]:
    return {file for file in (WEIGHTS, STATE, USERS) if (folder / file).is_file()}
