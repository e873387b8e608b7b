"""Tensors by name out of files that may come from anywhere; pickled objects are never built."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from featcl.errors import FeatclError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of an `.npz`, `.safetensors`, `.pt` or `.pth` file, float32; nothing in it is run.

    Raises:
        FeatclError: If the file is damaged, holds anything but tensors, or could run code.
    """
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".pt": _read_pt, ".pth": _read_pt}
    if path.suffix not in readers:
        raise FeatclError(f"{path} is no SAE file: {', '.join(readers)}, or a folder of SAELens")
    tensors = readers[path.suffix](path)
    if not tensors:
        raise FeatclError(f"{path} holds no tensors")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _read_npz(path: Path) -> dict[str, Tensor]:
    import pickle
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: torch.from_numpy(np.array(data[name])) for name in data.files}
    except (ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise FeatclError(
            f"{path} is not an archive of plain arrays (pickled objects can run code and are not read): "
            f"{one_line(error)}"
        ) from None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise FeatclError(f"{path} is not a complete .npz file: {one_line(error)}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FeatclError(f"{path} is not a safetensors file: {one_line(error)}") from None


def _read_pt(path: Path) -> dict[str, Tensor]:
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FeatclError(
            f"{path} is a pickle that holds more than tensors and could run code: {one_line(error)}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise FeatclError(f"{path} is not a complete pickle of tensors: {one_line(error)}") from None
    if not isinstance(state, dict):
        raise FeatclError(f"{path} holds a {type(state).__name__}, not a state dict of tensors")
    state = {name: torch.tensor(value) if isinstance(value, (int, float)) else value for name, value in state.items()}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise FeatclError(f"{path}: {name} is a {type(value).__name__}, not a tensor: a state dict is expected")
    return state


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, cut."""
    return " ".join(str(error).split())[:300]
