"""The closed-form derivative, the coefficients of a chunk, and what is kept for the backward pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from featcl.memory import NeuralMemory, chunk
from featcl.memory.coefficients import Coefficients, chunk_coefficients


def by_unrolling(step: Tensor, momentum: Tensor, decay: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """The coefficients of one chunk by running the recurrence on unit vectors: M, S, then each gradient."""
    size = len(step)
    M, S = torch.zeros(size + 2, dtype=step.dtype), torch.zeros(size + 2, dtype=step.dtype)
    M[0], S[1] = 1.0, 1.0
    for t in range(size):
        if valid[t]:
            S = momentum[t] * S
            S[t + 2] -= step[t]
            M = (1 - decay[t]) * M + S
    return {"keep": M[0], "carry": M[1], "hold": S[1], "write": -M[2:], "impulse": -S[2:]}


@pytest.mark.parametrize("kind", ["ordinary", "zeros", "ones", "partial", "empty"])
def test_the_coefficients_unroll_the_recurrence(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    step, momentum, decay = torch.rand(3, 7, generator=generator, dtype=torch.float64)
    valid = torch.ones(7, dtype=torch.bool)
    if kind in ("zeros", "ones"):
        momentum[::2], decay[1::2] = float(kind == "ones"), float(kind == "ones")
    if kind in ("partial", "empty"):
        valid[3 if kind == "partial" else 0 :] = False
    found = chunk_coefficients(step, momentum, decay, valid=valid)
    for name, expected in by_unrolling(step, momentum, decay, valid).items():
        assert (getattr(found, name) - expected).abs().max() <= 1e-12, name
    if kind == "partial":  # a padded token is not one with gates of 0: momentum goes on there
        without = chunk_coefficients(step * valid, momentum, decay * valid)
        assert (without.carry - found.carry).abs().max() > 1e-3


def inputs(depth: int, *, momentum: bool = True, time: int = 4, size: int = 2) -> dict[str, Any]:
    """Random inputs of a scan, float64, with gradients."""
    generator = torch.Generator().manual_seed(depth)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    sizes = [(3, 2)] if depth == 1 else [(3, 4), *[(4, 4)] * (depth - 2), (4, 2)]
    weights = [random(1, 2, *layer) for layer in sizes]
    gates = torch.rand(3, 1, 2, time // size, size, generator=generator, dtype=torch.float64).requires_grad_()
    return {
        "weights": weights, "momentum": [random(1, 2, *layer) for layer in sizes] if momentum else [],
        "queries": random(1, time, 2, 3), "keys": random(1, time, 2, 3), "values": random(1, time, 2, 2),
        "gates": gates,
    }  # fmt: skip


def run(given: dict[str, Any], *, max_gradient: float = 1e3) -> chunk.Scan:
    return chunk.scan(
        given["weights"], given["momentum"], queries=given["queries"], keys=given["keys"], values=given["values"],
        coefficients=chunk_coefficients(*given["gates"]), max_gradient=max_gradient,
    )  # fmt: skip


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("max_gradient", [1e3, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_derivative_of_a_scan(depth: int, max_gradient: float, momentum: bool) -> None:
    given = inputs(depth, momentum=momentum)
    names = ("queries", "keys", "values", "gates")

    def scanned(*tensors: Tensor) -> tuple[Tensor, ...]:
        parts = dict(zip(names, tensors[:4], strict=True))
        layers = list(tensors[4:])
        parts |= {"weights": layers[:depth], "momentum": layers[depth:]}
        found = run(parts, max_gradient=max_gradient)
        return (found.reads, *found.weights, *found.momentum)

    assert gradcheck(scanned, (*(given[name] for name in names), *given["weights"], *given["momentum"]))


@pytest.mark.parametrize("depth", [1, 2])
def test_the_slow_weights_pass_gradcheck(depth: int) -> None:
    """Through projections, convolution, persistent tokens, gates, an open chunk, and from one call into the next."""
    memory = NeuralMemory(4, heads=2, depth=depth, chunk_size=2, conv=2, persistent=1).double()
    generator = torch.Generator().manual_seed(0)
    for weight in memory.initial:
        weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    names, slow = zip(*memory.named_parameters(), strict=True)
    x = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)

    def called(*tensors: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, tensors, strict=True))
        first, state = functional_call(memory, parameters, (x,))
        second, state = functional_call(memory, parameters, (x.flip(1)[:, :2], state))
        return first, second, *(tensor for tensor in state.named().values() if tensor.requires_grad)

    assert gradcheck(called, slow)


def test_a_wrong_derivative_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the part through the momentum's decay."""
    given = inputs(1)

    def scanned(gates: Tensor) -> Tensor:
        return run(given | {"gates": gates}).reads

    assert gradcheck(scanned, (given["gates"],))
    retreat = chunk.retreat_

    def broken(*args: Any, **kwargs: Any) -> Any:
        d_inputs, d_chunk, d_tokens = retreat(*args, **kwargs)
        return d_inputs, d_chunk * torch.tensor([1.0, 0.9, 1.0], dtype=torch.float64)[:, None], d_tokens

    monkeypatch.setattr(chunk, "retreat_", broken)
    assert not gradcheck(scanned, (given["gates"],), raise_exception=False)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 100])
