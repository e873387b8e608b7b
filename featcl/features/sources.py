"""Where an SAE comes from: the laboratory, a folder, a weight file, or a release on the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MethodType
from typing import Any

from featcl.errors import FeatclError
from featcl.features import hooks, hub, layouts, saelens, weights
from featcl.features.folders import load_folder
from featcl.features.releases import load_release
from featcl.features.saelens import CONFIG_FILE, SAE, WEIGHTS_FILE

ASSETS = Path(__file__).parents[1] / "lab" / "assets"
RAW_FILES = ("params.npz", "params.safetensors", "ae.pt")
"""Weight files by their customary names, looked for in a folder that is not one of SAELens."""


def load_sae(
    source: str | Path,
    sae_id: str | None = None,
    *,
    device: Any = None,
    revision: str | None = None,
    offline: bool = False,
    hook_name: str | None = None,
    prepend_bos: bool | None = None,
    architecture: str | None = None,
    activation_scale: float | None = None,
    model: Any = None,
    tokenizer: Any = None,
    check: bool = True,
) -> SAE:
    """An SAELens SAE in float32, evaluation mode, without gradients, checked for shape and finite values.

    An attention SAE takes and gives its heads side by side, [..., heads · d_head], as Hugging Face modules have them.

    Args:
        source: `lab/<model>/<sae>`; a folder of SAELens; `params.npz`, `params.safetensors` or a `.pt` state dict of
            dictionary_learning, or the folder that holds one; a SAELens release, or a Hugging Face repository.
        sae_id: The id within a release or the folder within a repository. `release/sae_id` in one string works too,
            and so does `release/sae_id@revision`.
        device: Where to put it; None is the CPU.
        revision: Branch, tag or commit of the repository; None is the newest, or without network the newest cached.
        offline: Use the cache only.
        hook_name: Where the SAE was trained, in either spelling, where the files do not say so.
        prepend_bos: Whether it was trained on texts that start with BOS, where the files do not say so.
        architecture: `topk` or `batchtopk`, where a state dict fits both.
        activation_scale: What activations were multiplied with in training, if that is not folded into the weights.
        model: The model it will be used on: hook and width are resolved at once, and the resolution is printed.
        tokenizer: Its tokenizer: with it a few hundred tokens are reconstructed, and an SAE that does not fit raises.
        check: False leaves that reconstruction out.

    Raises:
        FeatclError: If it is missing, holds code, is misshapen, not finite, does not fit the model, or sae-lens is not
            installed.
    """
    saelens.require_sae_lens()
    text, where = str(source), str(device or "cpu")
    if sae_id is None and (found := _split_release(text)):
        text, sae_id, revision = found[0], found[1], revision or found[2]
    if sae_id is None:
        sae = _load_local(text, where, architecture)
        sae.cfg.metadata["source"] = text
    else:
        sae = load_release(text, sae_id, device=where, revision=revision, offline=offline)
        sae.cfg.metadata["source"] = f"{text}/{sae_id}"
    _describe_(sae, hook_name, prepend_bos)
    saelens.settle_(sae, activation_scale=activation_scale)
    if model is not None:
        hook = hooks.resolve(model, sae)
        sae.cfg.metadata["hf_hook_name"] = hook.hf_hook_name
        print(f"SAE {sae.cfg.metadata['source']}: {hook}", file=sys.stderr)
        if check and tokenizer is not None:
            from featcl.features.diagnosis import quick_check

            quick_check(sae, model, tokenizer)
    sae._repr_html_ = MethodType(_card, sae)  # SAELens' class has none
    return sae


def _card(sae: SAE) -> str:
    """What Jupyter shows of an SAE."""
    from featcl.features.show import sae_card

    return sae_card(sae)


def _describe_(sae: SAE, hook_name: str | None, prepend_bos: bool | None) -> None:
    """Fill in what the caller says and what one spelling of the hook tells about the other."""
    metadata = sae.cfg.metadata
    if hook_name is not None:
        if hooks.tl_name(hook_name) is None:
            raise FeatclError(f"hook_name {hook_name!r} is none that SAEs are read at here, such as "
                              "blocks.3.hook_resid_post or model.layers.3.output")  # fmt: skip
        metadata["hook_name"], metadata["hf_hook_name"] = hooks.tl_name(hook_name), None
    if metadata["hook_name"] is None and isinstance(metadata["hf_hook_name"], str):
        metadata["hook_name"] = hooks.tl_name(metadata["hf_hook_name"]) or metadata["hf_hook_name"]
    if metadata["hook_name"] is None:
        print(f"SAE {metadata['source']} does not say where it was trained; hook_name= tells", file=sys.stderr)
    elif metadata["hf_hook_name"] is None:
        metadata["hf_hook_name"] = hooks.hf_name(metadata["hook_name"])
    if prepend_bos is not None:
        metadata["prepend_bos"] = prepend_bos


def _split_release(source: str) -> tuple[str, str, str | None] | None:
    """`release/sae_id[@revision]`, where it begins with a release that SAELens knows and is no path on this machine."""
    release, _, rest = source.partition("/")
    if not rest or source.startswith("lab/") or Path(source).exists() or release not in saelens.directory():
        return None
    sae_id, _, revision = rest.partition("@")
    return release, sae_id, revision or None


def _load_local(source: str, device: str, architecture: str | None) -> SAE:
    path = _path(source)
    if path.is_file() and path.name in (WEIGHTS_FILE, CONFIG_FILE):
        path = path.parent
    if path.is_dir():
        raw = next((path / name for name in RAW_FILES if (path / name).exists()), None)
        if raw is None or (path / WEIGHTS_FILE).exists():
            return load_folder(path, device)
        path = raw
    if why := layouts.refusal(str(path)):
        raise FeatclError(f"{path}: {why}")
    parts = weights.read_parts(path, architecture=architecture)
    metadata = layouts.metadata_of(str(path.absolute()), weights.sibling_config(path))
    return saelens.from_parts(parts, metadata | {"revision": hub.commit_of(path)}, device)


def _path(source: str) -> Path:
    path = ASSETS / source.removeprefix("lab/") if source.startswith("lab/") else Path(source).expanduser()
    if path.exists():
        return path
    if source in saelens.directory():
        ids = list(saelens.directory()[source].saes_map)
        raise FeatclError(f"SAE release {source} needs an id as well: {', '.join(ids[:5])}{', …' * (len(ids) > 5)}")
    shipped = ", ".join(sorted(f"lab/{p.parent.relative_to(ASSETS)}" for p in ASSETS.glob(f"*/*/{CONFIG_FILE}")))
    raise FeatclError(
        f"SAE {source} is not a folder on this machine; a SAELens release needs its sae_id as well"
        + (f"; shipped: {shipped}" if shipped else "")
    )
