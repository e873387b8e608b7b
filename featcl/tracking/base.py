"""What every tracker can do, and several of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Record = Mapping[str, Any]


@runtime_checkable
class Tracker(Protocol):
    """Receives what a run measures. None of the methods may change the run."""

    def log(self, record: Record, step: int) -> None:
        """Take one flat record of update `step`: scalars by name (`train/loss`), `tokens_seen`, and plain text."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Take a table, such as the score matrix in long form or sampled completions."""
        ...

    def image(self, name: str, path: str | Path) -> None:
        """Take a picture that lies at `path`."""
        ...

    def finish(self, summary: Record) -> None:
        """Write what is still buffered, take the final numbers, and close."""
        ...


class Trackers:
    """Several trackers as one; the first is the JSONL file, which is the truth."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers

    def log(self, record: Record, step: int) -> None:
        for tracker in self.trackers:
            tracker.log(record, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        for tracker in self.trackers:
            tracker.table(name, columns, rows)

    def image(self, name: str, path: str | Path) -> None:
        for tracker in self.trackers:
            tracker.image(name, path)

    def finish(self, summary: Record) -> None:
        for tracker in self.trackers:
            tracker.finish(summary)


def flatten(values: Record, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, names joined by a slash: {"a": {"b": 1}} -> {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        flat |= flatten(value, name) if isinstance(value, Mapping) else {name: value}
    return flat
