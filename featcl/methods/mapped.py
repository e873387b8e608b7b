"""Records in a file that is read through a memory map, for buffers larger than memory.

The file is only ever appended to, so that a place in it means the same for every version of a learner; what a buffer
drops stays in the file. A reservoir of n takes up n (1 + ln(N / n)) of N records on average, which grows slowly.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.files import append_bytes, open_append

Place = tuple[int, int, int]  # first byte, length, CRC-32


class MappedFile:
    """A file of records.

    Args:
        path: The file, which belongs to one learner; where it is not there, the first record makes it and its folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: Any = None  # opened when something is written: a run that is killed before leaves nothing behind
        self._map: mmap.mmap | None = None
        self._used = False

    @property
    def nbytes(self) -> int:
        """Length of the file, records that nobody refers to included."""
        return self.path.stat().st_size if self.path.exists() else 0

    def put_(self, data: bytes) -> Place:
        """Append a record; a killed process does not lose it."""
        start, self._used = self.nbytes, True
        append_bytes(self._opened(), data)
        return start, len(data), zlib.crc32(data)

    def get(self, place: Sequence[int]) -> bytes:
        """The record that `put_` was given.

        Raises:
            FeatclError: If the file does not hold it any more.
        """
        start, length, checksum = place
        if self._map is None or len(self._map) < start + length:
            self._remap_()
        data = b"" if self._map is None else self._map[start : start + length]
        if len(data) != length or zlib.crc32(data) != checksum:
            raise FeatclError(
                f"{self.path}: bytes {start} to {start + length} are not the record that was written there; "
                "the file belongs to one learner and goes with its saved state"
            )
        return data

    def cut_(self, end: int) -> None:
        """Go on after `end`: a learner returned to where it was then.

        What was written since is forgotten if the file was just opened, so that a resumed run writes what the one that
        was interrupted wrote. A running learner that goes back keeps it: a saved state may still refer to it.

        Raises:
            FeatclError: If the file is shorter.
        """
        if self.nbytes < end:
            raise FeatclError(f"{self.path} has {self.nbytes} bytes, the saved state needs {end}: it is not its file")
        first, self._used = not self._used, True
        if first and self.nbytes > end:
            self._unmap_()
            self._opened().truncate(end)

    def _opened(self) -> Any:
        if self._file is None:
            self._file = open_append(self.path)
        return self._file

    def _remap_(self) -> None:
        self._unmap_()
        if self.nbytes:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _unmap_(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
