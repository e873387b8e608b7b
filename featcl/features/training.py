"""Training SAEs with SAELens' own trainer on activations from our own hooks: several layers in one pass, no hub."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from featcl import files
from featcl.errors import FeatclError
from featcl.features import saelens
from featcl.features.activations import check_layers, hook_of, layer_activations
from featcl.features.check import SAEHealth, check_sae
from featcl.features.tokens import Text, adds_bos, read_texts, texts_digest, token_batches, token_windows
from featcl.models import inner_model, load_model, max_context, model_digest, residual_map

MANIFEST_FILE = "featcl.json"
CACHE_BYTES = 512 * 2**20
"""Activations of a text that fit in here are computed once and reshuffled each epoch; longer texts are streamed."""
HELD_OUT = 20
"""Every 20th window is kept from training, and the finished SAE is checked on those."""


@dataclass(frozen=True)
class SAESettings:
    """How an SAE is trained. None is filled in from the model: d_sae = 8 · d_model, l0 = d_model / 5.

    Attributes:
        architecture: `batchtopk` (saved as JumpReLU), `topk`, `jumprelu` or `matryoshka_batchtopk`.
        d_sae: Number of features.
        l0: Active features per token, on average.
        tokens: How many activations are trained on; a shorter text is repeated.
        batch_size: Activations per step.
        lr: Adam's, constant, then linear to zero over the last 40 %.
        context: Longest window of tokens; None is the model's, at most 512.
        storage: `float32`, or `bfloat16` for half the file.
        seed: Of initial weights and shuffling.
    """

    architecture: str = "batchtopk"
    d_sae: int | None = None
    l0: float | None = None
    tokens: int = 1_000_000
    batch_size: int = 1024
    lr: float = 3e-3
    context: int | None = None
    storage: str = "float32"
    seed: int = 0


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
    """`train_saes` on a model and text files by name.

    Args:
        model_name: What `load_model` takes.
        text_files: `.txt` or `.txt.gz`; documents are separated by form feeds and cut into windows.
        layers: Blocks whose outputs get an SAE each.
        out: Folder to write; see `train_saes`.
        options: As for `train_saes`.
    """
    saelens.require_sae_lens()
    if not text_files:
        raise FeatclError("training an SAE needs at least one text file")
    texts = [text for path in text_files for text in read_texts(path)]
    model, tokenizer = load_model(model_name)
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

    Args:
        model: A causal LM, in memory; it is not changed.
        tokenizer: Its tokenizer.
        texts: Strings, or token ids.
        layers: Blocks whose outputs get an SAE each.
        out: For one layer the SAE's folder itself; for several the folder that will hold `resid_post_{L}`.
        overwrite: Replace what is there; otherwise an existing SAE is an error.
        options: Fields of `SAESettings`.

    Returns:
        Per layer: folder, health on held-out windows, cost.

    Raises:
        FeatclError: For an unknown option, a layer that does not exist, too little text, an occupied folder, or values
            that are not finite.
    """
    started = time.perf_counter()
    check_layers(model, layers)
    folders = {L: Path(out) if len(layers) == 1 else Path(out) / f"resid_post_{L}" for L in layers}
    for folder in folders.values():
        if (folder / saelens.CONFIG_FILE).exists() and not overwrite:
            raise FeatclError(f"{folder} holds an SAE already: choose another folder, or ask to overwrite it")
    settings = _settings(options, model)
    texts = list(texts)
    prepend_bos = adds_bos(tokenizer) or _all_start_with(texts, tokenizer.bos_token_id)
    windows = list(token_windows(tokenizer, texts, context=int(settings.context or 0), prepend_bos=prepend_bos))
    kept = set(range(HELD_OUT - 1, len(windows), HELD_OUT)) or {len(windows) - 1}
    held_out = [window for i, window in enumerate(windows) if i in kept]
    training = [window for i, window in enumerate(windows) if i not in kept]
    settings = _fit_batch(settings, training)

    batches = shuffled_activations(model, tokenizer, training, layers=layers, settings=settings)
    saes = _fit(batches, layers, settings, _metadata(model, settings, prepend_bos))
    manifest = _manifest(model, texts, settings)
    trained = {}
    for layer, folder in folders.items():
        saelens.save_trained(saes[layer], folder, storage=settings.storage)
        loaded = saelens.load_sae(folder, device=model.device)
        health = check_sae(loaded, model, tokenizer, held_out, context=settings.context)
        record = manifest | {"layer": layer, "hook_name": hook_of(layer), "held_out": health.record()}
        files.write_json(folder / MANIFEST_FILE, record)
        trained[layer] = TrainedSAE(layer, folder, health, settings.tokens, time.perf_counter() - started)
    return trained


