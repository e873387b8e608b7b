"""Budgets, to the byte; records in memory and in a mapped file; state and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.buffer import Buffer
from featcl.methods.mapped import MappedFile
from featcl.methods.replay import build_selection
from featcl.objectives.experience import Experience
from featcl.streams import Trajectory
from tests.methods.test_selection import Seeded


def add(buffer: Buffer, number: int, record: bytes, seed: int = 0) -> None:
    generator: Any = None
    experience = Experience(Trajectory(f"t{number}", text="ab"), [], generator, weight=0.5)
    buffer.add_(record, experience, Seeded(seed))  # type: ignore[arg-type]


def saved_bytes(buffer: Buffer) -> int:
    """What the entries take up where they are saved."""
    labels = sum(len(json.dumps(entry).encode()) for entry in buffer.state()["entries"])
    return labels + sum(tensor.nbytes for tensor in buffer.tensors().values())


def records(count: int) -> list[bytes]:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 200, (count,), generator=draw).tolist()
    return [bytes([number % 251]) * size for number, size in enumerate(sizes)]


@pytest.mark.parametrize("select", ["reservoir", "balanced"])
def test_the_budget_of_bytes_is_never_exceeded_and_well_used(select: str) -> None:
    buffer = Buffer(build_selection(select), budget_bytes=2000)
    held = []
    for number, record in enumerate(records(120)):
        add(buffer, number, record)
        assert buffer.held_bytes == saved_bytes(buffer) == buffer.stored_bytes
        held.append(buffer.held_bytes)
    assert max(held) <= 2000
    assert min(held[40:]) > 1600  # a record takes up at most 270
    assert len(buffer) < 40


def test_a_record_beyond_the_whole_budget_is_not_kept() -> None:
    buffer = Buffer(build_selection("reservoir"), budget_bytes=300)
    add(buffer, 0, b"x" * 400)
    assert len(buffer) == 0


@pytest.mark.parametrize(
    "given", [{"budget": 0}, {"budget_bytes": 0}, {"budget": -3}, {"budget": 2.5}, {"budget": True}]
)
def test_a_budget_of_nothing_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(FeatclError, match="must be a whole number of at least 1"):
        Buffer(build_selection("reservoir"), **given)


@pytest.mark.parametrize("given", [{}, {"budget": 3, "budget_bytes": 3}])
def test_one_budget_is_given(given: dict[str, Any]) -> None:
    with pytest.raises(FeatclError, match="one of the two"):
        Buffer(build_selection("reservoir"), **given)


def test_what_is_read_is_what_was_kept(tmp_path: Path) -> None:
    plain = Buffer(build_selection("reservoir"), budget=12)
    mapped = Buffer(build_selection("reservoir"), budget=12, file=tmp_path / "replay" / "records.bin")
    for number, record in enumerate(given := records(50)):
        add(plain, number, record)
        add(mapped, number, record)
    assert [entry.number for entry in plain.entries] == [entry.number for entry in mapped.entries]
    for one, other in zip(plain.entries, mapped.entries, strict=True):
        assert plain.read(one) == mapped.read(other) == given[one.number]
    assert mapped.tensors() == {}
    assert mapped.stored_bytes > mapped.held_bytes  # what was dropped is still in the file


def test_a_buffer_goes_on_from_its_state(tmp_path: Path) -> None:
    for file in (None, tmp_path / "a.bin"):
        buffer = Buffer(build_selection("balanced"), budget_bytes=900, file=file)
        for number, record in enumerate(records(20)):
            add(buffer, number, record)
        state = json.loads(json.dumps(buffer.state()))
        tensors = {name: tensor.clone() for name, tensor in buffer.tensors().items()}
        for number, record in enumerate(records(40)[20:], start=20):
            add(buffer, number, record)
        expected = [(entry.number, buffer.read(entry)) for entry in buffer.entries]

        other = Buffer(build_selection("balanced"), budget_bytes=900, file=file)
        other.load_state_(state)
        other.load_tensors_(tensors)
        assert [(e.number, other.read(e)) for e in other.entries] != expected  # negative control
        for number, record in enumerate(records(40)[20:], start=20):
            add(other, number, record)
        assert [(entry.number, other.read(entry)) for entry in other.entries] == expected


def test_a_file_that_is_not_the_buffers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.bin"
    buffer = Buffer(build_selection("reservoir"), budget=3, file=path)
    add(buffer, 0, b"hello")
    state = buffer.state()
    path.write_bytes(b"hellO")
    with pytest.raises(FeatclError, match="not the record"):
        buffer.read(buffer.entries[0])
    path.write_bytes(b"he")
    with pytest.raises(FeatclError, match="it is not its file"):
        Buffer(build_selection("reservoir"), budget=3, file=path).load_state_(state)
    with pytest.raises(FeatclError, match="in a file"):
        Buffer(build_selection("reservoir"), budget=3).load_state_(state)


def test_a_file_returns_to_where_it_was(tmp_path: Path) -> None:
    file = MappedFile(tmp_path / "records.bin")
    first = file.put_(b"one")
    assert file.get(first) == b"one"
    end = file.nbytes
    second = file.put_(b"two")
    assert file.get(second) == b"two"
    file.cut_(end)  # a running learner goes back, and a state that was saved before may still refer to the second
    assert (file.get(first), file.get(second)) == (b"one", b"two")
    again = MappedFile(tmp_path / "records.bin")  # a learner that resumes there
    again.cut_(end)
    assert again.get(first) == b"one"
    with pytest.raises(FeatclError, match="not the record"):
        again.get(second)
    assert again.put_(b"six")[0] == end
