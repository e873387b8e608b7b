"""A memory stays finite and bounded: any depth, any chunk, the largest step, the worst tokens, 100 000 of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.memory import MemoryState, NeuralMemory
from featcl.memory.gates import AT_REST, MAX_MOMENTUM, MIN_DECAY

WIDTH, PIECE = 32, 2048


def build(*, step: float = 50.0, momentum: float = 0.0, decay: float = -6.0, **settings: Any) -> NeuralMemory:
    """A memory with the gates pushed: what the sigmoids are taken of is at least this far out."""
    memory = NeuralMemory(WIDTH, **{"heads": 2, **settings})
    with torch.no_grad():
        memory.gate_bias.view(-1, 2)[:3] = torch.tensor([step, momentum, decay])[:, None]
        if step > 20:
            memory.gates.view(-1, 2, WIDTH)[0] = 0  # θ is at its maximum for every token
    return memory


def tokens(kind: str, length: int, generator: torch.Generator) -> Tensor:
    """A piece of a stream: noise; one token all the time; or two that contradict each other, with noise."""
    noise = torch.randn(1, length, WIDTH, generator=generator)
    if kind == "noise":
        return noise
    one = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9))
    if kind == "constant":
        return one.expand(1, length, WIDTH)
    sign = 1.0 - 2.0 * (torch.arange(length) % 2)
    return 100 * one * sign[:, None] + noise


@torch.no_grad()
def streamed(memory: NeuralMemory, kind: str, length: int, dtype: torch.dtype = torch.float32) -> MemoryState:
    """The state after a stream; everything read on the way is finite."""
    generator, state = torch.Generator().manual_seed(0), None
    for start in range(0, length, PIECE):
        read, state = memory(tokens(kind, min(PIECE, length - start), generator).to(dtype), state)
        assert bool(read.isfinite().all()), f"not finite after {start} tokens of {kind}"
    assert state is not None
    assert all(bool(tensor.isfinite().all()) for tensor in state.named().values())
    return state


def largest(state: MemoryState) -> float:
    return max(norms["weights"] for norms in state.norms())


@pytest.mark.parametrize("kind", ["noise", "constant", "contradiction"])
@pytest.mark.parametrize(("depth", "chunk_size"), [(1, 16), (1, 256), (2, 64), (4, 64)])
def test_nothing_overflows_at_the_largest_step(depth: int, chunk_size: int, kind: str) -> None:
    memory = build(depth=depth, chunk_size=chunk_size)
    start = largest(memory.initial_state(1))
    assert largest(streamed(memory, kind, 8192)) <= start + memory.norm_bound


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 256])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_nothing_overflows_over_a_hundred_thousand_tokens(depth: int, chunk_size: int, dtype: torch.dtype) -> None:
    for kind in ("noise", "contradiction"):
        memory = build(depth=depth, chunk_size=chunk_size).to(dtype)
        state = streamed(memory, kind, 100_000, dtype)
        assert state.weights[0].dtype == torch.float32
        assert largest(state) <= largest(memory.initial_state(1)) + memory.norm_bound
        print(f"depth {depth} chunk {chunk_size} {dtype} {kind}: {state.norms()}")


@pytest.mark.parametrize("depth", [1, 4])
def test_all_gates_at_their_worst(depth: int) -> None:
    """The largest step and momentum and the least decay, on the worst tokens; and no decay at all."""
    for settings in ({}, {"decay_off": True}):
        memory = build(depth=depth, chunk_size=64, momentum=50.0, decay=-50.0)
        memory.has_decay = not settings
        for kind in ("constant", "contradiction"):
            streamed(memory, kind, 8192)


def test_depth_four_at_length_4096_stays_near_its_start() -> None:
    """Where other implementations diverge: four layers, 4 096 tokens; here at the step of an untrained memory."""
    memory = NeuralMemory(256, heads=4, depth=4, chunk_size=64)
    start, x = memory.initial_state(1), torch.randn(1, 4096, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        read, state = memory(x)
    assert bool(read.isfinite().all())
    for before, after in zip(start.norms()[:-1], state.norms()[:-1], strict=True):
        assert after["weights"] < 2 * before["weights"]
    assert state.norms()[-1]["weights"] < start.norms()[0]["weights"]
    assert float(read.square().mean().sqrt()) < 1.0


def test_without_clipping_deep_memories_overflow() -> None:
    """Negative control: the same stream and step, gradients as they are."""
    memory = build(depth=4, chunk_size=64)
    memory.max_gradient = 1e30
    with torch.no_grad():
        read, state = memory(tokens("contradiction", 8192, torch.Generator().manual_seed(0)))
    assert not (bool(read.isfinite().all()) and largest(state) < 1e6)


@pytest.mark.parametrize("alpha", [0.02, 0.2])
def test_decay_bounds_the_state(alpha: float) -> None:
    """|M| ≤ |M_0| + θ_max G / ((1 - η) α) for constant gates, on gradients that always point the same way."""
    eta = 0.5
    memory = build(
        chunk_size=16, momentum=math.log(eta / (MAX_MOMENTUM - eta)),
        decay=math.log((alpha - MIN_DECAY) / (1 - alpha)), max_step=1.0,
    )  # fmt: skip
    with torch.no_grad():
        memory.gates.zero_()
        memory.max_gradient = 0.01  # so small that every gradient is clipped, and none turns the memory round
    assert memory.gates_at_rest()[0].tolist() == pytest.approx([1.0, eta, alpha], rel=1e-4)
    bound = 0.01 / ((1 - eta) * alpha)
    state = streamed(memory, "constant", 4096)
    assert 0.9 * bound < largest(state) <= bound * (1 + 1e-5)
    memory.has_decay = False
    assert largest(streamed(memory, "constant", 4096)) > 2 * bound  # negative control


def test_the_stated_bound_is_that_of_the_gates_limits() -> None:
    memory = build(chunk_size=16, max_step=0.25)
    assert memory.norm_bound == pytest.approx(0.25 * memory.max_gradient / (1 - MAX_MOMENTUM) / MIN_DECAY)
    assert NeuralMemory(WIDTH, decay=False).norm_bound == math.inf
    assert set(AT_REST) == {"step", "momentum", "decay", "opening"}
    for push in (-200.0, 200.0):
        gates = build(step=push, momentum=push, decay=push).gates_at_rest()[0]
        low, high = torch.tensor([[0.0, 0.0, MIN_DECAY], [build().max_step, MAX_MOMENTUM, 1.0]])
        assert torch.allclose(gates, high if push > 0 else low)


def test_gradients_through_a_long_stream_are_finite() -> None:
    memory = build(depth=2, chunk_size=16)
    memory(tokens("contradiction", 1024, torch.Generator().manual_seed(0)))[0].square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in memory.parameters())
