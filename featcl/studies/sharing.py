"""A list of runs that several processes work through: who has which, and what became of it, is on disk.

<output>/<study>/.sweep/
  claims/<arm>.seed-<n>      locked while a process has that run; a process that dies lets go of it
  <when>-<pid>/              one sweep
    runs.json                the resolved configs, in order
    alive                    locked as long as the sweep lives
    stop                     is there when its workers are to save their state and end
    begun/, ended/           per run: workers that began it and did not come back; what became of it
    submitit/                logs
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.files import write_json

DEATHS = 2  # so many workers may die of a run before no other takes it


@dataclass(frozen=True)
class Ended:
    """What became of a run in this sweep.

    Attributes:
        error: Why it failed, in one line; None where it finished.
        worker: Number of the worker that had it.
        began, ended: When, in seconds since 1970.
    """

    error: str | None
    worker: int
    began: float
    ended: float


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    config: RunConfig

    @property
    def name(self) -> str:
        """`<arm>.seed-<n>`, unique in a study."""
        return f"{self.config.arm}.seed-{self.config.seed}"

    @property
    def finished(self) -> bool:
        """Whether the results of this very config are complete."""
        return self._digest("summary.json", "config_digest") == self.config.digest

    @property
    def foreign(self) -> bool:
        """Whether its folder holds the results of another config."""
        found = self._digest("config.json", "digest")
        return found is not None and found != self.config.digest

    def _digest(self, name: str, key: str) -> str | None:
        try:
            return json.loads((self.config.folder / name).read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError):
            return None


class SharedRuns:
    """The list, as every process sees it.

    Args:
        folder: Of one sweep, made by `SharedRuns.create`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.claims = self.folder.parent / "claims"
        found = json.loads((self.folder / "runs.json").read_text(encoding="utf-8"))
        self.runs = tuple(Run(RunConfig.from_dict(config)) for config in found)

    @classmethod
    def create(cls, place: Path, runs: Sequence[Run]) -> SharedRuns:
        """A new list in `<place>/.sweep/`."""
        folder = place / ".sweep" / f"{time.strftime('%Y-%m-%dT%H-%M-%S')}-{os.getpid()}"
        for name in ("begun", "ended", "submitit"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder.parent / "claims").mkdir(exist_ok=True)
        write_json(folder / "runs.json", [run.config.to_dict() for run in runs])
        return cls(folder)

    # --- runs

    @contextmanager
    def claimed(self, run: Run) -> Iterator[bool]:
        """Whether the run is ours within the block; another process that has it keeps it."""
        with _lock(self.claims / run.name) as mine:
            yield mine

    def begin(self, run: Run) -> bool:
        """Note that a worker has begun; False, with the run as failed, where too many have died of it."""
        file = self.folder / "begun" / run.name
        deaths = len(file.read_bytes().splitlines()) if file.exists() else 0
        if deaths >= DEATHS:
            died = f"{deaths} workers died while they had it; was there enough memory? Their logs: {self.logs}"
            now = time.time()
            self.end(run, Ended(died, worker=-1, began=now, ended=now))
            return False
        with open(file, "ab") as handle:
            handle.write(f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        return True

    def give_back(self, run: Run) -> None:
        """A worker that is to leave has saved the state: it did not die."""
        (self.folder / "begun" / run.name).unlink(missing_ok=True)

    def end(self, run: Run, what: Ended) -> None:
        """Note what became of a run."""
        write_json(self.folder / "ended" / f"{run.name}.json", asdict(what))
        self.give_back(run)

    def ended(self, run: Run) -> Ended | None:
        """What became of it in this sweep, if it has ended."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "ended" / f"{run.name}.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        return Ended(**found)

    def done(self, run: Run) -> bool:
        """Whether there is nothing left to do: it failed in this sweep, or is finished, whoever did it."""
        return self.ended(run) is not None or run.finished

    def running_since(self, run: Run) -> float | None:
        """When a worker of this sweep began it; None where none has."""
        with suppress(FileNotFoundError):
            return (self.folder / "begun" / run.name).stat().st_mtime
        return None

    # --- the sweep

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Within the block local workers know that somebody waits for them."""
        with _lock(self.folder / "alive"):
            yield

    @property
    def abandoned(self) -> bool:
        """Whether the process that started the sweep is gone."""
        try:
            with _lock(self.folder / "alive") as free:
                return free
        except OSError:  # the folder was removed
            return True

    def stop(self) -> None:
        """Tell all workers to save their state and end."""
        (self.folder / "stop").touch()

    @property
    def stopped(self) -> bool:
        return (self.folder / "stop").exists()

    @property
    def logs(self) -> Path:
        """What workers print."""
        return self.folder / "submitit"


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether nobody had the lock of a file, which is then ours within the block, and is let go of when we die.

    Raises:
        FeatclError: Where the file system has no locks.
    """
    import fcntl

    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise FeatclError(f"{path}: this file system has no locks, by which workers share runs") from error
            yield False
            return
        yield True
