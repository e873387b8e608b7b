"""Memories on tiny random models: attached, with an open gate, and the logits that come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featcl.memory import NeuralMemory
from featcl.memory.attach import AttachedMemory, attach_memory
from tests.adapters.conftest import D_MODEL, VOCAB, build_model

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3_conditional", "olmo", "olmo2", "olmo3", "llama")
FORMS = ("gate", "context", "layer")
LAYER = 1


def neural(**settings: Any) -> NeuralMemory:
    """A small memory whose chunks are shorter than the texts."""
    return NeuralMemory(D_MODEL, **({"heads": 2, "chunk_size": 4, "seed": 5} | settings))


@torch.no_grad()
def open_(attached: AttachedMemory, *, scale: float = 0.5, seed: int = 7) -> AttachedMemory:
    """Open the gate, so that what the memory says is heard."""
    generator = torch.Generator().manual_seed(seed)
    attached.branch.gate.copy_(scale * torch.randn(attached.branch.gate.shape, generator=generator))
    return attached


def attached_to(
    family: str = "olmo2",
    form: str = "gate",
    *,
    layer: int = LAYER,
    model: Any = None,
    shut: bool = False,
    **memory: Any,
) -> AttachedMemory:
    """A memory on a fresh random model, with an open gate unless it is to stay shut."""
    model = build_model(family) if model is None else model
    attached = attach_memory(model, neural(**memory), layer=layer, form=form, window=5)  # type: ignore[arg-type]
    return attached if shut else open_(attached)


def text(rows: int = 1, length: int = 12, *, seed: int = 0) -> Tensor:
    """Token ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """Of every position, without a cache."""
    return model(input_ids=ids, attention_mask=mask, **({"use_cache": False} | more)).logits


@torch.no_grad()
def step_by_step(model: Any, ids: Tensor, mask: Tensor | None = None, *, splits: tuple[int, ...] = ()) -> Tensor:
    """The same with a cache: pieces of these lengths first, then token by token."""
    from transformers import DynamicCache

    cache, found, place = DynamicCache(config=model.config), [], 0
    for length in (*splits, *[1] * (ids.shape[1] - sum(splits))):
        piece = ids[:, place : place + length]
        seen = None if mask is None else mask[:, : place + length]
        given = {} if mask is None else {"position_ids": positions(mask)[:, place : place + length]}
        found.append(model(input_ids=piece, attention_mask=seen, past_key_values=cache, use_cache=True, **given).logits)
        place += length
    return torch.cat(found, dim=1)


def positions(mask: Tensor) -> Tensor:
    """Places of tokens in their rows, padding not counted."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded on the left, and the mask."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return ids, mask
