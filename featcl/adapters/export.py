"""A constrained adapter as a plain, byte-stable PEFT folder, and merged into a copy of its model."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcl import files
from featcl.adapters.lora import LoraSite


def peft_state(sites: Sequence[LoraSite]) -> dict[str, Tensor]:
    """PEFT's own state-dict names and float32 factors, whatever the live model's dtype or parametrisation."""
    state = {}
    for site in sorted(sites, key=lambda site: site.name):
        a, b = site.factors()
        for which, weight in (("lora_A", a), ("lora_B", b)):
            state[f"base_model.model.{site.name}.{which}.weight"] = weight.cpu().contiguous()
    return state


def save_peft(folder: str | Path, model: Any, sites: Sequence[LoraSite]) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; the same adapter gives the same bytes.

    Args:
        folder: Made where it does not exist.
        model: The PeftModel, for its config.
        sites: What it adapts.
    """
    from safetensors.torch import save

    folder = Path(folder)
    config = {name: _sorted(value) for name, value in model.active_peft_config.to_dict().items()}
    config |= {"inference_mode": True, "target_modules": sorted(site.name for site in sites)}
    files.write_bytes(folder / "adapter_model.safetensors", save(peft_state(sites), metadata={"format": "pt"}))
    files.write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def merged_copy(model: Any, sites: Sequence[LoraSite]) -> Any:
    """A plain Hugging Face model with W + B A; the model itself is left alone.

    The product is formed in float32 and rounded once to the weight's dtype.
    """
    plain: Any = copy.deepcopy(model).unload()
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    with torch.no_grad():
        for site in sites:
            a, b = site.factors()
            weight = plain.get_submodule(site.name).weight
            weight.copy_(weight.float() + b @ a)
    return plain


def _sorted(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _sorted(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)
