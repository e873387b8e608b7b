"""Trackio: a local data base of runs with a dashboard (`trackio show`). An optional backend, and a local one only.

Runs lie where Trackio keeps them: `TRACKIO_DIR`, or a folder of the Hugging Face cache. The step is tokens seen.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from featcl.tracking.base import Guarded, Record, RunNames, cells, flatten, scalars
from featcl.tracking.names import TOKENS_SEEN


class TrackioTracker:
    """Sends records to an open Trackio run. It raises what Trackio raises: `Guarded` keeps that from the run.

    Args:
        run: From `trackio.init`.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._tokens = 0

    def log(self, record: Record, step: int) -> None:
        self._tokens = int(record.get(TOKENS_SEEN, self._tokens))
        self._run.log({**scalars(record), "update": step}, step=self._tokens)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        trackio = import_module("trackio")
        self._run.log({name: trackio.Table(columns=list(columns), data=cells(rows))}, step=self._tokens)

    def image(self, name: str, path: str | Path) -> None:
        trackio = import_module("trackio")
        self._run.log({name: trackio.Image(str(path))}, step=self._tokens)

    def finish(self, summary: Record) -> None:
        if summary:
            numbers = {f"summary/{name}": value for name, value in scalars(flatten(summary)).items()}
            self._run.log(numbers, step=self._tokens)
        trackio = import_module("trackio")
        with _unsaid():
            trackio.finish()  # not the run's own, which Trackio would finish again, aloud, when the process ends


def open_trackio(folder: str | Path, run: RunNames, *, history: Iterable[Record] = ()) -> Guarded:
    """Open a Trackio run on this machine.

    Args:
        folder: The run's folder; Trackio keeps its own elsewhere.
        run: Names and config. The run's name holds its id, so that a resumed run is the same run.
        history: Records of a resumed run so far: where there are some, the run is continued, not written again.

    Raises:
        ImportError: If the package `trackio` is not installed.
    """
    trackio = import_module("trackio")  # an extra, and this file's own name
    options = {"resume": "allow" if tuple(history) else "never", "auto_log_gpu": False, "auto_log_cpu": False}
    with _unsaid():
        opened = trackio.init(
            project=run.project,
            name=f"{run.title}-{run.id[:6]}",
            group=run.study,
            config={**run.config, "job_type": run.arm, "tags": list(run.tags)},
            embed=False,
            **options,
        )
    return Guarded(TrackioTracker(opened), "Trackio")


def _unsaid() -> contextlib.AbstractContextManager[Any]:
    """Trackio prints what it does; standard output is for results."""
    return contextlib.redirect_stdout(io.StringIO())
