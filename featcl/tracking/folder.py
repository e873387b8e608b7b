"""The folder of one run: whose results it holds, its lock, and checkpoints that are whole or absent.

state/current.json          names the checkpoint that counts
state/00000012/             what the run wrote, and `check.json`: the digest of every file, written last
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.files import digest_file, read_state, require_folder, sync_folder, write_json
from featcl.tracking.environment import differences
from featcl.tracking.progress import say

QUARANTINE = "quarantine.jsonl"
# What a run writes; `--overwrite` removes these and nothing else.
FILES = (
    "config.json", "env.json", "metrics.jsonl", "R.json", "cost.json", "summary.json", "report.html", QUARANTINE,
)  # fmt: skip
FOLDERS = ("adapter", "directions", "episodes", "ledger", "memory", "plots", "state", "tables", "tensorboard", "wandb")
CURRENT, CHECK, FIRST = "state/current.json", "check.json", "00000000"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # what a disk says that takes no more


@contextmanager
def stopping_cleanly(path: Path) -> Iterator[None]:
    """Where the disk takes no more, one line says so; the last checkpoint is whole, since it is replaced at once.

    Raises:
        FeatclError: In place of the error of a full or failing disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise FeatclError(
            f"{path}: {error.strerror}, so nothing more can be recorded; the last checkpoint is whole: make room, and "
            "the same command goes on from there"
        ) from error


class RunFolder:
    """A run's folder, locked while it is open.

    Args:
        path: `results/<study>/<arm>/seed-<n>`.
        config: The resolved config as JSON data.
        digest: Its digest: results of another digest are not touched.
        overwrite: Start anew, whatever lies here.

    Raises:
        FeatclError: If the folder holds the results of another config, is not a run's, or is in use.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, digest: str, overwrite: bool = False) -> None:
        self.path = path
        self.config = dict(config)
        self.digest = digest
        self.overwrite = overwrite
        self._check()
        self._lock: Any = None
        self._aside = path / f".{QUARANTINE}.replaced"  # a name that is taken away if we are killed

    def __enter__(self) -> RunFolder:
        self._lock = None
        while self._lock is None:
            self._lock = _locked(self.path)
        for torn in _torn_files(self.path):
            torn.unlink()
        if self.overwrite and (self.path / QUARANTINE).is_file():
            os.replace(self.path / QUARANTINE, self._aside)  # the stream is read, and quarantined anew, before `start`
        return self

    def __exit__(self, *_: object) -> None:
        if self._aside.is_file():  # it was not started: all stays as it was
            os.replace(self._aside, self.path / QUARANTINE)
        (self.path / ".lock").unlink(missing_ok=True)
        self._lock.close()
        with suppress(OSError):  # a run that never started leaves nothing behind
            for folder in (self.path, *self.path.parents[:2]):
                folder.rmdir()

    @property
    def finished(self) -> bool:
        """Whether the results are complete and are to be kept."""
        return not self.overwrite and (self.path / "summary.json").is_file()

    @property
    def state(self) -> Path | None:
        """The last checkpoint, or None where the run starts from nothing.

        Raises:
            FeatclError: If it is not as it was saved, or there is none where there was one.
        """
        current = self.path / CURRENT
        if self.overwrite:
            return None
        if not current.is_file():
            return self._recovered()
        found = current.parent / str(read_state(current, "folder")["folder"])
        damaged = _damaged(found)
        if damaged is not None:
            raise FeatclError(
                f"{damaged}: damaged (not as it was saved); restore the file, or start anew with --overwrite"
            )
        return found

    def _recovered(self) -> Path | None:
        """The newest whole checkpoint where none is named; None where the first one was never finished.

        Raises:
            FeatclError: If there must have been one.
        """
        state = self.path / CURRENT.split("/")[0]
        if not (self.path / "config.json").is_file() or not state.is_dir():  # it was being cleared, or never saved
            return None
        kept = _checkpoints(state)
        whole = next((found for found in kept if _damaged(found) is None), None)
        if whole is not None:
            say(f"{self.path / CURRENT} is missing; the newest whole checkpoint is {whole.name}")
            return whole
        if [found.name for found in kept] == [FIRST] and not (kept[0] / CHECK).exists():
            return None
        raise FeatclError(
            f"{self.path / CURRENT} is missing, and no whole checkpoint lies beside it; restore the folder, or start "
            "anew with --overwrite"
        )

    def start(self, environment: Mapping[str, Any]) -> None:
        """Take over the folder for a run that starts: clear it, and record config and environment.

        The checkpoint goes first: whatever kills the process on the way, it is never continued with another config.
        """
        (self.path / CURRENT).unlink(missing_ok=True)
        self._aside.unlink(missing_ok=True)
        for name in (name for name in FILES if name != QUARANTINE):
            (self.path / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.overwrite = False
        write_json(self.path / "config.json", {**self.config, "digest": self.digest})
        write_json(self.path / "env.json", environment)

    def resume(self, environment: Mapping[str, Any], *, update: int) -> list[str]:
        """Take over the folder for a run that goes on, and add to env.json that it does.

        Args:
            environment: As for `start`, of this process.
            update: How many updates the checkpoint has.

        Returns:
            What decides numbers to the last bit and is not as it was at the start.

        Raises:
            FeatclError: If the model, the stream or the chosen features are not those of the checkpoint.
        """
        before = self._environment()
        for key in (key for key in environment if key.endswith("_digest")):
            if key in before and before[key] != environment[key]:
                raise FeatclError(
                    f"{self.path}: the {key.removesuffix('_digest')} is not the one that this run was interrupted "
                    "with; restore it, or start anew with --overwrite"
                )
        differs = differences(before, environment)
        resumed = [*before.get("resumed", ()), {"update": update, "differs": differs}]
        write_json(self.path / "env.json", {**(before or environment), "resumed": resumed})
        return differs

    def _environment(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "env.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def save_state(self, write: Callable[[Path], None]) -> None:
        """Keep what `write` puts into the folder it is given; until that is whole, the checkpoint before it stays."""
        state = self.path / CURRENT.split("/")[0]
        last = max((int(found.name) for found in _checkpoints(state)), default=-1)
        target = state / f"{last + 1:08d}"
        target.mkdir(parents=True)
        write(target)
        write_json(target / CHECK, _digests(target))
        write_json(self.path / CURRENT, {"folder": target.name})
        sync_folder(state)  # before the one it replaces goes
        for old in state.iterdir():
            if old.is_dir() and old != target:
                shutil.rmtree(old, ignore_errors=True)

    def _check(self) -> None:
        if not self.path.exists():
            require_folder(self.path)
            return
        if not self.path.is_dir():
            raise FeatclError(f"{self.path} is a file; a run needs a folder there")
        known = self.path / "config.json"
        if not known.is_file():
            ours = (*FILES, *FOLDERS, ".lock")
            torn = {path.name for path in _torn_files(self.path)}
            odd = sorted(p.name for p in self.path.iterdir() if p.name not in ours and p.name not in torn)
            if odd:
                raise FeatclError(f"{self.path} holds {odd[0]!r} and no run; choose another output, study or arm")
            return
        try:
            there = json.loads(known.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FeatclError(f"{known}: not JSON ({error}); move the folder away, or use --overwrite") from None
        if there.get("digest") != self.digest and not self.overwrite:
            raise FeatclError(
                f"{self.path} holds the results of another config ({_differences(there, self.config)}); "
                "use --overwrite to replace them, or give this run another arm=NAME"
            )


def _locked(path: Path) -> Any:
    """The lock of a folder, which is made; None where who had it took its file away meanwhile: there may be a new one.

    Raises:
        FeatclError: If another process has it.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = open(path / ".lock", "w")  # noqa: SIM115 (as long as the run)
    except FileNotFoundError:
        return None
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock.fileno()).st_nlink:
            return lock
    except ImportError:  # not a POSIX system: no lock
        return lock
    except OSError:
        lock.close()
        raise FeatclError(f"{path}: another process is running this; wait for it, or use another seed") from None
    lock.close()
    return None


