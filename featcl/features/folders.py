"""Folders in SAELens' form, `cfg.json` and `sae_weights.safetensors`: every fault named before SAELens reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.features import saelens
from featcl.features.saelens import CONFIG_FILE, SAE, WEIGHTS_FILE
from featcl.features.tensors import one_line

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def load_folder(folder: Path, device: str) -> SAE:
    """The SAE in a folder that SAELens' `save_model` or `save_inference_model` wrote.

    Raises:
        FeatclError: If a file is missing, malformed, or does not fit the other.
    """
    if not (folder / WEIGHTS_FILE).exists():
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        found = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
        raise FeatclError(f"SAE folder {folder} holds no {WEIGHTS_FILE}{found}")
    check_folder(folder)
    try:
        sae = saelens.from_folder(folder, device)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FeatclError(f"SAE folder {folder}: {one_line(error)}") from error
    if not isinstance(sae.cfg.metadata["hook_name"] or sae.cfg.metadata["hf_hook_name"], str):
        raise FeatclError(f"SAE {folder}: its configuration names no hook_name in metadata")
    return sae


def check_folder(folder: Path) -> None:
    """Raise unless the configuration can be read and the weights have the shapes that it asks for."""
    config = _read_config(folder)
    d_in, d_sae = config["d_in"], config["d_sae"]
    expected = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    if config.get("architecture") == "jumprelu":
        expected |= {"b_enc": [d_sae], "threshold": [d_sae]}
    shapes = _shapes(folder / WEIGHTS_FILE)
    for name, shape in expected.items():
        if name not in shapes:
            raise FeatclError(f"{folder / WEIGHTS_FILE} lacks {name}, expected with shape {shape}")
        if shapes[name] != shape:
            hint = ": it is transposed" if shapes[name] == shape[::-1] else ""
            raise FeatclError(f"{folder / WEIGHTS_FILE}: {name} has shape {shapes[name]}, expected {shape}{hint}")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    except FileNotFoundError:
        raise FeatclError(f"SAE folder {folder} holds no {CONFIG_FILE}") from None
    except ValueError as error:
        raise FeatclError(f"{folder / CONFIG_FILE} is not JSON: {one_line(error)}") from None
    if not isinstance(config, dict) or not {"d_in", "d_sae"} <= config.keys():
        raise FeatclError(f"{folder / CONFIG_FILE} does not give d_in and d_sae")
    return config


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FeatclError(f"{path} is not a safetensors file: {one_line(error)}") from None
