"""Streams on disk, read one trajectory at a time whatever their size and format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from featcl.errors import FeatclError
from featcl.files import append_bytes, open_append
from featcl.streams.formats import CONVERTERS, Place, sniff
from featcl.streams.records import Raw, parse, raw_records
from featcl.streams.seen import Seen
from featcl.streams.trajectory import Trajectory

Format = Literal["auto", "jsonl", "openai", "sharegpt", "swe_agent", "tau_bench", "atif", "live"]


def read_trajectories(
    path: str | Path, *, strict: bool = True, quarantine: str | Path | None = None, format: Format = "auto"
) -> Iterator[Trajectory]:
    """Read a stream lazily, one trajectory at a time, in bounded memory.

    Formats, all of them plain or gzipped, as JSONL, a JSON array or one document (see `formats` for what becomes of
    each field): `jsonl`, one of our own records a line; `openai`, fine-tuning files for chats and preferences;
    `sharegpt`; `swe_agent`, a .traj file; `tau_bench`, a results file; `atif`, through its own package; `live`, what
    a `LiveSource` wrote. `auto` tells them apart by the first record.

    Memory is bounded by the largest record: ids seen are kept as digests in a temporary file (`Seen`).

    Args:
        path: A file, or a folder: then all .traj files in it, or else all .jsonl and .json files, by name.
        strict: Stop at the first bad record; otherwise leave it out and go on.
        quarantine: JSONL file to which bad records are added with file, line and reason (not strict only). One
            that is there already is not added again.
        format: What the file holds.

    Returns:
        Iterator over trajectories in file order.

    Raises:
        FeatclError: If the file is missing, unreadable or holds no trajectory, or a record is bad and `strict`.
    """
    path = Path(path)
    if format not in get_args(Format):
        raise FeatclError(f"unknown stream format {format!r}; formats are {', '.join(get_args(Format))}")
    if not path.exists():
        raise FeatclError(f"{path}: no such file; a stream is a .jsonl or .jsonl.gz file")
    return _read(path, strict, None if quarantine is None else _Quarantine(Path(quarantine)), format)


def _read(path: Path, strict: bool, quarantine: _Quarantine | None, format: str) -> Iterator[Trajectory]:
    seen = Seen()
    try:
        for file in _files(path):
            yield from _read_file(file, path, seen, strict=strict, quarantine=quarantine, format=format)
        if not seen.count:
            raise FeatclError(f"{path}: empty stream; it holds no valid trajectory")
    finally:
        seen.close()


def _files(path: Path) -> list[Path]:
    """The file, or those of a folder."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for endings in ((".traj", ".traj.gz"), (".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        if found := [file for file in files if file.name.endswith(endings)]:
            return found
    return []


def _read_file(
    file: Path, path: Path, seen: Seen, *, strict: bool, quarantine: _Quarantine | None, format: str
) -> Iterator[Trajectory]:
    known = None if format == "auto" else format
    for raw in raw_records(file):
        try:
            record = parse(raw.data)
            known = known or sniff(record)
            trajectory = CONVERTERS[known](record, Place(file, raw.number, path if path != file else None))
            if known == "live" and not raw.complete:
                return  # what was being written when the writer stopped
            if not seen.add(trajectory.id):
                raise FeatclError(f"trajectory id {trajectory.id!r} occurs twice; ids are unique in a stream")
        except FeatclError as error:
            if known == "live" and not raw.complete:
                return
            if strict:
                raise FeatclError(f"{file}:{raw.number}: {error}") from error
            if quarantine is not None:
                quarantine.add(file, raw, error)
            continue
        yield trajectory


class _Quarantine:
    """A JSONL file of what was left out and why; each line once, also over several readings."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._written: Seen | None = None

    def add(self, source: Path, raw: Raw, error: FeatclError) -> None:
        entry: dict[str, Any] = {"file": str(source), "line": raw.number, "reason": str(error)}
        text = json.dumps({**entry, "raw": raw.data.decode("utf-8", "replace").rstrip("\n")}) + "\n"
        if self._written is None:
            self._written = self._before()
        if self._written.add(text):
            with open_append(self.file) as file:
                append_bytes(file, text.encode())

    def _before(self) -> Seen:
        """What earlier readings wrote; a last line that was torn is taken off, so that the next one begins anew."""
        written, whole = Seen(), 0
        if not self.file.is_file():
            return written
        with open(self.file, "rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    written.add(line)
                    whole += len(line)
        os.truncate(self.file, whole)
        return written
