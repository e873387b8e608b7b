"""Atomic writes and digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from featcl import files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "x.json"
    files.write_json(path, {"a": 1})

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_json_is_sorted_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"b": [float("nan"), float("inf"), 0.5], "a": "ä"})
    assert path.read_text() == '{\n  "a": "ä",\n  "b": [\n    null,\n    null,\n    0.5\n  ]\n}\n'


def test_digests(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_bytes(path, b"abc")
    assert files.digest_file(path) == files.digest_bytes(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert files.digest_json({"a": 1, "b": 2}) == files.digest_json({"b": 2, "a": 1})
    assert files.digest_json({"a": 1}) != files.digest_json({"a": 2})


def test_what_is_appended_is_there_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "log"
    with files.open_append(path) as file:
        files.append_bytes(file, b"one\n", sync=True)
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

            def failing(_: int, error: BaseException = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", failing)
                with pytest.raises(type(error)):
                    files.append_bytes(file, b"two\n", sync=True)
            assert path.read_bytes() == b"one\n"
        files.append_bytes(file, b"three\n")
    with files.open_append(path) as file:
        files.append_bytes(file, b"four\n")
    assert path.read_bytes() == b"one\nthree\nfour\n"