def shuffled_activations(
    model: Any, tokenizer: Any, windows: Sequence[Sequence[int]], *, layers: Sequence[int], settings: SAESettings
) -> Iterator[Float[Tensor, "batch layers d_model"]]:
    """Endless shuffled batches of activations; BOS and padding left out.

    What fits in `CACHE_BYTES` is computed once; else a buffer is kept half full, so that a batch mixes many windows.

    Args:
        model: The causal LM.
        tokenizer: Its tokenizer.
        windows: Token ids.
        layers: Blocks, in the order of the result's second axis.
        settings: Gives batch size and seed.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    per_token = 4 * len(layers) * residual_map(model).d_model
    capacity = max(4 * settings.batch_size, CACHE_BYTES // per_token)
    total = sum(len(window) for window in windows)

    def one_pass() -> Iterator[Tensor]:
        order = torch.randperm(len(windows), generator=generator).tolist()
        for batch in token_batches((windows[i] for i in order), tokenizer):
            yield layer_activations(model, batch.to(model.device), layers=layers)

    if total <= min(capacity, settings.tokens):
        everything = torch.cat(list(_progress(one_pass(), "activations", total, len)))
        while True:
            order = torch.randperm(len(everything), generator=generator).to(everything.device)
            for rows in order.split(settings.batch_size):
                if len(rows) == settings.batch_size:
                    yield everything[rows]
    buffer: list[Tensor] = []
    wanted = min(capacity, max(4 * settings.batch_size, settings.tokens // 8))
    while True:
        for part in one_pass():
            buffer.append(part)
            if sum(len(held) for held in buffer) < wanted:
                continue
            mixed = torch.cat(buffer)
            mixed = mixed[torch.randperm(len(mixed), generator=generator).to(mixed.device)]
            batches = mixed.split(settings.batch_size)
            served = max(1, len(batches) // 2)
            yield from batches[:served]
            buffer = [mixed[served * settings.batch_size :]]


def _fit(
    batches: Iterator[Tensor], layers: Sequence[int], settings: SAESettings, metadata: dict[str, Any]
) -> dict[int, Any]:
    """Run SAELens' trainers in lockstep over the same tokens."""
    sample = torch.cat(list(islice(batches, max(1, 16384 // settings.batch_size))))
    if not torch.isfinite(sample).all():
        raise FeatclError("the model's activations are not finite: no SAE can be trained on them")
    trainers = {}
    for position, layer in enumerate(layers):
        trainers[layer] = saelens.make_trainer(
            sample[:, position],
            asdict(settings),
            metadata=metadata | {"hook_name": hook_of(layer), "hf_hook_name": f"model.layers.{layer}"},
            seed=settings.seed + layer,
        )
    steps = max(1, settings.tokens // settings.batch_size)
    for batch in _progress(islice(batches, steps), "training", steps, lambda _: 1):
        for position, layer in enumerate(layers):
            loss = saelens.train_step_(trainers[layer], batch[:, position].contiguous())
            if not loss < float("inf"):
                raise FeatclError(
                    f"the SAE of layer {layer} diverged (loss {loss}): use a smaller lr than {settings.lr}"
                )
    recent = torch.cat(list(islice(batches, max(1, 16384 // settings.batch_size))))
    return {
        layer: saelens.finish(trainers[layer], recent[:, position], l0=float(settings.l0 or 1))
        for position, layer in enumerate(layers)
    }


def _settings(options: dict[str, Any], model: Any) -> SAESettings:
    known = {item.name for item in fields(SAESettings)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise FeatclError(f"SAE training has no option {unknown[0]!r}: one of {', '.join(sorted(known))}")
    settings = SAESettings(**{name: value for name, value in options.items() if value is not None})
    d_model = residual_map(model).d_model
    settings = replace(
        settings,
        d_sae=settings.d_sae or 8 * d_model,
        l0=settings.l0 or d_model / 5,
        context=settings.context or min(512, max_context(model)),
    )
    if settings.architecture not in saelens.ARCHITECTURES:
        raise FeatclError(f"SAE architecture {settings.architecture!r} is unknown: {', '.join(saelens.ARCHITECTURES)}")
    if not 1 <= settings.l0 < settings.d_sae:  # type: ignore[operator]
        raise FeatclError(f"l0 = {settings.l0} must lie between 1 and d_sae = {settings.d_sae}")
    if settings.storage not in ("float32", "bfloat16"):
        raise FeatclError(f"storage {settings.storage!r} is unknown: float32 or bfloat16")
    if min(settings.tokens, settings.batch_size) < 1 or not settings.lr > 0:
        raise FeatclError("tokens, batch_size and lr must be positive")
    return settings


def _fit_batch(settings: SAESettings, windows: Sequence[Sequence[int]]) -> SAESettings:
    total = sum(len(window) - 1 for window in windows)
    if total < 256:
        raise FeatclError(
            f"{total} tokens of text are too few to train an SAE on: at least 256 are needed, better 100 000"
        )
    return replace(settings, batch_size=min(settings.batch_size, total))


def _all_start_with(texts: Sequence[Text], bos: int | None) -> bool:
    """Whether the texts are token ids that carry their BOS already, as chats do."""
    carried = [not isinstance(text, str) and list(text[:1]) == [bos] for text in texts]
    return bos is not None and bool(carried) and all(carried)


def _metadata(model: Any, settings: SAESettings, prepend_bos: bool) -> dict[str, Any]:
    name = getattr(inner_model(model).config, "_name_or_path", "") or type(model).__name__
    return {"model_name": Path(name).name, "prepend_bos": prepend_bos, "context_size": settings.context}


def _manifest(model: Any, texts: Sequence[Text], settings: SAESettings) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "sae-lens")}
    return {
        "config": asdict(settings),
        "data_digest": texts_digest(texts),
        "model_digest": model_digest(model),
        "versions": versions,
    }


def _progress(items: Iterable[Any], what: str, total: int, size: Any) -> Iterator[Any]:
    """A bar with the time left; silent in logs and under CI."""
    quiet = bool(os.environ.get("CI")) or not sys.stderr.isatty()
    with tqdm(total=total, desc=what, disable=quiet, leave=False) as bar:
        for item in items:
            yield item
            bar.update(size(item))
