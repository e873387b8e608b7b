"""The chunk-parallel memory against the paper's recurrence, written token by token with autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.memory import MemoryState, NeuralMemory
from featcl.memory.base import Tokens
from featcl.memory.reference import recurrence

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def build(dtype: torch.dtype = torch.float64, **settings: Any) -> NeuralMemory:
    """A small memory that is not empty at the start, so that every layer has a gradient from the first token."""
    memory = NeuralMemory(16, **{"heads": 2, "chunk_size": 1, **settings}).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for weight in memory.initial:
        weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
    return memory


def made(memory: NeuralMemory, x: Tensor) -> tuple[MemoryState, Tokens]:
    """The first state, and what the memory makes of its tokens."""
    state = memory.initial_state(len(x))
    with torch.no_grad():
        return state, memory._tokens(x, state, torch.full((len(x),), x.shape[1]))


def by_hand(memory: NeuralMemory, state: MemoryState, tokens: Tokens, row: int, head: int, **settings: Any) -> Any:
    """The recurrence of one row and head."""
    part = [t[row, :, head].detach() for t in (tokens.queries, tokens.keys, tokens.values, tokens.gates)]
    queries, keys = (torch.nn.functional.normalize(t, dim=-1) for t in part[:2])
    weights = [weight[row, head].detach() for weight in state.weights]
    momentum = [torch.zeros_like(weight) for weight in weights]
    settings = {"chunk_size": memory.chunk_size, "max_gradient": memory.max_gradient, **settings}
    return recurrence(weights, momentum, queries=queries, keys=keys, values=part[2], gates=part[3][:, :3], **settings)


def error(memory: NeuralMemory, x: Tensor, **settings: Any) -> float:
    """Largest difference of reads, weights and momentum between the memory and the recurrence, as a share of the
    largest entry where that is above 1.
    """
    state, tokens = made(memory, x)
    with torch.no_grad():
        reads, after = memory._run(tokens, state, torch.full((len(x),), x.shape[1]))
        after = memory.settle(after)
    worst = 0.0
    for row in range(len(x)):
        for head in range(memory.heads):
            read, weights, momentum = by_hand(memory, state, tokens, row, head, **settings)
            pairs = [(reads[row, :, head], read)]
            pairs += [(own[row, head], other) for own, other in zip(after.weights, weights, strict=True)]
            pairs += [(own[row, head], other) for own, other in zip(after.momentum, momentum, strict=False)]
            for own, other in pairs:
                worst = max(worst, float((own - other).abs().max() / other.abs().max().clamp(min=1.0)))
    return worst


def tokens_of(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_chunks_of_one_token_are_the_recurrence(depth: int, dtype: torch.dtype) -> None:
    memory = build(dtype, depth=depth)
    rounding = 2 if (depth, dtype) == (4, torch.float32) else 1  # of twelve steps through four layers, on both sides
    assert error(memory, tokens_of(12, dtype)) <= TOLERANCE[dtype] * rounding


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk_size", [2, 5, 16])
def test_larger_chunks_are_the_recurrence_with_gradients_at_the_chunk_start(depth: int, chunk_size: int) -> None:
    memory = build(depth=depth, chunk_size=chunk_size, max_step=0.3)
    assert error(memory, tokens_of(18)) <= 1e-10
    assert error(memory, tokens_of(18), chunk_size=1) > 1e-3  # gradients of every token's own moment are others


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_long_gradients_are_clipped_in_both(depth: int) -> None:
    memory = build(depth=depth, chunk_size=3)
    memory.max_gradient = 0.5
    assert error(memory, tokens_of(9)) <= 1e-10
    assert error(memory, tokens_of(9), max_gradient=1e6) > 1e-3  # here clipping did something


@pytest.mark.parametrize("depth", [1, 2])
def test_ordinary_gradients_are_not_clipped(depth: int) -> None:
    memory = build(depth=depth, chunk_size=4, head_dim=32)
    assert error(memory, tokens_of(12), max_gradient=1e6) <= 1e-10


@pytest.mark.parametrize(("momentum", "decay"), [(False, True), (True, False), (False, False)])
def test_momentum_and_decay_can_be_left_out(momentum: bool, decay: bool) -> None:
    memory = build(depth=2, chunk_size=4, momentum=momentum, decay=decay)
    _, tokens = made(memory, tokens_of(10))
    assert bool((tokens.gates[..., 1] == 0).all()) is not momentum
    assert bool((tokens.gates[..., 2] == 0).all()) is not decay
    assert error(memory, tokens_of(10)) <= 1e-10


def test_without_momentum_and_decay_a_linear_memory_is_the_delta_rule() -> None:
    """W ← W - 2 θ k (kᵀ W - v): TTT-Linear's update, and at θ = 1/2 the old value under k is replaced exactly."""
    memory = build(depth=1, chunk_size=1, momentum=False, decay=False, max_step=1.0)
    state, tokens = made(memory, tokens_of(6))
    half = tokens.gates.clone()
    half[..., 0] = 0.5
    for gates in (tokens.gates, half):
        given = tokens._replace(gates=gates)
        with torch.no_grad():
            after = memory.written(given, state)
        W = state.weights[0].clone()
        for t in range(6):
            k = torch.nn.functional.normalize(given.keys[:, t], dim=-1)[..., :, None]
            v, step = given.values[:, t][..., None, :], gates[:, t, :, :1, None]
            W = W - 2 * step * k @ (k.mT @ W - v)
        assert (after.weights[0] - W).abs().max() <= 1e-12
    last = memory.read(tokens.keys[:, -1:], after)
    assert (last - tokens.values[:, -1:]).abs().max() <= 1e-12
    assert (memory.read(tokens.keys[:, :1], after) - tokens.values[:, :1]).abs().max() > 1e-2  # an older one, not


def test_a_chunk_of_the_delta_rule_is_one_step_of_batch_gradient_descent() -> None:
    """TTT-Linear with mini-batches: W ← W - Σ 2 θ_s k_s (k_sᵀ W - v_s), all at the chunk's start."""
    memory = build(depth=1, chunk_size=6, momentum=False, decay=False, max_step=0.2)
    state, tokens = made(memory, tokens_of(6))
    with torch.no_grad():
        after = memory.written(tokens, state)
    k = torch.nn.functional.normalize(tokens.keys, dim=-1).transpose(1, 2)
    v, step, W = tokens.values.transpose(1, 2), tokens.gates[..., :1].transpose(1, 2), state.weights[0]
    expected = W - k.mT @ (2 * step * (k @ W - v))
    assert (after.weights[0] - expected).abs().max() <= 1e-12
