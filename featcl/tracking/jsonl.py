"""`metrics.jsonl`: one line per record, the truth from which everything else is rebuilt.

Lines are buffered and written together; `flush(sync=True)` before a checkpoint is saved makes them durable. A file
cut in the middle of its last line, as by a power cut, is read up to that line, and that is said.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.files import append_bytes, read_state, write_json, write_text
from featcl.tracking.base import Record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricsFile:
    """What a metrics file holds.

    Attributes:
        records: Its lines, in order.
        torn: What was wrong with the last line if it is cut off, else None.
    """

    records: tuple[dict[str, Any], ...]
    torn: str | None


@dataclass(frozen=True)
class CutBack:
    """What `cut_back` did: the records it kept, how many later ones it dropped, and the torn line if there was one."""

    kept: tuple[dict[str, Any], ...]
    dropped: int
    torn: str | None


class JsonlTracker:
    """Appends records to `metrics.jsonl`, and keeps tables as JSON files in `tables/` beside it.

    Args:
        path: The metrics file; made if it does not exist, continued if it does.
        flush_every: Records after which the buffer is written.
        flush_seconds: Seconds after which it is written at the next record.
    """

    def __init__(self, path: str | Path, *, flush_every: int = 50, flush_seconds: float = 2.0) -> None:
        self.path = Path(path)
        self.flush_every = flush_every
        self.flush_seconds = flush_seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = len(_repaired(self.path)) if self.path.exists() else 0
        self._buffer: list[str] = []
        self._written = time.monotonic()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (until `finish`)

    def log(self, record: Record, step: int) -> None:
        line = {"update": step, **record}
        self._buffer.append(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n")
        self.lines += 1
        if len(self._buffer) >= self.flush_every or time.monotonic() - self._written >= self.flush_seconds:
            self.flush()

    def flush(self, *, sync: bool = False) -> None:
        """Write the buffer; with `sync`, onto the disk, as before a checkpoint that counts on these lines."""
        append_bytes(self._file, "".join(self._buffer).encode())
        self._buffer.clear()
        self._written = time.monotonic()
        if sync:
            os.fsync(self._file.fileno())

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        file = table_file(self.path.parent, name)
        write_json(file, {"name": name, "columns": list(columns), "rows": [list(row) for row in rows]})

    def image(self, name: str, path: str | Path) -> None:
        """Nothing to do: the picture already lies in the run's folder."""

    def finish(self, summary: Record) -> None:
        """Write what is left and close; `summary.json` is the run's own business."""
        if not self._file.closed:
            try:
                self.flush(sync=True)
            finally:
                self._file.close()


def read_metrics(path: str | Path) -> MetricsFile:
    """Read a metrics file up to a last line that is cut off.

    Raises:
        FeatclError: If there is no file, or a line before the last is not a JSON object (file and line are named).
    """
    path = Path(path)
    if not path.is_file():
        raise FeatclError(f"{path}: no such metrics file")
    lines, torn = _lines(path)
    return MetricsFile(tuple(_parsed(path, number, line) for number, line in lines), torn)


def table_file(folder: str | Path, name: str) -> Path:
    """Where a run keeps a table: the last one of that name that it was given."""
    return Path(folder) / "tables" / f"{name.replace('/', '_')}.json"


def read_rows(folder: str | Path, name: str) -> list[list[Any]]:
    """The rows of a run's table; none where it has no such table.

    Raises:
        FeatclError: If the file is damaged.
    """
    file = table_file(folder, name)
    return read_state(file, "rows")["rows"] if file.is_file() else []


def _lines(path: Path) -> tuple[list[tuple[int, bytes]], str | None]:
    """Lines with their numbers, empty ones and one that is cut off left out; and what was wrong with that one."""
    *whole, rest = path.read_bytes().split(b"\n")
    lines = [(number, line) for number, line in enumerate(whole, 1) if line.strip()]
    if not rest:
        return lines, None
    last = len(whole) + 1
    try:
        _parsed(path, last, rest)
    except FeatclError:
        return lines, f"{path.name}: line {last} is cut off after {len(rest)} bytes; read up to it"
    return [*lines, (last, rest)], None


def cut_back(path: str | Path, *, update: int | None = None, lines: int | None = None) -> CutBack:
    """Bring a metrics file back to where a checkpoint was saved, so that a resumed run continues it.

    Args:
        path: The metrics file; one that does not exist counts as empty.
        update: Keep records whose `update` is at most this.
        lines: Keep this many first records (`JsonlTracker.lines` when the checkpoint was saved); exact also where
            records of the checkpoint's own update were written after it.

    Raises:
        FeatclError: If neither or both are given, or the file has fewer records than the checkpoint counts on.
    """
    if (update is None) == (lines is None):
        raise FeatclError("cut_back needs either the update number or the number of lines to keep")
    path = Path(path)
    found, torn = _lines(path) if path.exists() else ([], None)
    if lines is not None and len(found) < lines:
        raise FeatclError(f"{path}: {len(found)} records, but the checkpoint was saved after {lines}")
    kept = tuple(_parsed(path, number, line) for number, line in found[:lines])  # what a power cut left after is gone
    if update is not None:
        kept = tuple(record for record in kept if record.get("update", 0) <= update)
    if len(kept) < len(found) or torn:
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    return CutBack(kept, len(found) - len(kept), torn)


def _repaired(path: Path) -> tuple[dict[str, Any], ...]:
    """The records of a file that is about to be continued; its last line is completed or, if torn, taken off."""
    found = read_metrics(path)
    if found.torn:
        log.warning("%s; the run continues from there", found.torn)
    if found.torn or (found.records and not path.read_bytes().endswith(b"\n")):
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found.records))
    return found.records


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise FeatclError(f"{path}:{number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise FeatclError(f"{path}:{number}: a record is a JSON object, not {type(record).__name__}")
    return record


def _plain(value: Any) -> Any:
    """JSON values: NaN and infinities are null, one-element tensors and NumPy scalars are numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number
