"""The state as a value: its size, its file, its rows, and one per user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.memory import MemoryState, MemoryStates, NeuralMemory


def build(**settings: Any) -> NeuralMemory:
    return NeuralMemory(8, **{"heads": 2, "depth": 2, "chunk_size": 4, "conv": 2, **settings})


@pytest.fixture
def state() -> MemoryState:
    with torch.no_grad():
        return build()(tokens(3))[1]


def tokens(batch: int = 1, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed))


def test_its_size_is_fixed_and_said(state: MemoryState) -> None:
    memory = build()
    expected = 3 * (4 * (2 * 2 * (4 * 8 + 8 * 4) + 2 * 3 * 2 * 4 + 3 * 2 * 3 + 1 * 24) + 8)
    assert state.nbytes == expected
    assert repr(state) == f"MemoryState(batch=3, heads=2, layers=[4x8 8x4], bytes={expected})"
    assert memory(tokens(3, 500))[1].nbytes == expected
    assert memory.initial_state(3).nbytes == expected
    assert build(momentum=False).initial_state(3).nbytes < 0.7 * expected


def test_norms_are_of_the_longest_head(state: MemoryState) -> None:
    for layer, norms in enumerate(state.norms()):
        heads = [float(state.weights[layer][row, head].norm()) for row in range(3) for head in range(2)]
        assert norms["weights"] == pytest.approx(max(heads))
        assert norms["momentum"] < norms["weights"]
    assert "momentum" not in build(momentum=False).initial_state(1).norms()[0]


def test_saving_and_loading_is_bit_equal(state: MemoryState, tmp_path: Path) -> None:
    state.save(tmp_path / "state.safetensors")
    loaded = MemoryState.load(tmp_path / "state.safetensors")
    assert loaded.equal(state)
    assert torch.equal(build()(tokens(3), loaded)[0], build()(tokens(3), state)[0])
    for settings in ({"chunk_size": 1}, {"conv": 0, "momentum": False}, {"depth": 1, "persistent": 3}):
        other = build(**settings)(tokens())[1].detach()
        other.save(tmp_path / "other.safetensors")
        assert MemoryState.load(tmp_path / "other.safetensors").equal(other)


def test_equality_sees_every_tensor(state: MemoryState) -> None:
    for name, tensor in state.tensors().items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        assert not state.equal(MemoryState.from_tensors({**state.tensors(), name: changed})), name
    assert not state.equal(state.rows([0, 1]))
    assert not state.equal(build(momentum=False).initial_state(3))


def test_bad_files_are_refused(state: MemoryState, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "state.safetensors"
    with pytest.raises(FeatclError, match="not a saved memory state"):
        MemoryState.load(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(FeatclError, match="not a saved memory state"):
        MemoryState.load(file)
    for lost in ("weights.1", "momentum.0", "count", "tail"):
        save_file({name: t.contiguous() for name, t in state.tensors().items() if name != lost}, file)
        with pytest.raises(FeatclError, match="missing, or one too many"):
            MemoryState.load(file)
    save_file({**state.tensors(), "more": torch.zeros(3)}, file)
    with pytest.raises(FeatclError, match="'more' is missing, or one too many"):
        MemoryState.load(file)
    for name, wrong in (("count", torch.zeros(3)), ("keys", state.keys[:2].clone()), ("weights.0", torch.tensor(1.0))):
        save_file({**state.tensors(), name: wrong}, file)
        with pytest.raises(FeatclError, match="not a saved memory state"):
            MemoryState.load(file)


def test_rows_stack_and_repeat(state: MemoryState) -> None:
    assert MemoryState.stack([state.rows(row) for row in range(3)]).equal(state)
    assert state.rows([2, 0]).rows(1).equal(state.rows(0))
    assert state.rows(-1).equal(state.rows(2))
    assert state.rows(slice(1, 3)).equal(state.rows(torch.tensor([1, 2])))
    repeated = state.repeat(2)
    assert repeated.batch == 6
    assert all(repeated.rows(row).equal(state.rows(row // 2)) for row in range(6))
    assert state.rows([]).batch == 0
    for wrong in (3, [0, 5], torch.tensor([-9])):
        with pytest.raises(FeatclError, match="batch of 3"):
            state.rows(wrong)
    with pytest.raises(FeatclError, match="only states of one memory"):
        MemoryState.stack([state, build(chunk_size=8).initial_state(1)])
    with pytest.raises(FeatclError, match="at least one"):
        MemoryState.stack([])


def test_gradients_flow_through_rows_and_end_at_detach() -> None:
    memory = build()
    state = memory(tokens(2))[1]
    assert state.rows(0).weights[0].requires_grad
    assert MemoryState.stack([state, state]).repeat(2).weights[0].requires_grad
    assert not any(tensor.requires_grad for tensor in state.detach().named().values())


def test_fields_cannot_be_assigned(state: MemoryState) -> None:
    with pytest.raises(AttributeError):
        state.weights = ()  # type: ignore[misc]


# --- users


def test_every_user_has_a_state_of_their_own(tmp_path: Path) -> None:
    memory, users = build(), MemoryStates()
    names = ["anna", "böb / ../x", "", "1.weights.0"]
    for seed, name in enumerate(names):
        users[name] = memory(tokens(seed=seed))[1]
    assert len(users) == 4
    assert set(users) == set(names)
    assert not users["anna"].equal(users[""])
    assert not users["anna"].weights[0].requires_grad
    assert users.nbytes == 4 * users["anna"].nbytes
    users.save(tmp_path / "users.safetensors")
    loaded = MemoryStates.load(tmp_path / "users.safetensors")
    assert list(loaded) == list(users)
    assert all(loaded[name].equal(users[name]) for name in names)
    del loaded["anna"]
    assert "anna" not in loaded
    assert loaded.get("anna") is None
    assert "anna" in users


def test_what_is_kept_is_a_copy(state: MemoryState) -> None:
    users, before = MemoryStates(), state.detach()
    users["anna"] = state
    state.weights[0].zero_()
    assert users["anna"].equal(before)


def test_a_limit_forgets_who_was_away_longest(state: MemoryState, tmp_path: Path) -> None:
    users = MemoryStates(limit=2)
    for name in ("anna", "ben"):
        users[name] = state
    assert users["anna"].equal(state)  # reading is use
    users["cleo"] = state
    assert list(users) == ["anna", "cleo"]
    users.save(tmp_path / "users.safetensors")
    loaded = MemoryStates.load(tmp_path / "users.safetensors")
    loaded["dora"] = state
    assert list(loaded) == ["cleo", "dora"]


def test_bad_users_are_refused(state: MemoryState, tmp_path: Path) -> None:
    users = MemoryStates()
    with pytest.raises(FeatclError, match="no memory of user 'anna': there is none"):
        users["anna"]
    with pytest.raises(FeatclError, match="to forget"):
        del users["anna"]
    with pytest.raises(FeatclError, match="a user is a string"):
        users[3] = state  # type: ignore[index]
    with pytest.raises(FeatclError, match="of user 'anna' a MemoryState is kept, not a Tensor"):
        users["anna"] = torch.zeros(3)  # type: ignore[assignment]
    with pytest.raises(FeatclError, match="limit 0"):
        MemoryStates(limit=0)
    with pytest.raises(FeatclError, match="does not hold saved memory states"):
        MemoryStates.load(tmp_path / "nothing")
    state.save(tmp_path / "one")
    with pytest.raises(FeatclError, match="does not hold saved memory states"):
        MemoryStates.load(tmp_path / "one")
    users.save(tmp_path / "empty")
    assert len(MemoryStates.load(tmp_path / "empty")) == 0
