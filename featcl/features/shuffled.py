"""Shuffled batches of activations for training, addressable by step: a training run can start again anywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from featcl import files
from featcl.features.activations import capture
from featcl.features.hooks import Hook, width
from featcl.features.tokens import token_batches

CACHE_BYTES = 512 * 2**20
"""Activations of a text that fit in here are computed once and reshuffled each epoch; longer texts come in shards."""
SHARDS = 8
"""A shard holds at least this share of all that is trained on, or what fits: a batch mixes many windows."""

Windows = Sequence[Sequence[int]]


def shuffled_activations(
    model: Any,
    tokenizer: Any,
    windows: Windows,
    *,
    hooks: Sequence[Hook],
    batch_size: int,
    tokens: int,
    seed: int,
    start: int = 0,
) -> Iterator[Float[Tensor, "batch hooks width"]]:
    """Endless shuffled batches of activations; BOS and padding left out.

    Batch i is a function of the arguments alone. What fits in `CACHE_BYTES` is computed once. A longer text is read in
    passes of shards: windows in a random order, as many as fit, their tokens shuffled; earlier shards are skipped
    without computing them.

    Args:
        model: The causal LM.
        tokenizer: Its tokenizer.
        windows: Token ids.
        hooks: Where; all of one width, in the order of the result's second axis.
        batch_size: Tokens a batch.
        tokens: How many will be trained on.
        seed: Of the order.
        start: First batch wanted.
    """
    bos = tokenizer.bos_token_id
    counts = [len(window) - (bos is not None and window[0] == bos) for window in windows]
    capacity = max(4 * batch_size, CACHE_BYTES // (4 * sum(width(model, hook) for hook in hooks)))
    if sum(counts) <= min(capacity, tokens):
        yield from _cached(model, tokenizer, windows, hooks, batch_size, seed, start)
    wanted = min(capacity, max(4 * batch_size, tokens // SHARDS))
    before = 0  # batches of earlier shards
    for number, chosen in enumerate(_shards(counts, wanted, seed)):
        batches = sum(counts[i] for i in chosen) // batch_size
        if before + batches > start:
            rows = activations_of(model, tokenizer, [windows[i] for i in chosen], hooks=hooks)
            order = torch.randperm(len(rows), generator=_generator(seed, "rows", number)).to(rows.device)
            for index in range(max(0, start - before), batches):
                yield rows[order[index * batch_size : (index + 1) * batch_size]]
        before += batches


def activations_of(
    model: Any, tokenizer: Any, windows: Windows, *, hooks: Sequence[Hook]
) -> Float[Tensor, "tokens hooks width"]:
    """Activations of the counted tokens of some windows, float32."""
    total = sum(len(window) for window in windows)
    rows, filled = torch.empty(0), 0
    for batch in progress(token_batches(windows, tokenizer), "activations", total, lambda part: part.input_ids.numel()):
        part = torch.stack([found.float() for found in capture(model, batch.to(model.device), hooks=hooks)], dim=1)
        if not filled:
            rows = part.new_empty(total, *part.shape[1:])
        rows[filled : filled + len(part)] = part
        filled += len(part)
    return rows[:filled]


def _cached(
    model: Any, tokenizer: Any, windows: Windows, hooks: Sequence[Hook], batch_size: int, seed: int, start: int
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator).tolist()
    rows = activations_of(model, tokenizer, [windows[i] for i in order], hooks=hooks)
    epoch = len(rows) // batch_size
    for before in count(step=epoch):
        shuffled = torch.randperm(len(rows), generator=generator)
        for index in range(max(0, start - before), epoch):
            yield rows[shuffled[index * batch_size : (index + 1) * batch_size].to(rows.device)]


def _shards(counts: Sequence[int], wanted: int, seed: int) -> Iterator[list[int]]:
    """Windows of one shard after the other, pass after pass; each shard counts `wanted` tokens or a little more."""
    for number in count():
        shard, held, left = [], 0, sum(counts)
        for i in torch.randperm(len(counts), generator=_generator(seed, "windows", number)).tolist():
            shard.append(i)
            held, left = held + counts[i], left - counts[i]
            if held >= wanted and left >= wanted:  # what is left over joins the last shard
                yield shard
                shard, held = [], 0
        yield shard


def _generator(seed: int, what: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(files.digest_json([seed, what, number])[:15], 16))


def progress(items: Iterable[Any], what: str, total: int, size: Any) -> Iterator[Any]:
    """A bar with the time left; silent in logs and under CI."""
    quiet = bool(os.environ.get("CI")) or not sys.stderr.isatty()
    with tqdm(total=total, desc=what, disable=quiet, leave=False) as bar:
        for item in items:
            yield item
            bar.update(size(item))
