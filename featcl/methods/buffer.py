"""A bounded buffer of records, and the interface of what decides which of them stay.

The budget is in entries, or in bytes. Bytes are exact: an entry takes up its record, its vector and its label, as they
are saved, and the sum is never above the budget. With a file (`MappedFile`), records lie there and not in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.mapped import MappedFile, Place
from featcl.methods.method import View
from featcl.objectives.experience import Experience


@dataclass(frozen=True, eq=False)
class Look:
    """What a selection needs to know of an experience, once.

    Attributes:
        mark: Plain JSON values.
        vector: A tensor, or None.
        forward_tokens, backward_tokens: What it cost to find out.
    """

    mark: Mapping[str, Any] = field(default_factory=dict)
    vector: Tensor | None = None
    forward_tokens: int = 0
    backward_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Entry:
    """One record of a buffer.

    Attributes:
        number: Of all that were ever offered, from 0.
        id: The trajectory's.
        weight: How far it was trusted when it was learned from.
        look: What the selection knows of it.
        record: Its bytes, or where they lie in the buffer's file.
    """

    number: int
    id: str
    weight: float
    look: Look
    record: Tensor | Place

    @property
    def label(self) -> list[Any]:
        """All but its tensors, as JSON."""
        place = None if isinstance(self.record, Tensor) else list(self.record)
        return [self.number, self.id, self.weight, dict(self.look.mark), place]

    @property
    def nbytes(self) -> int:
        """Bytes of record, vector and label."""
        record = self.record.nbytes if isinstance(self.record, Tensor) else self.record[1]
        vector = 0 if self.look.vector is None else self.look.vector.nbytes
        return record + vector + len(json.dumps(self.label).encode())


class Selection(Protocol):
    """Decides which records stay in a full buffer."""

    name: str

    def look_(self, experience: Experience, view: View, generator: torch.Generator) -> Look:
        """What has to be known of an experience that is offered; called once for each, in order."""
        ...

    def victim_(self, entries: Sequence[Entry], generator: torch.Generator) -> int:
        """Place of the entry that goes; the last one is the newest, and may be it."""
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers beside the entries' looks, as JSON."""
        ...

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        ...


class Buffer:
    """Records of which a selection keeps so many.

    Args:
        selection: Decides which.
        budget: Largest number of entries, or None.
        budget_bytes: Largest number of bytes, or None; exactly one of the two.
        file: Where records lie; None: in memory.
        owner: Name of the method, for errors.

    Raises:
        FeatclError: For a budget of zero, none, or two.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        budget: int | None = None,
        budget_bytes: int | None = None,
        file: str | Path | None = None,
        owner: str = "replay",
    ) -> None:
        check_budget(owner, budget=budget, budget_bytes=budget_bytes)
        self.selection, self.budget, self.budget_bytes = selection, budget, budget_bytes
        self.file = None if file is None else MappedFile(file)
        self.entries: tuple[Entry, ...] = ()
        self.offered = self.forward_tokens = self.backward_tokens = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, id: str) -> bool:
        return any(entry.id == id for entry in self.entries)

    @property
    def held_bytes(self) -> int:
        """Bytes of all entries, which the budget bounds."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def stored_bytes(self) -> int:
        """The same, but with a file its whole length."""
        if self.file is None:
            return self.held_bytes
        return self.held_bytes - sum(entry.record[1] for entry in self.entries) + self.file.nbytes  # type: ignore[misc]

    def add_(self, record: bytes, experience: Experience, view: View) -> None:
        """Offer a record; then entries go, the new one perhaps among them, until the budget is kept.

        Args:
            record: What is kept of the experience.
            experience: As it was learned from.
            view: The learner after it.
        """
        purpose = f"buffer/{self.offered}"
        look = self.selection.look_(experience, view, view.generator(f"{purpose}/look"))
        self.forward_tokens += look.forward_tokens
        self.backward_tokens += look.backward_tokens
        kept = _in_memory(record) if self.file is None else self.file.put_(record)
        entries = [*self.entries, Entry(self.offered, experience.trajectory.id, experience.weight, look, kept)]
        self.offered += 1
        generator, held = view.generator(purpose), self.held_bytes + entries[-1].nbytes
        while self._too_many(len(entries), held):
            gone = entries.pop(self.selection.victim_(entries, generator))
            held -= gone.nbytes
        self.entries = tuple(entries)

    def _too_many(self, count: int, held: int) -> bool:
        limit, size = (self.budget, count) if self.budget_bytes is None else (self.budget_bytes, held)
        return limit is not None and size > limit

    def draw(self, count: int, generator: torch.Generator) -> list[Entry]:
        """At most `count` different entries, each as likely as the others."""
        order = torch.randperm(len(self), generator=generator)[:count].tolist()
        return [self.entries[place] for place in order]

    def read(self, entry: Entry) -> bytes:
        """The record of an entry."""
        if isinstance(entry.record, Tensor):
            return entry.record.numpy().tobytes()
        assert self.file is not None  # places are made by a file only
        return self.file.get(entry.record)

    # --- part of every version

    def state(self) -> dict[str, Any]:
        """Labels and counters; records and vectors are in `tensors`."""
        return {
            "entries": [entry.label for entry in self.entries],
            "counters": [self.offered, self.forward_tokens, self.backward_tokens],
            "selection": self.selection.state(),
            "end": None if self.file is None else self.file.nbytes,
        }

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        if (self.file is None) != (state["end"] is None):
            raise FeatclError("the saved buffer had its records in a file and this one has not, or the reverse")
        self.offered, self.forward_tokens, self.backward_tokens = state["counters"]
        self.selection.load_state_(state["selection"])
        if self.file is not None:
            self.file.cut_(state["end"])
        self.entries = tuple(
            Entry(number, id, weight, Look(mark), torch.empty(0) if place is None else tuple(place))  # type: ignore[arg-type]
            for number, id, weight, mark, place in state["entries"]
        )

    def tensors(self) -> dict[str, Tensor]:
        """Records in memory and vectors, by `record/number` and `vector/number`."""
        records = {f"record/{e.number}": e.record for e in self.entries if isinstance(e.record, Tensor)}
        vectors = {f"vector/{e.number}": e.look.vector for e in self.entries if e.look.vector is not None}
        return records | vectors

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back, after `load_state_`."""

        def whole(entry: Entry) -> Entry:
            vector = tensors.get(f"vector/{entry.number}")
            look = Look(entry.look.mark, None if vector is None else vector.cpu())
            record = tensors[f"record/{entry.number}"].cpu() if isinstance(entry.record, Tensor) else entry.record
            return Entry(entry.number, entry.id, entry.weight, look, record)

        self.entries = tuple(whole(entry) for entry in self.entries)


def check_budget(owner: str, *, budget: int | None, budget_bytes: int | None) -> None:
    """Raise FeatclError unless exactly one of the two is given, a whole number above 0."""
    given = {"budget": budget, "budget_bytes": budget_bytes}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise FeatclError(f"{owner}: give budget (entries) or budget_bytes, one of the two, got {given or 'neither'}")
    checks.count(owner, **given)


def _in_memory(record: bytes) -> Tensor:
    return torch.frombuffer(bytearray(record), dtype=torch.uint8)
