"""Atomic writes and content digests: a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` with `data` atomically: temporary file beside it, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def open_append(path: str | Path) -> Any:
    """Open a binary file to append to; a new one is made with its folder, and its name is on the disk at once.

    It is unbuffered: what is written is the operating system's, which a killed process survives.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as it is written)
    if new:
        sync_folder(path.parent)
    return file


def append_bytes(file: Any, data: bytes, *, sync: bool = False) -> None:
    """Append to an unbuffered binary file: all of `data`, or, where that fails on the way, an error and none.

    Args:
        file: From `open_append`.
        data: What is added at its end.
        sync: Wait until it is on the disk.
    """
    size, done = file.seek(0, os.SEEK_END), 0
    try:
        while done < len(data):
            done += file.write(data[done:])
        if sync:
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            file.truncate(size)
        raise


def sync_folder(path: str | Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can say that of a folder."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` with UTF-8 `text` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` with `value` as readable JSON; keys sorted, NaN and infinities written as null."""
    write_text(path, json.dumps(_finite(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_state(path: str | Path, *keys: str) -> dict[str, Any]:
    """A JSON object of a checkpoint, which has at least these keys.

    Raises:
        FeatclError: If the file is missing or damaged.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FeatclError(f"{path}: damaged ({error}); restore the file, or start anew with --overwrite") from error
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing or not isinstance(value, dict):
        what = f"without {missing[0]!r}" if missing else "no JSON object"
        raise FeatclError(f"{path}: damaged ({what}); restore the file, or start anew with --overwrite")
    return value


def require_folder(path: str | Path) -> None:
    """Before long work: `path` is a folder that can be written to, or can become one; nothing is left behind.

    Raises:
        FeatclError: If a file is in the way, or nothing can be written there.
    """
    path = Path(path).absolute()
    try:
        nearest = next(place for place in (path, *path.parents) if place.exists())
        if not nearest.is_dir():
            raise FeatclError(f"{nearest} is a file; a folder is needed there, choose another output")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise FeatclError(f"{path} cannot be written: {error.strerror or error}; choose another output") from None


def require_file(path: str | Path) -> None:
    """Before long work: `path` can become a file; a trailing slash, or a folder there, is an error.

    Raises:
        FeatclError: If it names a folder, or its folder cannot be written to.
    """
    if str(path).endswith("/") or Path(path).is_dir():
        raise FeatclError(f"{path} is a folder; name a file to write, such as {Path(path) / 'features.html'}")
    require_folder(Path(path).parent)


def digest_bytes(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: independent of key order and white space."""
    text = json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return digest_bytes(text.encode("utf-8"))


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
