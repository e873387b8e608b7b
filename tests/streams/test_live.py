"""Live sources: any kind of iterator; on disk before it is handed out; nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from featcl.errors import FeatclError
from featcl.streams import LiveSource, Trajectory, as_iterator, read_trajectories


def some(count: int, start: int = 0) -> list[Trajectory]:
    return [Trajectory(f"t{i}", text=f"text {i} \u2028é", reward=i / 3) for i in range(start, count)]


class Async:
    """An asynchronous source that waits for the loop, counts what was asked of it and is told of its end."""

    def __init__(self, items: list[Any], *, fail: int | None = None) -> None:
        self.items, self.fail, self.asked, self.closed = items, fail, 0, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            for item in self.items:
                self.asked += 1
                if self.asked == self.fail:
                    raise RuntimeError("the connection broke")
                await asyncio.sleep(0)
                yield item
        finally:
            self.closed = True


def test_all_kinds_of_sources_give_the_same() -> None:
    items = some(3)
    made: list[Any] = [items, iter(items), (t for t in items), Async(items)]
    assert [list(as_iterator(source)) for source in made] == [items] * 4
    for wrong in (3, "text", None, {"id": "x"}):
        with pytest.raises(FeatclError, match="a stream is an iterable or an asynchronous iterable"):
            as_iterator(wrong)  # type: ignore[arg-type]


def test_an_asynchronous_source_is_asked_one_by_one_and_closed() -> None:
    source, threads = Async(some(5)), threading.active_count()
    iterator = as_iterator(source)
    assert (next(iterator).id, source.asked, source.closed) == ("t0", 1, False)
    iterator.close()  # type: ignore[attr-defined]
    assert source.closed
    failing = Async(some(5), fail=2)
    with pytest.raises(RuntimeError, match="the connection broke"):
        list(as_iterator(failing))
    assert failing.closed
    assert threading.active_count() == threads, "no thread is left behind"


def test_an_asynchronous_source_inside_a_running_loop() -> None:
    async def notebook() -> list[str]:
        return [t.id for t in as_iterator(Async(some(3)))]

    assert asyncio.run(notebook()) == ["t0", "t1", "t2"]


def test_tasks_of_a_source_go_on_between_items_and_end_with_it() -> None:
    beats: list[int] = []
    beaten = threading.Event()

    async def source() -> AsyncIterator[int]:
        async def beat() -> None:
            while True:
                beats.append(1)
                if len(beats) > 3:
                    beaten.set()
                await asyncio.sleep(0.001)

        task = asyncio.ensure_future(beat())
        yield 1
        yield 2
        assert not task.done()

    iterator = as_iterator(source())
    next(iterator)
    assert beaten.wait(10), "while nothing is asked for"
    assert list(iterator) == [2]


def test_an_unfinished_asynchronous_source_does_not_keep_python_from_ending() -> None:
    program = (
        "from featcl.streams import as_iterator\n"
        "async def source():\n"
        "    yield 1\n"
        "    yield 2\n"
        "left = as_iterator(source())\n"
        "print(next(left), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_each_trajectory_is_on_disk_before_it_is_handed_out(tmp_path: Path) -> None:
    log = tmp_path / "sub" / "live.jsonl"
    with LiveSource(iter(some(4)), log) as live:
        for count, trajectory in enumerate(live, start=1):
            assert [t.id for t in read_trajectories(log)][-1] == trajectory.id
            assert (live.position, live.written) == (count, count)
    assert list(read_trajectories(log)) == some(4) == list(read_trajectories(log, format="live"))


def test_what_was_received_and_not_learned_comes_first(tmp_path: Path) -> None:
    log = tmp_path / "live.jsonl"
    with LiveSource(some(5), log) as live:
        for _ in zip(range(3), live, strict=False):
            pass  # three are handed out, two of them learned from
    with LiveSource(some(8), log, learned=2) as live:
        resumed = list(live)
        assert (live.position, live.written) == (8, 8)
    assert resumed == some(8, start=2), "one again, none twice, then what the source goes on with"
    with LiveSource([], log, learned=8) as live:
        assert list(live) == []
    with pytest.raises(FeatclError, match="holds 8 trajectories, but 9 are said to be learned from"):
        LiveSource([], log, learned=9)


@pytest.mark.parametrize("left", [1, 30, 10_000])
def test_a_torn_last_line_is_cut_back(tmp_path: Path, left: int) -> None:
    log = tmp_path / "live.jsonl"
    with LiveSource(some(3), log) as live:
        list(live)
    whole = log.read_bytes()
    last = len(whole.split(b"\n")[2]) + 1
    log.write_bytes(whole[: -max(1, last - left)])  # so many bytes of the last line are there, at most all but one
    assert [t.id for t in read_trajectories(log)] == ["t0", "t1"], "a reader leaves it out too"
    with LiveSource(some(3), log, learned=1) as live:
        assert [t.id for t in live] == ["t1", "t2"]
    assert log.read_bytes() == whole


def test_damage_before_the_end_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "live.jsonl"
    with LiveSource(some(3), log) as live:
        list(live)
    whole = log.read_text(encoding="utf-8")
    log.write_text(whole.replace("text 1", "text 7"), encoding="utf-8")
    with pytest.raises(FeatclError, match=r"live.jsonl:2: the checksum of this line is wrong.*damaged before its end"):
        LiveSource([], log)
    with pytest.raises(FeatclError, match="checksum"):
        list(read_trajectories(log))
    assert len(list(read_trajectories(log, strict=False))) == 2
    assert log.read_text(encoding="utf-8") == whole.replace("text 1", "text 7"), "nothing was cut"


@pytest.mark.parametrize("changed", ["empty line", "byte order mark", "spaces at the end"])
def test_what_an_editor_adds_costs_no_trajectory(tmp_path: Path, changed: str) -> None:
    """Bytes that are no record count where the end of the good lines is."""
    log = tmp_path / "live.jsonl"
    with LiveSource(some(3), log) as live:
        list(live)
    first, *rest = log.read_bytes().splitlines(keepends=True)
    added = {
        "empty line": b"".join([first, b"\n", *rest]),
        "byte order mark": b"\xef\xbb\xbf" + first + b"".join(rest),
        "spaces at the end": first + b"".join(rest) + b"  ",
    }
    log.write_bytes(added[changed])
    with LiveSource([], log) as live:
        assert [t.id for t in live] == ["t0", "t1", "t2"]
    with LiveSource(some(5), log, learned=2) as live:
        assert [t.id for t in live] == ["t2", "t3", "t4"]
    with LiveSource([], log, learned=1) as live:
        assert [t.id for t in live] == ["t1", "t2", "t3", "t4"]
    assert log.read_bytes().startswith(added[changed])


@pytest.mark.parametrize("text", ['{"id": "a", "text": "b"}', '{"id": "a", "text": "b"}\n', "notes", "notes\n", "[{}]"])
def test_what_is_no_log_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(FeatclError, match=r"mine\.jsonl:1: .*no log of a live stream"):
        LiveSource([], path)
    assert path.read_text() == text
    path.write_bytes(b"\0\0")  # the control: of our own last line, a power cut may leave zeros
    LiveSource([], path).close()
    assert path.read_bytes() == b""


def test_a_zipped_log_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        FeatclError, match=r"live\.jsonl\.gz: a live log is appended to line by line, so it cannot be zipped"
    ):
        LiveSource(some(1), tmp_path / "live.jsonl.gz")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_and_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "live.jsonl"
    for bad, reason in (
        (Trajectory("x", text="y", meta={"a": float("nan")}), "as JSON"),
        (Trajectory("x", text="y", meta={"a": object()}), "as JSON"),
        (Trajectory("x", text="\ud800"), "as JSON"),
        (Trajectory("t0", text="another"), "occurs twice"),
        (Trajectory("x", text="y", meta={1: "a", "1": "b"}), "as JSON .*the key '1' occurs twice"),
        ({"id": "x"}, "exactly one of messages and text"),
    ):
        with LiveSource([*some(1), bad], log) as live, pytest.raises(FeatclError, match=reason):
            list(live)
        assert [t.id for t in read_trajectories(log)] == ["t0"]

    import os

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with LiveSource(some(3), log, learned=1) as live, pytest.raises(FeatclError, match="No space left"):
        list(live)
    monkeypatch.undo()
    with LiveSource(some(3), log, learned=1) as live:
        assert [t.id for t in live] == ["t1", "t2"], "nothing of the failed write is left"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "live.jsonl"
    with LiveSource([], log), pytest.raises(FeatclError, match="another process writes this live log"):
        LiveSource([], log)
    LiveSource([], log).close()


def test_what_is_handed_out_is_what_a_resumed_run_will_read(tmp_path: Path) -> None:
    odd = Trajectory("x", messages=({"role": "user", "content": ("a",)},), meta={1: (2, 3)}, token_ids=(1,))
    with LiveSource([odd], tmp_path / "live.jsonl") as live:
        (found,) = live
    assert found == next(read_trajectories(tmp_path / "live.jsonl"))
    assert found != odd, "the control: JSON has no tuples and no numbers as keys"


def test_asynchronous_records_and_generators(tmp_path: Path) -> None:
    def generator() -> Iterator[dict]:
        yield from (t.to_record() for t in some(2))

    for name, source in (("a", generator()), ("b", Async([t.to_record() for t in some(2)]))):
        with LiveSource(source, tmp_path / f"{name}.jsonl") as live:
            assert list(live) == some(2)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")[0])["trajectory"]["id"] == "t0"
