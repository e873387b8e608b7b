"""What the place of a weight file tells about its SAE: Gemma Scope's and dictionary_learning's folder names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from featcl.features.hooks import tl_name

_POINTS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z",
           "resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}  # fmt: skip
_SCOPE_1 = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)\b")
_SCOPE_2 = re.compile(r"gemma-scope-2-(\d+[bm])-(pt|it)\b")
_SCOPE_1_LAYER = re.compile(r"(?:^|/)layer_(\d+)/width_\w+(?:/|$)")
_SCOPE_2_LAYER = re.compile(r"(?:^|/)(resid_post|mlp_out|attn_out)(?:_all)?/layer_(\d+)(?:_|/|$)")
_DL_LAYER = re.compile(r"(?:^|/)(resid_post|mlp_out)_layer_(\d+)(?:/|$)")


def metadata_of(location: str, config: dict[str, Any]) -> dict[str, Any]:
    """Hook, model and BOS convention as far as folder names and a `config.json` tell; else the key is left out.

    A Gemma Scope 1 folder (`layer_20/width_16k/…`) outside of its repository's folder is taken for a residual SAE,
    since only the repository's name tells the three kinds apart.

    Args:
        location: The file's path, or repository and path.
        config: The `config.json` beside the file, or {}.

    Source: the repositories google/gemma-scope-*, google/gemma-scope-2-*, and dictionary_learning's trainers.
    """
    location = location.replace("\\", "/")
    found: dict[str, Any] = {}
    if match := _SCOPE_2_LAYER.search(location):
        found = _gemma(match[2], _POINTS[match[1]])
        if model := _SCOPE_2.search(location):
            found["model_name"] = f"google/gemma-3-{model[1]}-{model[2]}"
    elif match := _SCOPE_1_LAYER.search(location):
        model = _SCOPE_1.search(location)
        found = _gemma(match[1], _POINTS[model[3] if model else "res"])
        if model:
            found["model_name"] = f"gemma-2-{model[1]}" + ("-it" if model[2] == "it" else "")
    elif match := _DL_LAYER.search(location):
        found = {"hook_name": f"blocks.{match[2]}.{_POINTS[match[1]]}"}
    return found | _configured(config)


def _gemma(layer: str, point: str) -> dict[str, Any]:
    found: dict[str, Any] = {"hook_name": f"blocks.{layer}.{point}", "prepend_bos": True}
    if point == "hook_mlp_out":  # Gemma-2 and Gemma-3 have a norm there
        found["hf_hook_name"] = f"model.layers.{layer}.post_feedforward_layernorm.output"
    return found


def _configured(config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(name := config.get("hf_hook_point_in"), str):  # Gemma Scope 2
        known = {"hf_hook_name": name, "hook_name": tl_name(name)}
        return {key: value for key, value in known.items() if value}
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or not isinstance(layer := trainer.get("layer"), int):
        return {}
    submodule = str(trainer.get("submodule_name") or f"resid_post_layer_{layer}")
    match = _DL_LAYER.search(submodule)
    found = {"hook_name": f"blocks.{layer}.{_POINTS[match[1]]}"} if match else {}
    return found | ({"model_name": trainer["lm_name"]} if isinstance(trainer.get("lm_name"), str) else {})


def refusal(location: str) -> str | None:
    """Why an SAE at such a place is none of the residual stream; None if nothing speaks against it."""
    name = Path(location.replace("\\", "/")).as_posix()
    if re.search(r"transcoder|(?:^|/)clt", name):
        return "a transcoder maps one place to another; an SAE is needed"
    if re.search(r"(?:^|/)embedding(?:/|$)", name):
        return "it was trained on token embeddings, which no block has written to yet"
    return None
