"""A TransformerLens bridge over a copy of a model, adapted or not. The only module that imports transformer_lens."""

from __future__ import annotations

import copy
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcl.errors import FeatclError
from featcl.models import inner_model

AGREEMENT = 1e-3
"""Largest difference of logits, relative to their largest, between model and bridge in float32 (measured: 1e-6)."""


def as_bridge(model: Any, tokenizer: Any = None) -> Any:
    """A TransformerLens `TransformerBridge` that computes what `model` computes, for the usual analyses.

    The bridge's constructor rewrites the Hugging Face model it is given: it renames state-dict keys, puts wrappers into
    the module tree and changes the attention implementation. So it gets a copy. An adapter's update is merged into
    that copy, or, where it acts by hooks of the model, remains in effect in it; either way the logits are compared
    before the bridge is handed out, so that an adapted model never comes back unadapted.

    Args:
        model: A Hugging Face causal LM, a PeftModel, or a `ConstrainedAdapter`; it is not changed. An adapter that is
            switched off stays off.
        tokenizer: Its tokenizer, or None for a bridge that reads token ids only. The bridge gets a copy that puts BOS
            before a text, as TransformerLens wants it.

    Returns:
        A `transformer_lens.model_bridge.TransformerBridge` on the model's device and in its dtype.

    Raises:
        FeatclError: If transformer_lens is missing or does not know the architecture, or if the bridge does not give
            the model's logits.
    """
    _require_transformer_lens()
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    wrapped = _peft_model(model)
    plain = _merged_copy(wrapped)
    architecture = type(plain).__name__
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise FeatclError(f"transformer_lens has no bridge for {architecture}")
    plain.config.architectures = [architecture]
    was_training = plain.training
    with tempfile.TemporaryDirectory() as folder:
        bridge = build_bridge_from_module(
            plain,
            architecture,
            hf_config=plain.config,
            tokenizer=None if tokenizer is None else _reloaded(tokenizer, Path(folder)),
            model_name=getattr(plain.config, "_name_or_path", "") or architecture,
        )
    bridge.train(was_training)
    _compare(bridge, wrapped)
    return bridge.requires_grad_(False)


def _require_transformer_lens() -> None:
    try:
        importlib.import_module("transformer_lens")
    except ModuleNotFoundError as error:
        name = (error.name or "transformer_lens").split(".")[0]
        raise FeatclError(
            f"a bridge needs the package {name}, which is not installed: pip install transformer-lens"
        ) from None


def _peft_model(model: Any) -> Any:
    """The Hugging Face or PEFT model, also of a `ConstrainedAdapter`."""
    return model if isinstance(model, nn.Module) else model.model


def _merged_copy(model: Any) -> Any:
    """A plain Hugging Face model that computes what `model` does; LoRA layers become their weight plus their update."""
    plain = inner_model(copy.deepcopy(model))
    for name, module in list(plain.named_modules()):
        if not hasattr(module, "base_layer"):
            continue
        base = module.base_layer
        if not hasattr(module, "get_delta_weight"):
            raise FeatclError(f"{name} is a {type(module).__name__}: only LoRA updates can be merged for a bridge")
        if not getattr(module, "disable_adapters", False) and not getattr(module, "merged", False):
            with torch.no_grad():
                for adapter in module.active_adapters:
                    if adapter in module.lora_A:
                        base.weight.copy_(base.weight.float() + module.get_delta_weight(adapter).float())
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, base)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def _reloaded(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer as loaded from a path, which transformer_lens reads it from once more to add BOS."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@torch.no_grad()
def _compare(bridge: Any, model: Any) -> None:
    device = next(model.parameters()).device
    config = inner_model(model).config.get_text_config()
    ids = torch.arange(7, 7 + 12, device=device)[None] * 5 % config.vocab_size
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.train(training)
    was_training = bridge.training
    found = bridge.eval()(ids, return_type="logits").float()
    bridge.train(was_training)
    error = float((found - expected).abs().max() / expected.abs().max())
    limit = AGREEMENT if next(model.parameters()).dtype in (torch.float32, torch.float64) else 50 * AGREEMENT
    if not error <= limit:
        raise FeatclError(
            f"the bridge does not give the model's logits (relative difference {error:.1e}, allowed {limit:.0e}): part "
            "of the model, such as an adapter attached in another way, did not come along"
        )
