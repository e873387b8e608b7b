"""Training SAEs with SAELens' own trainer on activations from our own hooks: several layers in one pass, no hub.

A training run can be killed at any time: the same call goes on from its last saved state, to the same weights. Its
manifest names the model, the data, the settings and the versions, and `train_like` makes the same weights from it.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from featcl import files
from featcl.errors import FeatclError
from featcl.features import saelens
from featcl.features.activations import check_layers
from featcl.features.check import SAEHealth, check_sae
from featcl.features.checkpoint import STATE_FILE
from featcl.features.fitting import Job, fit
from featcl.features.hooks import resolve, width
from featcl.features.settings import SITES, SAESettings, complete, fit_batch, given
from featcl.features.sources import load_sae
from featcl.features.tokens import Text, adds_bos, read_documents, texts_digest, token_windows
from featcl.models import inner_model, load_model, model_digest

MANIFEST_FILE = "featcl.json"
HELD_OUT = 20
"""Every 20th window is kept from training, and the finished SAE is checked on those."""


@dataclass(frozen=True)
class TrainedSAE:
    """A finished SAE: where it lies, how good it is on held-out windows, and what it cost."""

    layer: int
    folder: Path
    health: SAEHealth
    tokens: int
    seconds: float


def train_from_files(
    model_name: str, text_files: Sequence[str | Path], layers: Sequence[int], out: str | Path, **options: Any
) -> dict[int, TrainedSAE]:
    """`train_saes` on a model and files by name.

    Args:
        model_name: What `load_model` takes.
        text_files: `.txt` (documents are separated by form feeds), `.jsonl` (trajectories, or texts), each also
            with `.gz`; cut into windows.
        layers: Blocks whose outputs get an SAE each.
        out: Folder to write; see `train_saes`.
        options: As for `train_saes`; `like` (a manifest) trains that again, and layers may then be empty.
    """
    saelens.require_sae_lens()
    if not text_files:
        raise FeatclError("training an SAE needs at least one text file")
    if missing := [str(path) for path in text_files if not Path(path).is_file()]:
        raise FeatclError(f"text file {missing[0]} does not exist")
    files.require_folder(out)
    like = options.pop("like", None)
    if like is not None and layers:
        raise FeatclError("a manifest names its layers: give either layers or a manifest to train like")
    model, tokenizer = load_model(model_name)
    texts = [text for path in text_files for text in read_documents(path, tokenizer)]
    if like is not None:
        return train_like(like, model, tokenizer, texts, out=out, overwrite=options.get("overwrite", False))
    return train_saes(model, tokenizer, texts, layers=layers, out=out, **options)


def train_saes(
    model: Any,
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    layers: Sequence[int],
    out: str | Path,
    overwrite: bool = False,
    **options: Any,
) -> dict[int, TrainedSAE]:
    """Train one SAE per layer in the same pass over the texts, save them and check them on held-out windows.

    Each folder gets the SAE in SAELens' form, `metrics.jsonl` and the manifest `featcl.json`. While it trains, `out`
    holds the state; a call with the same model, texts, layers and settings goes on from it.

    Args:
        model: A causal LM, in memory; it is not changed.
        tokenizer: Its tokenizer.
        texts: Strings, or token ids.
        layers: Blocks whose outputs get an SAE each.
        out: For one layer the SAE's folder itself; for several the folder that will hold `{site}_{L}`.
        overwrite: Replace what is there; otherwise an existing SAE, or the state of another training, is an error.
        options: Fields of `SAESettings`.

    Returns:
        Per layer: folder, health on held-out windows, cost.

    Raises:
        FeatclError: For an unknown option, a layer that does not exist, too little text, an occupied folder, or values
            that are not finite.
        KeyboardInterrupt: After Ctrl-C, with the state saved.
    """
    started = time.perf_counter()
    check_layers(model, layers)
    settings = given(options)
    hooks = {layer: resolve(model, SITES[settings.site].format(layer)) for layer in layers}
    folders = {L: Path(out) if len(layers) == 1 else Path(out) / f"{settings.site}_{L}" for L in layers}
    for folder in folders.values():
        if (folder / saelens.CONFIG_FILE).exists() and not overwrite and not (Path(out) / STATE_FILE).exists():
            raise FeatclError(f"{folder} holds an SAE already: choose another folder, or ask to overwrite it")
    settings = complete(settings, model, width(model, hooks[layers[0]]))
    texts = list(texts)
    prepend_bos = adds_bos(tokenizer) or _all_start_with(texts, tokenizer.bos_token_id)
    windows = list(token_windows(tokenizer, texts, context=int(settings.context or 0), prepend_bos=prepend_bos))
    kept = set(range(HELD_OUT - 1, len(windows), HELD_OUT)) or {len(windows) - 1}
    held_out = [window for i, window in enumerate(windows) if i in kept]
    training = [window for i, window in enumerate(windows) if i not in kept]
    settings = fit_batch(settings, training)
    manifest = _manifest(model, texts, settings, layers)

    job = Job(
        model, tokenizer, training, hooks, settings, _metadata(model, settings, prepend_bos), folders, Path(out),
        files.digest_json({name: part for name, part in manifest.items() if name != "runtime"}),
    )  # fmt: skip
    saes = fit(job, overwrite=overwrite)
    trained = {}
    for layer, folder in folders.items():
        saelens.save_trained(saes[layer], folder, storage=settings.storage)
        loaded = load_sae(folder, device=model.device)
        health = check_sae(loaded, model, tokenizer, held_out, context=settings.context, strict=False)
        record = {"layer": layer, "hook_name": hooks[layer].hook_name, "held_out": health.record()}
        weights = {"weights_digest": files.digest_file(folder / saelens.WEIGHTS_FILE)}
        files.write_json(folder / MANIFEST_FILE, manifest | record | weights)
        trained[layer] = TrainedSAE(layer, folder, health, settings.tokens, time.perf_counter() - started)
    (job.out / STATE_FILE).unlink(missing_ok=True)
    return trained


def train_like(
    manifest: str | Path, model: Any, tokenizer: Any, texts: Iterable[Text], *, out: str | Path, overwrite: bool = False
) -> dict[int, TrainedSAE]:
    """Train once more what a manifest records; on the same device and threads, to the same bits.

    Args:
        manifest: A `featcl.json`, or the folder of an SAE that holds one.
        model: The model it names by digest.
        tokenizer: Its tokenizer.
        texts: The texts it names by digest.
        out: Folder to write, laid out as by `train_saes`.
        overwrite: Replace what is there.

    Raises:
        FeatclError: If model, texts or library versions are others than the manifest's.
    """
    path = Path(manifest) / MANIFEST_FILE if Path(manifest).is_dir() else Path(manifest)
    try:
        wanted = json.loads(path.read_text("utf-8"))
        options, layers = wanted["config"], wanted["layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FeatclError(f"{path} is not the manifest of a trained SAE: {type(error).__name__}: {error}") from None
    texts = list(texts)
    found = {"model_digest": model_digest(model), "data_digest": texts_digest(texts), "versions": _versions()}
    for name, value in found.items():
        if wanted.get(name) != value:
            raise FeatclError(f"{path} was made with another {name}: {wanted.get(name)}, here it is {value}")
    return train_saes(model, tokenizer, texts, layers=layers, out=out, overwrite=overwrite, **options)


# --- manifest ---------------------------------------------------------------------------------------------------------


def _all_start_with(texts: Sequence[Text], bos: int | None) -> bool:
    """Whether the texts are token ids that carry their BOS already, as chats do."""
    carried = [not isinstance(text, str) and list(text[:1]) == [bos] for text in texts]
    return bos is not None and bool(carried) and all(carried)


def _metadata(model: Any, settings: SAESettings, prepend_bos: bool) -> dict[str, Any]:
    name = getattr(inner_model(model).config, "_name_or_path", "") or type(model).__name__
    return {"model_name": Path(name).name, "prepend_bos": prepend_bos, "context_size": settings.context}


def _manifest(model: Any, texts: Sequence[Text], settings: SAESettings, layers: Sequence[int]) -> dict[str, Any]:
    """What the weights are a function of; `runtime` because sums are rounded in its order."""
    return {
        "config": asdict(settings),
        "layers": list(layers),
        "data_digest": texts_digest(texts),
        "model_digest": model_digest(model),
        "versions": _versions(),
        "runtime": {
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "float32_matmul": torch.get_float32_matmul_precision(),
        },
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "sae-lens")}
