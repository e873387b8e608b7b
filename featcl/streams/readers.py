"""Streams on disk: one trajectory per line of a JSONL file, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from featcl.errors import FeatclError
from featcl.streams.trajectory import Trajectory


def read_trajectories(
    path: str | Path, *, strict: bool = True, quarantine: str | Path | None = None
) -> Iterator[Trajectory]:
    """Read a stream lazily, one trajectory at a time.

    Lines end at line feeds only: other characters that Unicode counts as line breaks occur inside strings.
    Empty lines are skipped.

    Args:
        path: A .jsonl or .jsonl.gz file.
        strict: Stop at the first bad line; otherwise leave it out and go on.
        quarantine: JSONL file to which bad lines are added with file, line and reason (not strict only). A line
            that is there already is not added again.

    Returns:
        Iterator over trajectories in file order.

    Raises:
        FeatclError: If the file is missing, unreadable or holds no trajectory, or a line is bad and `strict`.
    """
    path = Path(path)
    if not path.is_file():
        raise FeatclError(f"{path}: no such file; a stream is a .jsonl or .jsonl.gz file")
    return _read(path, strict, Path(quarantine) if quarantine is not None else None)


def _read(path: Path, strict: bool, quarantine: Path | None) -> Iterator[Trajectory]:
    seen: set[str] = set()
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            trajectory = _parse(line)
            if trajectory.id in seen:
                raise FeatclError(f"trajectory id {trajectory.id!r} occurs twice; ids are unique in a stream")
        except FeatclError as error:
            if strict:
                raise FeatclError(f"{path}:{number}: {error}") from error
            if quarantine is not None:
                _quarantine(quarantine, {"file": str(path), "line": number, "reason": str(error)}, line)
            continue
        seen.add(trajectory.id)
        yield trajectory
    if not seen:
        raise FeatclError(f"{path}: empty stream; it holds no valid trajectory")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):  # a binary file splits at b"\n" only
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise FeatclError(f"{path}:{number + 1}: cannot be read ({error})") from error


def _parse(line: bytes) -> Trajectory:
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        if b"\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise FeatclError(f"not valid UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise FeatclError(f"malformed JSON ({error.msg} at character {error.pos})") from error
    except (ValueError, RecursionError) as error:
        raise FeatclError(f"malformed JSON ({error})") from error
    return Trajectory.from_record(record)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _quarantine(path: Path, entry: dict[str, Any], line: bytes) -> None:
    text = json.dumps({**entry, "raw": line.decode("utf-8", "replace").rstrip("\n")}, ensure_ascii=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text not in known:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(text)
