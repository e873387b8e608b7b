"""The chunk-parallel update: a loop over chunks that keeps one chunk's weights at a time, and changes them in place.

All gradients of a chunk are taken at its starting weights, so a chunk costs a few products per layer (`inner`), and its
end is linear in its start (`coefficients`). For training, states are kept at every √n-th chunk and the chunks between
them recomputed, so that n chunks need the memory of √n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.memory.coefficients import Coefficients
from featcl.memory.derivative import retreat_
from featcl.memory.inner import Fast, advance, inner_pass

SHORTEST = 1e-12
"""Length below which a key is not scaled to length one."""


class Scan(NamedTuple):
    """What a scan over chunks read, and where it ended."""

    reads: Float[Tensor, "batch time heads d_value"]
    weights: tuple[Float[Tensor, "batch heads _ _"], ...]
    momentum: tuple[Float[Tensor, "batch heads _ _"], ...]


def scan(
    weights: Sequence[Float[Tensor, "batch heads _ _"]],
    momentum: Sequence[Float[Tensor, "batch heads _ _"]],
    *,
    queries: Float[Tensor, "batch time heads d_key"],
    keys: Float[Tensor, "batch time heads d_key"],
    values: Float[Tensor, "batch time heads d_value"],
    coefficients: Coefficients,
    max_gradient: float,
    spent: bool = False,
) -> Scan:
    """Read and write a whole number of chunks.

    Args:
        weights: M of each layer at the start.
        momentum: S of each layer at the start; empty where η = 0.
        queries: Of any length: they and the keys are scaled to length one.
        keys: As above.
        values: What the keys shall give.
        coefficients: Of each [batch, heads, chunks], and token.
        max_gradient: Longest gradient of one token in one layer.
        spent: Whether weights and momentum are not needed any more, so that they may be overwritten.

    Returns:
        What each query read at the start of its chunk, and weights and momentum after the last chunk.

    Source: Titans, arXiv:2501.00663, eqs. 12-18.
    """
    batch, heads = weights[0].shape[:2]
    layers = [layer.flatten(0, 1) for layer in (*weights, *momentum)]
    chunk = torch.stack([part.permute(2, 0, 1).flatten(1) for part in coefficients[:3]], dim=1)
    tokens = torch.stack(
        [part.permute(2, 0, 1, 3).flatten(1, 2) for part in coefficients[3 : 5 if momentum else 4]], dim=1
    )
    settings = _Settings(len(weights), max_gradient)
    given = (queries, keys, values, chunk[..., None, None], tokens * max_gradient)
    if torch.is_grad_enabled() and any(part.requires_grad for part in (*given, *layers)):
        reads, *layers = _Chunks.apply(settings, *given, *layers)
    else:
        fast = settings.split(layers) if spent else settings.split(layers).clone()
        reads, layers = _through_(fast, *given, settings=settings), [*fast.weights, *fast.momentum]
    ends = [layer.unflatten(0, (batch, heads)) for layer in layers]
    return Scan(reads, tuple(ends[: len(weights)]), tuple(ends[len(weights) :]))


class _Settings(NamedTuple):
    depth: int
    max_gradient: float

    def split(self, layers: Sequence[Tensor]) -> Fast:
        return Fast(list(layers[: self.depth]), list(layers[self.depth :]))


def _through_(
    fast: Fast, queries: Tensor, keys: Tensor, values: Tensor, chunk: Tensor, tokens: Tensor, *, settings: _Settings,
    kept: dict[int, Fast] | None = None,
) -> Float[Tensor, "batch time heads d_value"]:  # fmt: skip
    """The loop over chunks, in place; returns what was read. `kept` gets a copy of the state at each chunk it names."""
    size, reads = tokens.shape[-1], torch.empty_like(values, memory_format=torch.contiguous_format)
    streams = zip(*(_chunks(part, size) for part in (queries, keys, values, reads)), strict=True)
    for j, (query, key, value, read) in enumerate(streams):
        if kept is not None and j in kept:
            kept[j] = fast.clone()
        found = inner_pass(fast.weights, _unit(key, query)[0], value, max_gradient=settings.max_gradient)
        read.copy_(found.outputs[-1][:, size:].view(value.shape))
        advance(fast, found, chunk=chunk[j], tokens=tokens[j], in_place=True)
        del found  # before the next one is made
    return reads


class _Chunks(torch.autograd.Function):
    """The loop over chunks with its derivative.

    Takes the coefficients of chunks [chunks, 3, rows, 1, 1] and of tokens, times G, [chunks, 1 or 2, rows, size], and
    the layers' weights and momenta [rows, d_in, d_out], rows being batch and heads.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, queries: Tensor, keys: Tensor, values: Tensor, chunk: Tensor, tokens: Tensor,
        *start: Tensor,
    ):  # fmt: skip
        fast, ctx.settings = settings.split(start).clone(), settings
        ctx.group = _group(len(tokens), start, keys)
        kept = dict.fromkeys(range(0, len(tokens), ctx.group), fast)
        reads = _through_(fast, queries, keys, values, chunk, tokens, settings=settings, kept=kept)
        layers = [layer for state in kept.values() for part in state for layer in part]
        ctx.save_for_backward(queries, keys, values, chunk, tokens, *layers)
        return reads, *fast.weights, *fast.momentum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_reads: Tensor, *d_end: Tensor):
        queries, keys, values, chunk, tokens, *kept = ctx.saved_tensors
        settings, size, group = ctx.settings, tokens.shape[-1], ctx.group
        d_fast = settings.split(d_end).clone()
        query, key, value, d_read = (_chunks(part, size) for part in (queries, keys, values, d_reads))
        d_parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (queries, keys, values)]
        d_query, d_key, d_value = (_chunks(part, size) for part in d_parts)
        d_chunk, d_tokens = torch.empty_like(chunk), torch.empty_like(tokens)
        for first in reversed(range(0, len(tokens), group)):
            place = first // group * len(d_end)
            fast, passed = settings.split(kept[place : place + len(d_end)]), []
            last = min(first + group, len(tokens)) - 1
            for j in range(first, last + 1):
                unit, length = _unit(key[j], query[j])
                found = inner_pass(fast.weights, unit, value[j], max_gradient=settings.max_gradient)
                passed.append((fast, found, length))
                if j < last:
                    fast = advance(fast, found, chunk=chunk[j], tokens=tokens[j])
            for j in range(last, first - 1, -1):
                fast, found, length = passed.pop()
                d_outputs = torch.empty_like(found.outputs[-1])
                d_outputs[:, size:].view(d_read[j].shape).copy_(d_read[j])
                d_unit, d_chunk[j, ..., 0, 0], d_tokens[j] = retreat_(
                    d_fast, fast, found, chunk=chunk[j], tokens=tokens[j], d_outputs=d_outputs
                )
                torch.neg(d_outputs[:, :size].view(d_value[j].shape), out=d_value[j])
                _turned_(d_unit, found.inputs[0], length, (d_key[j], d_query[j]))
        return None, *d_parts, d_chunk, d_tokens, *d_fast.weights, *d_fast.momentum


