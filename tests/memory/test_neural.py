"""A memory as a function of an explicit state: streaming, masks, rows, dtypes, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.memory import MemoryState, NeuralMemory, base

WIDTH = 16


def build(**settings: Any) -> NeuralMemory:
    """A float64 memory with everything that streaming must carry along."""
    given = {"heads": 2, "depth": 2, "chunk_size": 4, "conv": 3, "persistent": 3, "max_step": 0.4, **settings}
    return NeuralMemory(WIDTH, **given).double()


def tokens(batch: int = 2, length: int = 13, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(one: MemoryState, other: MemoryState) -> float:
    """Largest difference between two states."""
    pairs = zip(one.detach().named().values(), other.detach().named().values(), strict=True)
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)


# --- streaming


@pytest.mark.parametrize("split", [[13], [1] * 13, [4, 4, 4, 1], [3, 7, 3], [0, 5, 0, 8], [12, 1]])
@pytest.mark.parametrize("settings", [{}, {"depth": 1, "chunk_size": 1}, {"chunk_size": 64, "momentum": False}])
def test_any_split_of_a_stream_is_one_call(split: list[int], settings: dict[str, Any]) -> None:
    memory, x = build(**settings), tokens()
    read, state = memory(x)
    carried, parts = None, []
    for part in x.split(split, dim=1):
        found, carried = memory(part, carried)
        parts.append(found)
    assert (torch.cat(parts, dim=1) - read).abs().max() <= 1e-12
    assert apart(carried, state) <= 1e-12


def test_a_state_that_is_not_passed_on_is_missed() -> None:
    """Negative control of the split."""
    memory, x = build(), tokens()
    read, _ = memory(x)
    assert (torch.cat([memory(part)[0] for part in x.split(6, dim=1)], dim=1) - read).abs().max() > 1e-3


def test_rows_may_stand_at_different_places_of_their_chunks() -> None:
    memory, x = build(), tokens(3)
    starts = [memory(x[row : row + 1, :offset])[1] for row, offset in enumerate((1, 6, 0))]
    state = MemoryState.stack(starts)
    assert len(set(state.count.tolist())) == 3
    read, after = memory(tokens(3, 9, seed=1), state)
    for row in range(3):
        alone, alone_after = memory(tokens(3, 9, seed=1)[row : row + 1], starts[row])
        assert (read[row] - alone[0]).abs().max() <= 1e-12
        assert apart(after.rows(row), alone_after) <= 1e-12


def test_long_inputs_are_cut_into_pieces_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, x = build(), tokens(2, 50)
    start = memory(x[:, :6])[1]
    with torch.no_grad():
        read, state = memory(x, start)
        surprise = memory.surprise(x, start)
        monkeypatch.setattr(base, "PIECE", 10)
        assert len(list(memory._pieces(x, torch.tensor([50, 50]), start))) > 5
        cut, cut_state = memory(x, start)
        assert (memory.surprise(x, start) - surprise).abs().max() <= 1e-12
    assert (cut - read).abs().max() <= 1e-12
    assert apart(cut_state, state) <= 1e-12


def test_reading_is_causal_and_sees_only_chunks_before_its_own() -> None:
    memory, x = build(persistent=0, conv=0), tokens(1)
    read, _ = memory(x)
    changed = x.clone()
    changed[:, 5] += 1.0
    other, _ = memory(changed)
    differs = (read - other).abs().amax(dim=(0, 2)) > 1e-9
    assert differs.tolist() == [False] * 5 + [True] + [False] * 2 + [True] * 5  # its own query; then the next chunks


def test_a_fresh_linear_memory_reads_nothing() -> None:
    memory = build(depth=1, persistent=0)
    read, state = memory(tokens())
    assert bool((read[:, :4] == 0).all())
    assert read[:, 4:].abs().max() > 1e-3
    assert memory(tokens(), state)[0][:, :4].abs().max() > 1e-3


# --- masks and rows


def masks() -> list[Tensor]:
    left, right, holes = (torch.ones(2, 13, dtype=torch.bool) for _ in range(3))
    left[0, :5], right[1, 7:], holes[:, ::3] = False, False, False
    holes[1, 4:9] = False
    return [left, right, holes, left & holes]


@pytest.mark.parametrize("which", range(4))
def test_padding_neither_reads_nor_writes(which: int) -> None:
    memory, x, mask = build(), tokens(), masks()[which]
    start = memory(tokens(2, 6, seed=2))[1]
    read, state = memory(x, start, mask=mask)
    assert bool((read[~mask] == 0).all())
    for row in range(2):
        alone, after = memory(x[row : row + 1, mask[row]], start.rows(row))
        assert (read[row, mask[row]] - alone[0]).abs().max() <= 1e-12
        assert apart(state.rows(row), after) <= 1e-12
    garbage = torch.where(mask[..., None], x, torch.nan)
    assert torch.equal(memory(garbage, start, mask=mask)[0], read)
    assert apart(memory(x, start)[1], state) > 1e-3  # negative control: without the mask


def test_garbage_in_padding_reaches_no_gradient() -> None:
    memory, mask = build(), masks()[2]
    x = torch.where(mask[..., None], tokens(), torch.nan).requires_grad_()
    memory(x, mask=mask)[0].square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in memory.parameters())
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad[~mask] == 0).all())


def test_rows_without_any_token_stay_as_they_are() -> None:
    memory, mask = build(), torch.ones(2, 13, dtype=torch.bool)
    start = memory(tokens(2, 6, seed=2))[1]
    mask[1] = False
    read, state = memory(tokens(), start, mask=mask)
    assert bool((read[1] == 0).all())
    assert state.rows(1).equal(start.rows(1))
    assert not state.rows(0).equal(start.rows(0))
    nothing, same = memory(tokens(), start, mask=torch.zeros_like(mask))
    assert bool((nothing == 0).all())
    assert same.equal(start)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_no_rows_and_no_tokens(shape: tuple[int, int]) -> None:
    memory = build()
    for state in (None, memory.initial_state(shape[0])):
        read, after = memory(torch.zeros(*shape, WIDTH), state)
        assert read.shape == (*shape, WIDTH)
        assert after.equal(memory.initial_state(shape[0]))
        assert memory.surprise(torch.zeros(*shape, WIDTH), state).shape == shape
        assert memory.settle(after).batch == shape[0]


def test_rows_of_a_batch_are_independent() -> None:
    memory, x = build(), tokens(3)
    read, state = memory(x)
    x = x.clone()
    x[1] = tokens(1, seed=5)[0] * 100
    other, changed = memory(x)
    assert torch.equal(read[::2], other[::2])
    assert state.rows([0, 2]).equal(changed.rows([0, 2]))
    assert (read[1] - other[1]).abs().max() > 1e-3


# --- values, layouts and dtypes


def test_views_of_any_stride_read_alike() -> None:
    memory, x = build(), tokens()
    read, state = memory(x)
    strided = torch.empty(13, 2, 2 * WIDTH, dtype=x.dtype)[..., ::2].transpose(0, 1)
    strided.copy_(x)
    assert not strided.is_contiguous()
    again, after = memory(strided)
    assert (read - again).abs().max() <= 1e-12
    assert apart(state, after) <= 1e-12
    assert (memory(x[:1].expand(4, -1, -1))[0] - read[:1]).abs().max() <= 1e-12


def test_training_mode_and_gradients_change_no_number() -> None:
    memory, x = build(), tokens()
    with torch.no_grad():
        read, state = memory.eval()(x)
    trained, after = memory.train()(x)
    assert trained.requires_grad
    assert (trained - read).abs().max() <= 1e-12
    assert apart(after.detach(), state) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_of_zeros_and_padding_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    """What scales a token of zeros to length one is 10⁶, which float16 does not have."""
    memory, x = build(chunk_size=4).to(dtype), tokens(2, 9).to(dtype)
    x[0, 2] = 0
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 3:] = False
    read, state = memory(x, mask=mask)
    assert bool(read.isfinite().all())
    assert all(bool(tensor.isfinite().all()) for tensor in state.named().values())


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_is_float32_whatever_is_read(slow: torch.dtype, given: torch.dtype) -> None:
    memory = build().to(slow)
    read, state = memory(tokens().to(given))
    assert read.dtype == given
    assert {t.dtype for name, t in state.named().items() if name != "count"} == {torch.float32}
    expected, _ = build()(tokens())
    assert (read.double() - expected).abs().max() < 0.06 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memory(tokens().to(given))[0], read)


def test_float64_parameters_have_a_float64_state() -> None:
    assert build()(tokens())[1].weights[0].dtype == torch.float64
    assert build().float()(tokens())[0].dtype == torch.float64


def test_the_length_of_a_token_does_not_matter() -> None:
    memory, x = build(), tokens()
    read, state = memory(x)
    scaled, after = memory(x * torch.logspace(-3, 3, 13, dtype=x.dtype)[:, None])
    assert (scaled - read).abs().max() <= 1e-9
    assert apart(after, state) <= 1e-9


def test_the_same_seed_is_the_same_memory() -> None:
    torch.manual_seed(0)
    first = build()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), build().parameters(), strict=True))
    assert not torch.equal(first.projection, build(seed=1).projection)


def test_settings_make_the_same_memory_again() -> None:
    memory = build()
    settings = memory.settings()
    again = NeuralMemory(**settings).double()
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again(tokens())[0], memory(tokens())[0])


def test_gradients_reach_every_slow_weight() -> None:
    memory = build()
    read, state = memory(tokens())
    read2, _ = memory(tokens(seed=1), state)
    (read.square().sum() + read2.square().sum()).backward()
    for name, parameter in memory.named_parameters():
        assert float(parameter.grad.abs().sum()) > 0, name


# --- settle, surprise


def test_settling_closes_the_open_chunk() -> None:
    memory, x = build(persistent=0), tokens(2, 6)
    _, state = memory(x)
    settled = memory.settle(state)
    assert state.count.tolist() == [2, 2]
    assert settled.count.tolist() == [0, 0]
    assert not bool(settled.keys.any())
    shorter = build(persistent=0, chunk_size=6, max_step=0.4)  # the open chunk of two tokens, in one of their own
    read_of_all = shorter.settle(shorter(x)[1])
    assert apart(memory.settle(settled), settled) == 0
    assert (settled.weights[-1] - state.weights[-1]).abs().max() > 1e-3
    assert (read_of_all.weights[-1] - settled.weights[-1]).abs().max() > 0
    two = memory(x[:, 4:], memory.settle(memory(x[:, :4])[1]))[1]
    assert apart(memory.settle(two), settled) <= 1e-12


def test_settling_rows_with_and_without_an_open_chunk() -> None:
    memory = build()
    states = [memory(tokens(1, length))[1] for length in (1, 5, 3)]
    settled = memory.settle(MemoryState.stack(states))
    for row, state in enumerate(states):
        assert apart(settled.rows(row), memory.settle(state)) <= 1e-12
    assert states[0].count.tolist() == [0]  # three persistent tokens and one close a chunk of four
    assert settled.rows(0).equal(states[0])


def test_surprise_is_the_inner_loss_at_the_chunk_start() -> None:
    memory, x = build(), tokens()
    start = memory(tokens(2, 6, seed=2))[1]
    found = memory.surprise(x, start)
    assert found.shape == (2, 13)
    for row, t in ((0, 0), (1, 12), (0, 7)):
        before = memory(x[row : row + 1, :t], start.rows(row))[1]
        made = memory._tokens(x[row : row + 1, t : t + 1], before, torch.tensor([1]))
        loss = (memory.read(made.keys, before) - made.values).square().sum(-1).mean()
        assert abs(float(found[row, t]) - float(loss)) <= 1e-12
    mask = masks()[2]
    masked = memory.surprise(x, start, mask=mask)
    assert bool((masked[~mask] == 0).all())
    assert bool((masked[mask] > 0).all())


def test_what_was_stored_surprises_less() -> None:
    memory, x = build(depth=1, conv=0, head_dim=64, momentum=False), tokens(2, 8)
    state = None
    for _ in range(20):
        state = memory(x, state)[1]
    again, new = memory.surprise(x, state).mean(), memory.surprise(tokens(2, 8, seed=7), state).mean()
    assert again < 0.2 * memory.surprise(x).mean()
    assert again < 0.3 * new  # what was not stored still surprises


# --- immutability


def test_nothing_that_happens_to_a_state_later_reaches_another() -> None:
    memory, x = build(), tokens()
    start = memory.initial_state(2)
    with torch.no_grad():
        kept = start.detach()
        state = memory(x[:, :0], start)[1]
        full = memory(x, state)[1]
        expected = full.detach()
        for other in (start, state):
            for tensor in other.named().values():
                tensor.zero_()
        assert full.equal(expected)
        assert memory.initial_state(2).equal(kept)  # M_0 and persistent tokens are no part of it
        for part in (expected.tensors(), expected.to("cpu").named(), expected.detach().named()):
            part["weights.0"].zero_()
        for parameter in memory.parameters():
            parameter.zero_()
        assert full.equal(expected)


def test_calling_changes_neither_its_state_nor_its_input() -> None:
    memory, x = build(), tokens()
    start = memory(x)[1]
    before, given = start.detach(), x.clone()
    memory(x, start)[0].sum().backward()
    memory.surprise(x, start)
    memory.settle(start)
    assert start.equal(before)
    assert torch.equal(x, given)


def test_memory_and_state_can_be_copied_and_pickled() -> None:
    memory, x = build(), tokens()
    read, state = memory(x)
    state = state.detach()
    for other, carried in (
        (copy.deepcopy(memory), copy.deepcopy(state)),
        (pickle.loads(pickle.dumps(memory)), pickle.loads(pickle.dumps(state))),
    ):
        assert torch.equal(other(x)[0], read)
        assert carried.equal(state)
        assert torch.equal(other(x, carried)[0], memory(x, state)[0])
    assert copy.deepcopy(memory(x)[1]).equal(state)  # with a graph, which a copy leaves behind


# --- errors


def test_bad_input_is_refused_in_one_line() -> None:
    memory, x = build(), tokens()
    state = memory(x)[1]
    nan = x.clone()
    nan[1, 4, 0] = torch.nan
    huge = x.float()
    huge[0, 2] = 1e30
    swapped = MemoryState.from_tensors({**state.tensors(), "keys": state.keys.transpose(1, 2)})
    counted = MemoryState.from_tensors({**state.tensors(), "count": state.count + 4})
    wrong = torch.ones(2, 12, dtype=torch.bool)
    for call, said in (
        (lambda: memory(x[..., :8]), r"width = 16\].*\[2, 13, 8\]"),
        (lambda: memory(x[0]), "batch, seq, width"),
        (lambda: memory(x.long()), "float dtype"),
        (lambda: memory(nan), "NaN or infinity in row 1, token 4"),
        (lambda: memory(torch.where(x == x.max(), torch.inf, x)), "NaN or infinity"),
        (lambda: build().float()(huge), "too large in row 0, token 2"),
        (lambda: memory(x[:1], state), r"weights.0 is \[2, 2, 8, 16\], this memory's \[1, 2, 8, 16\]"),
        (lambda: memory(x, state.detach().rows([0, 0, 1])), "this memory's"),
        (lambda: memory(x, build(depth=3)(x)[1]), "'momentum.2' is missing, or one too many"),
        (lambda: memory(x, build(chunk_size=8)(x)[1]), r"keys is \[2, 7, 2, 8\], this memory's \[2, 3, 2, 8\]"),
        (lambda: memory(x, build(momentum=False)(x)[1]), "momentum.0"),
        (lambda: memory(x, build(conv=0)(x)[1]), "tail"),
        (lambda: memory(x, build().float()(x)[1]), "float32 on cpu, not torch.float64"),
        (lambda: memory(x, swapped), "keys is"),
        (lambda: memory(x, counted), "count must be from 0 to chunk_size - 1 = 3"),
        (lambda: memory(x, {"weights": 1}), "not dict"),
        (lambda: memory(x, mask=wrong), r"\[2, 13\] bool"),
        (lambda: memory(x, mask=torch.ones(2, 13)), "bool"),
        (lambda: memory.surprise(nan), "NaN or infinity"),
        (lambda: memory.settle(build(depth=1)(x)[1]), "missing, or one too many"),
    ):
        with pytest.raises(FeatclError, match=said) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heads": 3}, "no multiple of 3 heads"), ({"heads": 0}, "at least 1"), ({"depth": 0}, "depth must be"),
        ({"chunk_size": 0}, "chunk_size must be"), ({"chunk_size": 2.5}, "chunk_size must be a whole number"),
        ({"heads": 2.0}, "whole numbers"), ({"expansion": float("inf")}, "expansion"),
        ({"head_dim": 0}, "head_dim must be"), ({"conv": -1}, "conv"),
        ({"expansion": 0.0}, "expansion"), ({"max_step": 0.0}, "max_step"), ({"max_step": float("nan")}, "max_step"),
        ({"persistent": -1}, "persistent"),
    ],
)  # fmt: skip
def test_bad_sizes_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(FeatclError, match=said):
        build(**settings)
