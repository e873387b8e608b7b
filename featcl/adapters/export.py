"""A constrained adapter as a plain, byte-stable PEFT folder, and merged into a copy of its model.

The folder is one LoRA of one rank with scaling 1: `lora_alpha == r`, no bias, no patterns, float32, the norms' gains
already inside, smaller ranks padded with zeros. What reads plain LoRA reads it without featcl: PEFT, vLLM, and
llama.cpp's `convert_lora_to_gguf.py --base MODEL FOLDER`, which scales by `lora_alpha` over the rank of each tensor and
ignores everything else in the config. `load_peft` checks those rules.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featcl import files
from featcl.adapters.adapter import adapters_of, forget_adapters_
from featcl.adapters.hook_plan import HOOK_KINDS
from featcl.errors import FeatclError
from featcl.models import inner_model

if TYPE_CHECKING:
    from featcl.adapters.lora import LoraSite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module path -> (A [rank, d_in], B [d_out, rank]) with ΔW = B A."""

# What changes the meaning of A and B; a reader of plain LoRA may ignore it, so it must be off.
_OFF = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
        "fan_in_fan_out", "lora_bias", "alora_invocation_tokens", "trainable_token_indices")  # fmt: skip


# --- as PEFT


def peft_state(factors: Factors) -> dict[str, Tensor]:
    """PEFT's own names and float32 tensors of one rank: that of the largest, the others padded with zeros."""
    rank, state = max(a.shape[0] for a, _ in factors.values()), {}
    for name in sorted(factors):
        a, b = (factor.detach().float() for factor in factors[name])
        missing = rank - a.shape[0]
        a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
        for which, weight in (("lora_A", a), ("lora_B", b)):
            state[f"base_model.model.{name}.{which}.weight"] = weight.cpu().contiguous()
    return state


def save_peft(folder: str | Path, model: Any, sites: Sequence[LoraSite]) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; the same adapter gives the same bytes.

    Args:
        folder: Made where it does not exist.
        model: The adapted model, for the name of its base.
        sites: What it adapts.
    """
    from peft import LoraConfig
    from safetensors.torch import save

    factors = {site.name: site.factors() for site in sites}
    state = peft_state(factors)
    rank = max(a.shape[0] for a, _ in factors.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=sorted(factors),
        base_model_name_or_path=inner_model(model).config.name_or_path or None,
        inference_mode=True,
    )
    folder = Path(folder)
    record = {name: _sorted(value) for name, value in config.to_dict().items()}
    files.write_bytes(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    files.write_text(folder / CONFIG, json.dumps(record, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True, eq=False)
class PlainLora:
    """A PEFT folder that is a plain LoRA.

    Attributes:
        rank: Of every pair of factors.
        base: Name or folder of the model that it belongs to, or None.
        factors: By module path.
    """

    rank: int
    base: str | None
    factors: Factors


def load_peft(folder: str | Path) -> PlainLora:
    """Read a PEFT folder and check that it means the same to every reader of plain LoRA.

    Raises:
        FeatclError: If a file is missing or damaged, or one of the rules is broken: scaling 1, nothing but A and B,
            complete pairs of the config's rank, finite floats.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FeatclError(f"{folder} has no {missing[0]}: it is not a PEFT folder")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, OSError, SafetensorError) as error:
        raise FeatclError(f"{folder} is damaged: {error}") from error
    rank = config.get("r")
    if config.get("peft_type") != "LORA" or rank != config.get("lora_alpha") or config.get("bias") != "none":
        raise FeatclError(f"{folder / CONFIG}: not a LoRA with lora_alpha == r and no bias")
    if on := [key for key in _OFF if config.get(key)]:
        raise FeatclError(f"{folder / CONFIG}: {on[0]} is set, which readers of plain LoRA do not know")
    return PlainLora(rank, config.get("base_model_name_or_path"), _pairs(folder / WEIGHTS, tensors, rank))


def _pairs(file: Path, tensors: Mapping[str, Tensor], rank: int) -> Factors:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if parts is None:
            raise FeatclError(f"{file}: {name} is neither a lora_A nor a lora_B weight")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise FeatclError(f"{file}: {name} ({tensor.dtype}) does not hold finite floats")
        if tensor.ndim != 2 or tensor.shape[parts[2] == "B"] != rank:
            raise FeatclError(f"{file}: {name} is {list(tensor.shape)}, but the rank is {rank}")
        halves.setdefault(parts[1], {})[parts[2]] = tensor
    if not halves:
        raise FeatclError(f"{file} holds no tensors")
    if broken := sorted(name for name, pair in halves.items() if len(pair) < 2):
        raise FeatclError(f"{file}: {broken[0]} has only one of lora_A and lora_B")
    return {name: (halves[name]["A"], halves[name]["B"]) for name in sorted(halves)}


# --- merged


@torch.no_grad()
def add_update_(model: nn.Module, factors: Factors) -> None:
    """W ← W + B A in a plain model; the product is formed in float32 and rounded once to the weight's dtype.

    Raises:
        FeatclError: If a module is missing or of another shape; nothing is changed then.
    """
    weights: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        try:
            weights[name] = model.get_submodule(name).weight  # type: ignore[assignment]
        except AttributeError as error:
            raise FeatclError(f"the model has no linear {name}, which the adapter changes") from error
        if weights[name].shape != (b.shape[0], a.shape[1]):
            raise FeatclError(
                f"{name} is {list(weights[name].shape)}, the adapter's update {[b.shape[0], a.shape[1]]}: another model"
            )
    for name, weight in weights.items():
        a, b = (factor.to(weight.device) for factor in factors[name])
        weight.copy_(weight.float() + b.float() @ a.float())


def merged_copy(model: Any, sites: Sequence[LoraSite]) -> Any:
    """A plain Hugging Face model with W + B A, without other adapters; the model itself is left alone."""
    plain: Any = copy.deepcopy(model).unload()
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    for other in adapters_of(plain).values():
        if other.kind in HOOK_KINDS:
            other.remove()
    forget_adapters_(plain)
    add_update_(plain, {site.name: site.factors() for site in sites})
    return plain


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a plain Hugging Face folder, safetensors only, with the tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sorted(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _sorted(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)