def _chunks(stream: Tensor, size: int) -> Float[Tensor, "chunks batch heads size d"]:
    """A view of [batch, time, heads, d]."""
    return stream.unflatten(1, (stream.shape[1] // size, size)).permute(1, 0, 3, 2, 4)


def _unit(keys: Tensor, queries: Tensor) -> tuple[Float[Tensor, "rows both d"], Float[Tensor, "rows both 1"]]:
    """Keys and below them queries of one chunk, of length one; and the lengths they had."""
    batch, heads, size, d = keys.shape
    both = keys.new_empty(batch, heads, 2 * size, d)
    both[:, :, :size], both[:, :, size:] = keys, queries
    both = both.view(batch * heads, 2 * size, d)
    length = torch.linalg.vector_norm(both, dim=-1, keepdim=True).clamp_(min=SHORTEST)
    return both.div_(length), length


def _turned_(d_unit: Tensor, unit: Tensor, length: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """The derivative by the tokens before they were scaled: what lies along the token itself does not turn it."""
    along = (unit * d_unit).sum(dim=-1, keepdim=True).mul_(length > SHORTEST)
    turned = d_unit.addcmul_(unit, along, value=-1).div_(length)
    for half, part in zip(turned.chunk(2, dim=1), out, strict=True):
        part.copy_(half.view(part.shape))


def _group(chunks: int, state: Sequence[Tensor], keys: Tensor) -> int:
    """Chunks from one kept state to the next: 1 where all of them take no more room than keys, queries and values."""
    if sum(layer.numel() for layer in state) * chunks <= 3 * keys.numel():
        return 1
    return math.isqrt(max(chunks - 1, 0)) + 1
