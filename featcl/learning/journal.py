"""An append-only file of records, each on the disk before it is acted upon; a torn last line is cut back.

A line is a JSON object whose `check` is the CRC-32 of its other fields as canonical JSON, so that a line that was
damaged later is found and named, not read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.files import append_bytes, open_append


class Journal:
    """A write-ahead journal.

    Args:
        path: The file; it is made with its folder, or continued.
        after: So many records are known already; only later ones are kept in `records`.

    Raises:
        FeatclError: If a line is damaged, unless it is the last and was torn, or it is no journal; nothing is changed.

    Attributes:
        records: What it held after those when it was opened, in order.
        known: The check of the last of those that are known, None where there is none.
    """

    def __init__(self, path: str | Path, *, after: int = 0) -> None:
        self.path = Path(path)
        self.records, self._count, size, self.known = _read(self.path, after)
        self._file = open_append(self.path)
        self._file.truncate(size)

    def __len__(self) -> int:
        return self._count

    def append_(self, record: Mapping[str, Any]) -> str:
        """Put a record on the disk; if that fails, as on a full disk, the file is as before.

        Returns:
            Its check.

        Raises:
            OSError: If it cannot be written.
        """
        plain = json.loads(json.dumps(record))  # as it will be read: keys are strings there
        check = check_of(plain)
        line = json.dumps({**plain, "check": check}, ensure_ascii=True).encode() + b"\n"
        append_bytes(self._file, line, sync=True)
        self._count += 1
        return check

    def close(self) -> None:
        """Nothing more will be written."""
        self._file.close()


def _read(path: Path, after: int) -> tuple[list[dict[str, Any]], int, int, str | None]:
    """Whole records after the first `after`; number and bytes of all; the check of number `after`.

    A torn last line is left out.
    """
    records: list[dict[str, Any]] = []
    known: str | None = None
    count = size = torn = 0
    with open(path, "rb") if path.is_file() else nullcontext(()) as lines:
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if torn or (record is None and not _torn(line)):
                raise FeatclError(
                    f"{path}:{torn or number}: this line was damaged after it was written, or is of no journal; "
                    "restore the file, or move it away"
                )
            if record is None or not line.endswith(b"\n"):
                torn = number  # while it was written, if nothing follows
                continue
            count, size = count + 1, size + len(line)
            known = check_of(record) if count == after else known
            if count > after:
                records.append(record)
    return records, count, size, known


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where it is damaged."""
    try:
        record = json.loads(line)
        check = record.pop("check")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return record if check == check_of(record) else None


def _torn(line: bytes) -> bool:
    """Whether a last line is the beginning of one of ours, or what a power cut leaves of it: zeros."""
    begun = not line.endswith(b"\n") and line.startswith(b'{"'[: len(line)])
    return line.startswith(b"\0") or (begun and not _is_json(line))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def check_of(record: Mapping[str, Any]) -> str:
    """CRC-32 of a record, as it is read."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{zlib.crc32(text.encode()):08x}"