def test_how_many_chunks_are_recomputed_does_not_matter(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(2, time=14)
    leaves = [*given["weights"], *given["momentum"], *(given[name] for name in ("queries", "keys", "values", "gates"))]

    def gradients() -> list[Tensor]:
        found = run(given)
        loss = found.reads.square().sum() + sum((end.sin() * end).sum() for end in (*found.weights, *found.momentum))
        return list(torch.autograd.grad(loss, leaves))

    expected = gradients()
    monkeypatch.setattr(chunk, "_group", lambda *_: group)
    for own, other in zip(gradients(), expected, strict=True):
        assert (own - other).abs().max() <= 1e-12


def kept_states(chunks: int) -> int:
    """How many chunk states a training pass keeps."""
    memory = NeuralMemory(32, heads=1, depth=2, chunk_size=2)
    shapes, found = {(1, *size) for size in memory.layer_sizes}, 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal found
        found += tuple(tensor.shape) in shapes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        memory(torch.randn(1, 2 * chunks, 32))
    return found // 4  # two layers, weights and momentum


def test_training_keeps_states_of_about_the_square_root_of_the_chunks() -> None:
    assert kept_states(64) <= 9
    assert kept_states(1024) <= 33


def test_no_graph_is_recorded_where_no_gradient_is_wanted() -> None:
    memory = NeuralMemory(8, heads=2, chunk_size=2)
    x = torch.randn(1, 7, 8)
    with torch.no_grad():
        read, state = memory(x)
    assert not any(tensor.requires_grad for tensor in (read, *state.named().values()))
    frozen = NeuralMemory(8, heads=2, chunk_size=2).requires_grad_(False)
    assert not frozen(x)[0].requires_grad
    assert memory(x)[0].requires_grad


def test_all_coefficients_lie_between_their_limits() -> None:
    """0 ≤ keep, hold ≤ 1 and 0 ≤ write ≤ θ · tokens left: products of numbers in [0, 1], never a quotient."""
    step, momentum, decay = torch.rand(3, 100, 64, generator=torch.Generator().manual_seed(0))
    momentum[::3], decay[::3] = 1.0, 0.0
    decay[1::3] = 1.0
    found: Coefficients = chunk_coefficients(step, momentum, decay)
    assert all(bool(torch.isfinite(part).all()) for part in found)
    assert 0 <= found.keep.min() <= found.keep.max() <= 1
    assert 0 <= found.hold.min() <= found.hold.max() <= 1
    left = torch.arange(64, 0, -1)
    assert bool((found.write <= step * left * (1 + 1e-6)).all())
    assert math.isclose(float(found.write[0, 0]), float(step[0, 0]) * 64, rel_tol=1e-6)  # η = 1, α = 0