def _checkpoints(state: Path) -> list[Path]:
    """Checkpoints, whole or not, newest first."""
    found = state.iterdir() if state.is_dir() else ()
    return sorted((path for path in found if path.is_dir() and path.name.isdecimal()), key=lambda p: -int(p.name))


def _digests(checkpoint: Path) -> dict[str, str]:
    """The digest of every file of a checkpoint but `check.json`, by its path in it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / CHECK)
    return {path.relative_to(checkpoint).as_posix(): digest_file(path) for path in files}


def _damaged(checkpoint: Path) -> Path | None:
    """A file of a checkpoint that is missing or not as it was saved, or None where it is whole."""
    try:
        saved = read_state(checkpoint / CHECK)
    except FeatclError:
        return checkpoint / CHECK
    found = _digests(checkpoint)
    return next((checkpoint / name for name in saved if found.get(name) != saved[name]), None)


def _torn_files(path: Path) -> list[Path]:
    """What a killed process left of atomic writes to a run's files: `.name.` and eight random characters."""
    own = [file for name in FILES for file in path.glob(f".{name}.*")]
    within = [file for name in FOLDERS if name not in ("tensorboard", "wandb") for file in (path / name).rglob(".*")]
    return [file for file in (*own, *within) if re.fullmatch(r"\..+\.[a-z0-9_]{8}", file.name) and file.is_file()]


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], limit: int = 3) -> str:
    """The first keys in which two configs differ, as `key was …, is …`."""
    old, new = _leaves({key: value for key, value in there.items() if key != "digest"}), _leaves(here)
    keys = [key for key in {**new, **old} if key != "output" and old.get(key, "null") != new.get(key, "null")]
    shown = [f"{key} was {old.get(key, 'null')}, is {new.get(key, 'null')}" for key in keys[:limit]]
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(shown) + more if keys else "written by another version"


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> JSON of its value; an entry of a list is a key too."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)) and value:
        parts = enumerate(value)
    else:
        return {prefix: json.dumps(value)}
    return {key: leaf for name, part in parts for key, leaf in _leaves(part, f"{prefix}.{name}".lstrip(".")).items()}
