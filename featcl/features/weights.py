"""SAE files that are no SAELens folder, read into SAELens' names: Gemma Scope 1 and 2, and dictionary_learning.

    Gemma Scope           W_enc [d_model, d_sae], W_dec [d_sae, d_model], b_enc, b_dec, threshold, (scaling_factor)
    Gemma Scope 2         the same with w_enc, w_dec
    dictionary_learning   AutoEncoder             encoder.weight, encoder.bias, decoder.weight, bias
                          AutoEncoderNew          encoder.weight, encoder.bias, decoder.weight, decoder.bias
                          AutoEncoderTopK         encoder.weight, encoder.bias, decoder.weight, b_dec, k, (threshold)
                          BatchTopKSAE            the same; only its config.json tells the two apart
                          MatryoshkaBatchTopKSAE  W_enc, b_enc, W_dec, b_dec, k, threshold, group_sizes
                          JumpReluAutoEncoder     W_enc, b_enc, W_dec, b_dec, threshold
                          GatedAutoEncoder        encoder.weight, decoder.weight, decoder_bias, r_mag, and the
                                                  biases gate_bias and mag_bias

Nothing is guessed: a tensor too many, too few, or of another shape is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features.tensors import read_tensors

ARCHITECTURES = ("standard", "jumprelu", "topk", "batchtopk", "gated")
DICT_CLASSES = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "gated",
}
_BIASES = ("bias", "b_dec", "decoder.bias", "decoder_bias")
_PLAIN = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


@dataclass(frozen=True, eq=False)
class SAEParts:
    """An SAE in SAELens' names: settings without metadata, and float32 weights."""

    config: dict[str, Any]
    weights: dict[str, Tensor]


