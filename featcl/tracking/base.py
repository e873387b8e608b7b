"""What every tracker can do, and several of them as one."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeGuard, runtime_checkable

from featcl.errors import FeatclError
from featcl.files import digest_json

log = logging.getLogger(__name__)
Record = Mapping[str, Any]
NO_RESULT = ("output", "checkpoint", "tracking")  # keys of a config that say where numbers lie, not what they are
LONGEST_TAG = 64  # letters, as W&B allows


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
        """Write what is still buffered, take the final numbers, and close; without numbers the run is interrupted."""
        ...


@dataclass(frozen=True)
class RunNames:
    """What a run is called wherever its numbers go.

    Attributes:
        project: The place of many studies.
        study: Group: a question.
        arm: Job type: one config in it.
        seed: Named in the run's title.
        config: The resolved config.
        tags: To find it by.
    """

    project: str
    study: str
    arm: str
    seed: int
    config: Record
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Record) -> RunNames:
        """From a resolved config as JSON data, such as `config.json`.

        Raises:
            FeatclError: If it is no run's config.
        """
        missing = [key for key in ("study", "arm", "seed") if key not in config]
        if missing:
            raise FeatclError(f"a run's config has study, arm and seed; {missing[0]!r} is missing")
        tracking = config.get("tracking") or {}
        content = {key: value for key, value in config.items() if key != "digest"}
        return cls(
            project=str(tracking.get("project", "featcl")),
            study=str(config["study"]),
            arm=str(config["arm"]),
            seed=int(config["seed"]),
            config=content,
            tags=run_tags(content),
        )

    @property
    def id(self) -> str:
        """From what decides the numbers alone: the same wherever the run lies and however often it is resumed."""
        return digest_json({key: value for key, value in self.config.items() if key not in NO_RESULT})[:16]

    @property
    def title(self) -> str:
        """Shown in lists."""
        return f"{self.arm}-seed-{self.seed}"


def run_tags(config: Record) -> tuple[str, ...]:
    """Model, stream, kind of adapter, objectives and methods of a config, and the tags that it asks for."""
    learners = config.get("phases") or [config.get("learner") or {}]
    stream, adapter = config.get("stream") or {}, config.get("adapter") or {}
    found = [
        config.get("model"),
        stream.get("name") or Path(str(stream.get("path") or "")).stem,
        adapter.get("kind"),
        *(objective.get("name") for learner in learners for objective in learner.get("objectives", ())),
        *(method.get("name") for method in config.get("methods") or ()),
        *((config.get("tracking") or {}).get("tags") or ()),
    ]
    return tuple(dict.fromkeys(str(tag)[-LONGEST_TAG:] for tag in found if tag))


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


class Guarded:
    """A tracker that may fail: that is said once, in one line, and the run goes on without it.

    Args:
        tracker: Raises whatever it raises; it is not called again after that.
        name: Of the service, for the line.

    Attributes:
        failed: Whether it did.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.name = name
        self.failed = False
        self._tracker: Tracker | None = tracker

    def log(self, record: Record, step: int) -> None:
        self._try("log", lambda tracker: tracker.log(record, step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._try("table", lambda tracker: tracker.table(name, columns, rows))

    def image(self, name: str, path: str | Path) -> None:
        self._try("image", lambda tracker: tracker.image(name, path))

    def finish(self, summary: Record) -> None:
        self._try("finish", lambda tracker: tracker.finish(summary))
        self._tracker = None

    def _try(self, what: str, send: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            send(self._tracker)
        except Exception as error:  # noqa: BLE001 - whatever a service raises, the run goes on; metrics.jsonl has it all
            self._tracker, self.failed = None, True
            log.warning(
                "%s %s failed (%s); the run goes on without it, metrics.jsonl is whole", self.name, what, line_of(error)
            )


class Behind:
    """A guarded tracker in a thread of its own: the run waits for it at its end alone.

    A call into a service hops between threads and processes, milliseconds each on a busy machine; here that happens
    while the run computes. Order is kept. A service that hangs is left behind with one line.

    Args:
        tracker: Called from the thread only.
        seconds: That `finish` waits.
    """

    def __init__(self, tracker: Guarded, *, seconds: float = 120.0) -> None:
        self.name = tracker.name
        self._tracker = tracker
        self._seconds = seconds
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: Thread | None = Thread(target=self._work, name=f"featcl {tracker.name}", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the tracker did, of what it was sent so far."""
        return self._tracker.failed

    def log(self, record: Record, step: int) -> None:
        kept = dict(record)
        self._queue.put(lambda: self._tracker.log(kept, step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        kept = [list(row) for row in rows]
        self._queue.put(lambda: self._tracker.table(name, list(columns), kept))

    def image(self, name: str, path: str | Path) -> None:
        self._queue.put(lambda: self._tracker.image(name, path))

    def finish(self, summary: Record) -> None:
        """As a tracker's; a second call does nothing."""
        if self._thread is None:
            return
        self._queue.put(lambda: self._tracker.finish(summary))
        self._queue.put(None)
        self._thread.join(self._seconds)
        if self._thread.is_alive():
            self._tracker.failed = True
            log.warning("%s does not end; the run goes on without it, metrics.jsonl is whole", self.name)
        self._thread = None

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call()


def flatten(values: Record, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, names joined by a slash: {"a": {"b": 1}} -> {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        flat |= flatten(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


def scalars(record: Record) -> dict[str, float]:
    """What of a record can be drawn: finite numbers."""
    return {name: value for name, value in record.items() if _is_number(value)}


def cells(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows for services whose cells are numbers and text: lists and mappings as JSON text."""
    return [
        [json.dumps(cell, ensure_ascii=False) if isinstance(cell, (list, tuple, dict)) else cell for cell in row]
        for row in rows
    ]


def line_of(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
