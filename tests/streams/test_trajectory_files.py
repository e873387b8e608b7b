"""Streams on disk: what is read, what is refused and where, what is quarantined."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from featcl.errors import FeatclError
from featcl.streams import Trajectory, read_trajectories

GOOD = {"id": "a", "source": "s", "task": "t", "messages": [{"role": "user", "content": "hi"}], "reward": 1}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*rows: object, name: str = "stream.jsonl") -> Path:
        data = b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return lines


def test_plain_and_gzipped_streams_hold_the_same(write: Write) -> None:
    rows = [GOOD, {"id": "b", "text": "raw"}]
    plain = list(read_trajectories(write(*rows)))
    assert plain == list(read_trajectories(write(*rows, name="stream.jsonl.gz")))
    assert [t.id for t in plain] == ["a", "b"]
    assert (plain[0].reward, plain[1].text, plain[1].source) == (1, "raw", "unknown")
    assert [t.to_record() for t in plain] == [GOOD, {"id": "b", "text": "raw", "source": "unknown", "task": "default"}]


def test_only_line_feeds_end_a_line(write: Write) -> None:
    text = "a\u2028b\x85c\x0bd\re\x1cf"
    row = json.dumps({"id": "a", "text": text}, ensure_ascii=False).encode()
    assert b"\xe2\x80\xa8" in row
    found = list(read_trajectories(write(row, b"", b"  ", {"id": "b", "text": "x"})))
    assert [t.text for t in found] == [text, "x"]


BAD = [
    (b"{", "malformed JSON"),
    (b"[1]", "JSON object"),
    (b'{"id": "z", "text": "\xff"}', "UTF-8"),
    (b'{"id": "z", "text": "\\ud800"}', "UTF-8"),
    (b'{"id": "z", "text": "x", "reward": NaN}', "not a JSON number"),
    (b'{"id": "z", "text": "x", "reward": 1e999}', "beyond the largest number"),
    (b'{"id": "z", "text": "x", "text": "y"}', "the key 'text' occurs twice in one object"),
    (b'{"id": "z", "text": "x", "meta": {"a": {"b": 1, "b": 1}}}', "the key 'b' occurs twice in one object"),
    (b"[" * 100_000, "malformed JSON"),
    ({"text": "x"}, "no id"),
    ({"id": "z", "text": "x", "mesages": []}, "did you mean 'messages'"),
    ({"id": "z"}, "exactly one of messages and text"),
    ({"id": "z", "text": "x", "messages": GOOD["messages"]}, "exactly one"),
    ({"id": "z", "messages": "hello"}, "must be a list"),
    ({"id": "z", "messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
    ({"id": "z", "messages": [{"role": "user"}]}, "neither content nor tool_calls"),
    ({"id": "z", "messages": [{"role": "user", "content": 3}]}, "text or a list"),
    ({"id": 3, "text": "x"}, "id must be"),
    ({"id": "z", "text": "x", "token_ids": [1.5]}, "list of ints"),
    ({"id": "z", "text": "x", "token_ids": [-1]}, "list of ints from 0"),
    ({"id": "z", "text": "x", "token_ids": []}, "with at least one"),
    ({"id": "z", "text": "x", "token_ids": [1, 2], "token_mask": [1]}, "token_mask has 1 entries for 2 token_ids"),
    ({"id": "z", "text": "x", "token_ids": [1], "token_mask": [2]}, "list of true and false"),
    ({"id": "z", "text": "x", "token_ids": [1], "token_mask": [False]}, "all false"),
    ({"id": "z", "text": "x", "token_ids": [1], "logprobs": [-1, -2]}, "logprobs has 2 entries for 1 token_ids"),
    ({"id": "z", "text": "x", "logprobs": [-1]}, "logprobs has 1 entries for 0 token_ids"),
    ({"id": "z", "text": "x", "adapter_version": 1.5}, "adapter_version must be a number or a name"),
    ({"id": "z", "text": "x", "tools": [{"type": "function"}]}, "tools[0] must be an object with the tool's name"),
    ({"id": "z", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text parts"),
    ({"id": "z", "messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}, "only assistant"),
    ({"id": "z", "messages": [{"role": "assistant", "tool_calls": {"name": "f"}}]}, "tool_calls must be a list"),
    ({"id": "z", "messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "function's name"),
    ({"id": "z", "messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}]}, "or its JSON"),
    ({"id": "z", "messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "weight must be 0"),
    ({"id": "z", "messages": [{"role": "tool", "content": "x", "tool_call_id": 3}]}, "tool_call_id must be a string"),
    ({"id": "z", "text": "x", "meta": 3}, "meta must be"),
    (GOOD, "occurs twice"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_line_is_named_or_quarantined(write: Write, tmp_path: Path, row: object, reason: str) -> None:
    path, last = write(GOOD, row, {"id": "end", "text": "x"}), tmp_path / "out" / "quarantine.jsonl"
    with pytest.raises(FeatclError, match=re.escape(reason)) as error:
        list(read_trajectories(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)
    for _ in range(2):  # a second reading adds nothing
        assert [t.id for t in read_trajectories(path, strict=False, quarantine=last)] == ["a", "end"]
    (entry,) = [json.loads(line) for line in last.read_text().split("\n") if line]
    assert (entry["file"], entry["line"]) == (str(path), 2)
    assert reason in entry["reason"]


def test_one_key_in_two_objects_is_no_repetition(write: Write) -> None:
    rows = [b'{"id": "a", "text": "x", "meta": {"id": 1, "text": [{"id": 2}, {"id": 2}]}}']
    assert [t.id for t in read_trajectories(write(*rows))] == ["a"]
    twice = b'[{"id": "a", "text": "x"}, {"id": "b", "text": "x", "text": "y"}]'
    with pytest.raises(FeatclError, match=r"stream\.json:2: .*the key 'text' occurs twice"):
        list(read_trajectories(write(twice, name="stream.json")))


def test_a_torn_line_of_the_quarantine_is_taken_off(write: Write, tmp_path: Path) -> None:
    path, quarantine = write(GOOD, b"{", b"[1]"), tmp_path / "quarantine.jsonl"
    list(read_trajectories(path, strict=False, quarantine=quarantine))
    whole = quarantine.read_text()
    quarantine.write_text(whole[:-9])
    list(read_trajectories(path, strict=False, quarantine=quarantine))
    assert quarantine.read_text() == whole


def test_an_empty_missing_or_damaged_stream(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match="no such file"):
        read_trajectories(tmp_path / "absent.jsonl")
    with pytest.raises(FeatclError, match="empty stream"):
        list(read_trajectories(write(b"")))
    with pytest.raises(FeatclError, match="empty stream"):
        list(read_trajectories(write(b"{"), strict=False))
    with pytest.raises(FeatclError, match=r":1: cannot be read"):
        list(read_trajectories(write(GOOD).rename(tmp_path / "not.jsonl.gz")))
    cut = write(*[{"id": str(i), "text": "x" * 99} for i in range(99)], name="cut.jsonl.gz")
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(FeatclError, match="cannot be read"):
        list(read_trajectories(cut))


def test_reading_is_lazy(write: Write) -> None:
    stream = read_trajectories(write(GOOD, b"{"))
    assert next(stream).id == "a"
    with pytest.raises(FeatclError, match=":2:"):
        next(stream)


def test_a_trajectory_from_python_is_checked_too() -> None:
    with pytest.raises(FeatclError, match="reward must be a finite number"):
        Trajectory("x", text="y", reward=float("nan"))
    kept = Trajectory("x", messages=[{"role": "user", "content": "hi"}], token_ids=[1, 2], logprobs=[0, -1.5])  # type: ignore[arg-type]
    assert (kept.messages, kept.token_ids, kept.logprobs) == (({"role": "user", "content": "hi"},), (1, 2), (0.0, -1.5))


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("reflexion_alfworld_early.jsonl", 158),
        ("reflexion_hotpotqa_early.jsonl.gz", 1272),
        ("swe_agent.jsonl", 22),
        ("tau_bench_airline_trials_0_1.jsonl.gz", 100),
    ],
)
def test_real_streams_are_read_whole(real: Path, file: str, count: int) -> None:
    trajectories = list(read_trajectories(real / "trajectories" / file))
    assert len(trajectories) == count
    assert all(t.messages and t.source for t in trajectories)