def read_parts(path: Path, *, architecture: str | None = None) -> SAEParts:
    """Read a weight file of any of the forms above; which one it is follows from the names of its tensors.

    Args:
        path: `.npz`, `.safetensors`, `.pt` or `.pth`; dictionary_learning's `config.json` is read where it lies beside.
        architecture: One of `ARCHITECTURES`, where the file alone does not tell.

    Raises:
        FeatclError: If the file is damaged, holds anything but tensors, or does not fit one form exactly.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise FeatclError(f"SAE architecture {architecture!r} is unknown: one of {', '.join(ARCHITECTURES)}")
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FeatclError(f"{path}: {name} holds NaN or infinite values")
    if "encoder.weight" in tensors or path.suffix in (".pt", ".pth"):
        return _dictionary_learning(path, tensors, architecture or _configured_architecture(path))
    return _gemma_scope(path, {"W_" + k[2:] if k.startswith("w_") else k: t for k, t in tensors.items()})


def sibling_config(path: Path) -> dict[str, Any]:
    """The `config.json` beside a weight file; empty where there is none."""
    try:
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FeatclError(f"{path.parent / 'config.json'} is not JSON: {error}") from None
    return config if isinstance(config, dict) else {}


# --- forms ------------------------------------------------------------------------------------------------------------


def _gemma_scope(path: Path, tensors: dict[str, Tensor]) -> SAEParts:
    if "affine_skip_connection" in tensors:
        raise FeatclError(f"{path} is a transcoder with a skip connection, not an SAE")
    _only(path, tensors, _PLAIN, optional={"scaling_factor"})
    sizes = _sizes(path, tensors, "b_dec", "b_enc")
    for name in ("W_enc", "W_dec", "threshold"):
        _shape(path, tensors, name, sizes)
    weights = {name: tensors[name] for name in _PLAIN}
    if "scaling_factor" in tensors and not bool((tensors["scaling_factor"] == 1).all()):
        # pre-6 SAELens multiplied feature activations by it before decoding: x̂ = (s ⊙ f) W_dec + b_dec
        _shape(path, tensors, "scaling_factor", sizes)
        weights["W_dec"] = tensors["scaling_factor"][:, None] * tensors["W_dec"]
    return _parts(path, "jumprelu", weights, apply_b_dec_to_input=False)


def _dictionary_learning(path: Path, tensors: dict[str, Tensor], architecture: str | None) -> SAEParts:
    if "r_mag" in tensors:
        return _gated(path, tensors)
    b_dec = [name for name in _BIASES if name in tensors]
    if len(b_dec) != 1:
        raise FeatclError(f"{path} has {b_dec or 'no'} decoder bias; expected one of {', '.join(_BIASES)}")
    linear = "encoder.weight" in tensors
    names = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"} if linear else {}
    names = {name: names.get(name, name) for name in ("W_enc", "W_dec", "b_enc")} | {"b_dec": b_dec[0]}
    _only(path, tensors, set(names.values()), optional={"k", "threshold", "group_sizes"})
    sizes = _sizes(path, tensors, names["b_dec"], names["b_enc"])
    for name in ("W_enc", "W_dec"):
        _shape(path, tensors, names[name], sizes)
    weights = {name: _oriented(tensors, names[name]) for name in names}
    kind = _kind(path, tensors, architecture, linear=linear)
    if kind == "standard":
        return _parts(path, "standard", weights, apply_b_dec_to_input=b_dec[0] != "decoder.bias")
    if kind == "topk":
        return _parts(path, "topk", weights, k=_count(path, tensors), rescale_acts_by_decoder_norm=False)
    weights["threshold"] = _threshold(path, tensors, sizes["d_sae"])
    return _parts(path, "jumprelu", weights, apply_b_dec_to_input=kind == "batchtopk")


def _gated(path: Path, tensors: dict[str, Tensor]) -> SAEParts:
    names = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_dec": "decoder_bias", "b_gate": "gate_bias",
             "b_mag": "mag_bias", "r_mag": "r_mag"}  # fmt: skip
    _only(path, tensors, set(names.values()))
    sizes = _sizes(path, tensors, "decoder_bias", "gate_bias")
    for name in ("encoder.weight", "decoder.weight", "mag_bias", "r_mag"):
        _shape(path, tensors, name, sizes)
    return _parts(path, "gated", {name: _oriented(tensors, key) for name, key in names.items()})


def _kind(path: Path, tensors: dict[str, Tensor], architecture: str | None, *, linear: bool) -> str:
    """`standard`, `topk`, `batchtopk` or `jumprelu`, from what is stored and what was said; both must agree."""
    has_k, has_threshold = "k" in tensors, "threshold" in tensors
    if has_k and has_threshold and linear:
        possible = ("topk", "batchtopk")
    elif has_threshold:
        possible = ("batchtopk",) if has_k or linear else ("jumprelu",)
    else:
        possible = ("topk",) if has_k else ("standard",) if linear else ()
    if not possible:
        raise FeatclError(f"{path} lacks threshold, expected with shape [d_sae]")
    if architecture is None and len(possible) > 1:
        raise FeatclError(
            f"{path} holds both k and threshold, as TopK and BatchTopK SAEs do: say architecture='topk' or "
            "'batchtopk', or keep dictionary_learning's config.json beside it"
        )
    if architecture is not None and architecture not in possible:
        raise FeatclError(f"{path} holds {sorted(tensors)}, which is {' or '.join(possible)}, not {architecture}")
    return architecture or possible[0]


def _configured_architecture(path: Path) -> str | None:
    trainer = sibling_config(path).get("trainer")
    dict_class = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if dict_class is None:
        return None
    if dict_class not in DICT_CLASSES:
        raise FeatclError(f"{path}: its config.json calls it {dict_class}; known are {', '.join(DICT_CLASSES)}")
    return DICT_CLASSES[dict_class]


def _count(path: Path, tensors: dict[str, Tensor]) -> int:
    k = tensors["k"]
    if k.numel() != 1 or not float(k) >= 1 or float(k) != int(k):
        raise FeatclError(f"{path}: k is {k.tolist()}, expected one positive integer")
    return int(k)


def _threshold(path: Path, tensors: dict[str, Tensor], d_sae: int) -> Tensor:
    threshold = tensors["threshold"]
    if threshold.numel() == 1 and d_sae != 1:
        if float(threshold) < 0:
            raise FeatclError(f"{path}: threshold is {float(threshold):g}, which training never set; train longer")
        return threshold.reshape(1).repeat(d_sae)
    if list(threshold.shape) != [d_sae]:
        raise FeatclError(f"{path}: threshold has shape {list(threshold.shape)}, expected [{d_sae}] or one number")
    return threshold


def _parts(path: Path, architecture: str, weights: dict[str, Tensor], **settings: Any) -> SAEParts:
    d_in, d_sae = weights["W_enc"].shape
    if d_in == d_sae:
        _check_square(path, weights["W_enc"], weights["W_dec"])
    config = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": True, **settings}
    return SAEParts(config, {name: tensor.contiguous() for name, tensor in weights.items()})


# --- shapes -----------------------------------------------------------------------------------------------------------


def _only(path: Path, tensors: dict[str, Tensor], wanted: set[str], *, optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    if missing := sorted(wanted - tensors.keys()):
        what = "[d_sae]" if missing[0] in ("threshold", "b_enc") else "the shape of the form"
        raise FeatclError(
            f"{path} lacks {missing[0]}, expected with shape {what}; it holds {', '.join(sorted(tensors))}"
        )
    if unknown := sorted(tensors.keys() - wanted - optional):
        raise FeatclError(f"{path} holds {unknown[0]}, which no known SAE form has beside {', '.join(sorted(wanted))}")


def _sizes(path: Path, tensors: dict[str, Tensor], b_dec: str, b_enc: str) -> dict[str, int]:
    """d_model and d_sae, read off the two biases: the only tensors whose shape does not depend on a convention."""
    for name in (b_dec, b_enc):
        if tensors[name].ndim != 1:
            raise FeatclError(f"{path}: {name} has shape {list(tensors[name].shape)}, expected a vector")
    return {"d_model": len(tensors[b_dec]), "d_sae": len(tensors[b_enc])}


_AXES = {"W_enc": ("d_model", "d_sae"), "W_dec": ("d_sae", "d_model"),
         "encoder.weight": ("d_sae", "d_model"), "decoder.weight": ("d_model", "d_sae")}  # fmt: skip


def _shape(path: Path, tensors: dict[str, Tensor], name: str, sizes: dict[str, int]) -> None:
    axes = _AXES.get(name, ("d_sae",))
    found, expected = list(tensors[name].shape), [sizes[axis] for axis in axes]
    if found != expected:
        hint = ": it is transposed" if found == expected[::-1] else ""
        raise FeatclError(f"{path}: {name} has shape {found}, expected [{', '.join(axes)}] = {expected}{hint}")


def _oriented(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[name].T if name in ("encoder.weight", "decoder.weight") else tensors[name]


def _check_square(path: Path, W_enc: Tensor, W_dec: Tensor) -> None:
    """With d_sae = d_model no shape gives a transposed decoder away; but encoder columns resemble decoder rows."""
    cosine = torch.nn.functional.cosine_similarity
    straight, swapped = cosine(W_enc.T, W_dec, dim=-1).mean(), cosine(W_enc.T, W_dec.T, dim=-1).mean()
    if swapped > straight + 0.2:
        raise FeatclError(
            f"{path}: its decoder is transposed: the columns of W_dec resemble the encoder (mean cosine "
            f"{swapped:.2f}), its rows do not ({straight:.2f})"
        )
