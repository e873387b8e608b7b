"""Live streams that lose nothing: what arrives is on disk before anything learns from it.

The log is JSONL, one `{"sha256": …, "trajectory": {…}}` a line; `read_trajectories` reads it like any other stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from featcl.errors import FeatclError
from featcl.files import append_bytes, open_append
from featcl.streams.formats import Place, from_live, live_checksum
from featcl.streams.records import Raw, parse, raw_records
from featcl.streams.seen import Seen
from featcl.streams.sources import Source, as_iterator
from featcl.streams.trajectory import Trajectory

LINE_BEGINS = b'{"sha256": "'


class LiveSource:
    """A live stream, written ahead.

    Each trajectory is appended to the log as a line with a checksum, and synced, before it is handed out. Where the
    log exists already, what it holds from `learned` on comes first (it was received and not learned from), then the
    source goes on. A last line that a crash tore is cut back: it was never handed out.

    Iterate over it once. `position` is how many trajectories of the log were handed out: save it with the learned
    state, and give it back as `learned`.

    Args:
        source: Trajectories, or their JSON objects, from whatever `as_iterator` takes. What it yields a second time
            after a restart (the same id and content) is left out.
        path: The log, a .jsonl file that is not zipped.
        learned: How many trajectories of the log were learned from already.

    Raises:
        FeatclError: If the file is no log or a damaged one, is being written by another process, or holds fewer than
            `learned`.
    """

    def __init__(self, source: Source, path: str | Path, *, learned: int = 0) -> None:
        self.path, self.position = Path(path), learned
        self._source = source
        self._log = Log(self.path)
        if not 0 <= learned <= self._log.count:
            self.close()
            raise FeatclError(
                f"{self.path} holds {self._log.count} trajectories, but {learned} are said to be learned from: "
                "it is the log of another stream"
            )

    def __iter__(self) -> Iterator[Trajectory]:
        for trajectory in self._log.read(self.position):
            self.position += 1
            yield trajectory
        for item in as_iterator(self._source):
            written = self._log.append(item if isinstance(item, Trajectory) else Trajectory.from_record(item))
            if written is not None:
                self.position += 1
                yield written

    @property
    def written(self) -> int:
        """How many trajectories the log holds."""
        return self._log.count

    def close(self) -> None:
        """Close the log; its lock is freed."""
        self._log.close()

    def __enter__(self) -> LiveSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Log:
    """The file of a live stream: appended to by one process at a time, and cut back to its good lines on opening.

    Args:
        path: The file.

    Raises:
        FeatclError: If it cannot be written, or is damaged before its last line.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix == ".gz":
            raise FeatclError(
                f"{path}: a live log is appended to line by line, so it cannot be zipped; give a .jsonl file"
            )
        self.path, self.count = path, 0
        self._ids, self._contents = Seen(), Seen()
        try:
            self._file = open_append(path)
        except OSError as error:
            raise self._refused(error) from error
        try:
            _lock(self._file, path)
            self._cut_back()
        except BaseException:
            self.close()
            raise

    def read(self, start: int) -> Iterator[Trajectory]:
        """Trajectories from number `start` on, as many as the log held when the first was asked for."""
        for place, raw in zip(range(self.count), raw_records(self.path), strict=False):
            if place >= start:
                yield from_live(parse(raw.data), Place(self.path, raw.number))

    def append(self, trajectory: Trajectory) -> Trajectory | None:
        """Write and sync.

        Returns:
            The trajectory as the log will give it back, or None if the log has it already.

        Raises:
            FeatclError: If another trajectory has its id, it is not JSON, or the disk refuses; the log is then as it
                was before.
        """
        try:
            data = json.dumps(trajectory.to_record(), ensure_ascii=False, allow_nan=False)
            record = parse(data.encode("utf-8"))
        except (TypeError, ValueError) as error:
            raise FeatclError(f"trajectory {trajectory.id!r} cannot be written as JSON ({error})") from error
        checksum = live_checksum(record)
        if trajectory.id in self._ids:
            if checksum in self._contents:
                return None
            raise FeatclError(f"trajectory id {trajectory.id!r} occurs twice; ids are unique in a stream")
        self._write((json.dumps({"sha256": checksum, "trajectory": record}, ensure_ascii=False) + "\n").encode())
        self._remember(trajectory.id, checksum)
        return Trajectory.from_record(record)

    def close(self) -> None:
        self._file.close()
        self._ids.close()
        self._contents.close()

    def _write(self, data: bytes) -> None:
        try:
            append_bytes(self._file, data, sync=True)
        except OSError as error:
            raise self._refused(error) from error

    def _remember(self, id: str, checksum: str) -> None:
        self._ids.add(id)
        self._contents.add(checksum)
        self.count += 1

    def _cut_back(self) -> None:
        """Count the good lines; drop a last one that is torn. What is no beginning of a line of ours is left alone."""
        good = 0
        bad: tuple[Raw, FeatclError] | None = None
        for raw in raw_records(self.path):
            if bad is not None:
                raise self._damaged(*bad, "the log is damaged before its end")
            try:
                self._check(raw)
                good = raw.end
            except FeatclError as error:
                bad = (raw, error)
        if bad is None:
            return
        if not _torn(bad[0]):
            raise self._damaged(*bad, "that is no log of a live stream, or it was changed after it was written")
        self._file.truncate(good)

    def _damaged(self, raw: Raw, error: FeatclError, what: str) -> FeatclError:
        return FeatclError(f"{self.path}:{raw.number}: {error}; {what}")

    def _check(self, raw: Raw) -> None:
        record: Any = parse(raw.data)
        trajectory = from_live(record, Place(self.path, raw.number))
        if not raw.complete:
            raise FeatclError("the last line has no line feed")
        self._remember(trajectory.id, record["sha256"])

    def _refused(self, error: OSError) -> FeatclError:
        return FeatclError(f"{self.path}: the log of a live stream cannot be written ({error.strerror or error})")


def _lock(file: Any, path: Path) -> None:
    """One writer at a time, where the system has advisory locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise FeatclError(f"{path}: another process writes this live log; one at a time is right") from error


def _torn(raw: Raw) -> bool:
    """Whether a line is the beginning of one of ours, or what a power cut leaves of it: zeros."""
    ours = raw.data.startswith(LINE_BEGINS[: len(raw.data)]) and not raw.complete
    return ours or raw.data.startswith(b"\0")
