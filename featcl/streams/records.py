"""JSON records of a file, one at a time: lines of JSONL, items of a JSON array, or one whole document.

Memory is bounded by the largest record, whatever the file's size; a record beyond `LARGEST` is an error.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from featcl.errors import FeatclError

LARGEST = 1 << 28  # bytes of one record
BLOCK = 1 << 16
WHITE = " \t\r\n"


@dataclass(frozen=True)
class Raw:
    """One record as it stands in the file.

    Attributes:
        number: Line of a JSONL file, or place of the item in an array, from 1.
        data: Its bytes.
        complete: False for a last line without a line feed: it may be half of one.
        end: Of a line, the byte of the (unzipped) file after it.
    """

    number: int
    data: bytes
    complete: bool = True
    end: int = 0


def raw_records(path: Path) -> Iterator[Raw]:
    """Records of a plain or gzipped file, empty lines left out.

    A file that begins with `[` is a JSON array, unless that line is complete and others follow. A .json or .traj file
    whose first line is no complete JSON value is one document. All else is JSONL, whose lines end at line feeds only:
    other characters that Unicode counts as line breaks occur inside strings.

    Args:
        path: The file.

    Raises:
        FeatclError: If it cannot be read, or a record is too large.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for raw in _records(file, path):  # type: ignore[arg-type]
                number = raw.number
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise FeatclError(f"{path}:{number + 1}: cannot be read ({error})") from error


def parse(data: bytes) -> Any:
    """The JSON value of a record; NaN, infinities, lone surrogates and a key that occurs twice are refused."""
    try:
        record = _DECODER.decode(data.decode("utf-8"))
        if b"\\ud" in data.lower():
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise FeatclError(f"not valid UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise FeatclError(f"malformed JSON ({error.msg} at character {error.pos})") from error
    except (ValueError, RecursionError) as error:
        raise FeatclError(f"malformed JSON ({error})") from error
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is beyond the largest number")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; JSON leaves open which value counts where a key occurs twice, so that none does."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.60} occurs twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_distinct)


def _records(file: IO[bytes], path: Path) -> Iterator[Raw]:
    head = file.read(BLOCK).removeprefix(codecs.BOM_UTF8)
    if _begins_array(head):
        yield from _array_items(file, head, path)
        return
    file.seek(0)
    whole = _line(file, path, 1)
    first = whole.removeprefix(codecs.BOM_UTF8)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if suffixes[-1:] in ([".json"], [".traj"]) and not _is_json(first):
        data = first + file.read(LARGEST)
        if len(data) > LARGEST:
            raise _too_large(path, 1)
        yield Raw(1, data)
    else:
        yield from _lines(file, first, path, start=len(whole) - len(first))


def _lines(file: IO[bytes], first: bytes, path: Path, *, start: int) -> Iterator[Raw]:
    number, line, end = 1, first, start
    while line:
        end += len(line)
        if line.strip():
            yield Raw(number, line, complete=line.endswith(b"\n"), end=end)
        number += 1
        line = _line(file, path, number)


def _line(file: IO[bytes], path: Path, number: int) -> bytes:
    line = file.readline(LARGEST + 1)
    if len(line) > LARGEST:
        raise _too_large(path, number)
    return line


def _array_items(file: IO[bytes], head: bytes, path: Path) -> Iterator[Raw]:
    """Items of a JSON array, each decoded when it is complete; tried again only with twice as much text."""
    reader = codecs.getincrementaldecoder("utf-8")()
    text, number, start, enough, ended = _decoded(reader, head, path, 1).lstrip(WHITE)[1:], 1, 0, 0, False
    while True:
        start = _skip(text, start)
        if text[start : start + 1] == "]":
            if (text[start + 1 :] + file.read(BLOCK).decode("utf-8", "replace")).strip():
                raise FeatclError(f"{path}: something stands after the end of the array of {number - 1} items")
            return
        waiting = len(text) - start
        if waiting >= enough or ended:
            end, reason = _item_end(text, start)
            if end is not None:
                yield Raw(number, text[start:end].encode("utf-8", "surrogatepass"))
                number, start, enough = number + 1, end, 0
                continue
            if ended:
                raise FeatclError(f"{path}: item {number}: malformed JSON ({reason}), or the file was cut short")
            enough = 2 * waiting
        block = file.read(max(BLOCK, enough - waiting))
        ended = not block
        text, start = text[start:] + _decoded(reader, block, path, number), 0
        if len(text) > LARGEST:
            raise _too_large(path, number)


def _item_end(text: str, start: int) -> tuple[int | None, str]:
    """Where the JSON value that begins at `start` ends, or why it does not."""
    try:
        return json.JSONDecoder().raw_decode(text, start)[1], ""
    except json.JSONDecodeError as error:
        return None, error.msg
    except RecursionError as error:
        return None, str(error)


def _begins_array(head: bytes) -> bool:
    """Whether a file that begins like this is an array, and not JSONL whose first line is (wrongly) a list."""
    line, _, rest = head.partition(b"\n")
    return head.lstrip().startswith(b"[") and not (rest.strip() and _is_json(line))


def _skip(text: str, start: int) -> int:
    """The place after white space and the comma between two items."""
    while start < len(text) and text[start] in WHITE + ",":
        start += 1
    return start


def _decoded(reader: codecs.IncrementalDecoder, data: bytes, path: Path, number: int) -> str:
    try:
        return reader.decode(data)
    except UnicodeDecodeError as error:
        raise FeatclError(f"{path}: item {number}: not valid UTF-8 text ({error})") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _too_large(path: Path, number: int) -> FeatclError:
    return FeatclError(f"{path}:{number}: a record of more than {LARGEST >> 20} MB; one episode a line is right")
