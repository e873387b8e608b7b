"""A worker of a sweep: one process that imports once, takes run after run from the shared list, and then ends.

Features that it has chosen, and the base model's scores, are kept for the runs that would choose and score the same.

It ends early, with the state of its run saved, when the sweep is stopped (Ctrl-C) or was killed, and when the machine
is taken away (SIGTERM, or submitit's signal before a time limit): then submitit calls `checkpoint` and has it queued
again, and it goes on with what is left.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcl.studies.sharing import Ended, Run, SharedRuns
from featcl.tracking.progress import say

if TYPE_CHECKING:
    from featcl.build.reuse import Reuse

POLL = 0.5  # seconds


@dataclass(frozen=True)
class Worker:
    """What submitit runs.

    Attributes:
        folder: Of the sweep.
        number: Of the worker.
        threads: That a run computes with, where its config does not say; None: as many as there are cores.
        device: What CUDA_VISIBLE_DEVICES is set to; None: as the scheduler set it.
        local: It belongs to a process on this machine: it ends with that, and waits for runs that others still have,
            which may die. On a cluster nobody is waited for, and the job is queued again.
        overwrite: Replace the results of another config.
    """

    folder: Path
    number: int
    threads: int | None
    device: str | None
    local: bool
    overwrite: bool = False

    def __call__(self) -> str:
        """Work until nothing is left; says why it ended."""
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device
        shared = SharedRuns(self.folder)
        with _leaving(shared, local=self.local) as leaving:
            try:
                self._work(shared)
                return "nothing left"
            except KeyboardInterrupt:
                if leaving.stopped:
                    return "stopped"
        leaving.queue_again()
        raise KeyboardInterrupt

    def checkpoint(self) -> Any:
        """What submitit queues instead: the same again, since the state is on disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _work(self, shared: SharedRuns) -> None:
        from featcl.build.reuse import Reuse

        reuse = Reuse()
        left = list(shared.runs)
        while left:
            busy = []
            for run in left:
                if shared.done(run):
                    continue
                with shared.claimed(run) as mine:
                    if not mine:
                        busy.append(run)
                    elif not shared.done(run) and shared.begin(run):
                        self._execute(shared, run, reuse)
            left = busy if self.local else []
            if left:
                time.sleep(POLL)

    def _execute(self, shared: SharedRuns, run: Run, reuse: Reuse) -> None:
        """One run, whose failure is its own."""
        import torch

        from featcl.run import run as run_config

        began = time.time()
        torch.set_num_threads(self.threads or cores())  # a config may have set it for its run
        say(f"{run.name} begins")
        error = None
        try:
            run_config(run.config, overwrite=self.overwrite and run.foreign, reuse=reuse)
        except KeyboardInterrupt:
            shared.give_back(run)
            raise
        except Exception as failed:  # noqa: BLE001 - whatever it is, it is reported, and the other runs go on
            error = _describe(failed)
            say(f"{run.name} failed: {error}")
        shared.end(run, Ended(error, self.number, began, time.time()))
        gc.collect()  # the model, before the next one is loaded


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(error: Exception) -> str:
    """One line; for what is no bad input, the traceback goes to the worker's log."""
    from featcl.config import ConfigError
    from featcl.errors import FeatclError

    text = " ".join(str(error).split())
    if isinstance(error, FeatclError | ConfigError):
        return text
    import traceback

    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}"


class _Leaving:
    """Turns every reason to leave into one SIGINT, which a run heeds where nothing is torn."""

    def __init__(self, shared: SharedRuns, *, local: bool) -> None:
        self.shared, self.local = shared, local
        self.stopped = False
        self._asked = False
        self._over = threading.Event()
        self._queue_again = signal.Signals[f"SIG{_preemption()}"]
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Signals, and a look at the sweep every half second."""
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: self._taken,
                    self._queue_again: self._taken}  # fmt: skip
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        threading.Thread(target=self._watch, daemon=True).start()

    def remove(self) -> None:
        """As it was before."""
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def queue_again(self) -> None:
        """Have submitit's own handler checkpoint the job and queue it again."""
        if callable(self._before.get(self._queue_again)):
            signal.raise_signal(self._queue_again)

    def _taken(self, number: int, frame: Any) -> None:
        self._ask()

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            os.kill(os.getpid(), signal.SIGINT)

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            if self.shared.stopped or (self.local and self.shared.abandoned):
                self.stopped = True
                self._ask()
                return


@contextmanager
def _leaving(shared: SharedRuns, *, local: bool) -> Iterator[_Leaving]:
    if local:  # Ctrl-C on a terminal reaches the sweep, which tells us once
        with suppress(OSError):
            os.setsid()
    leaving = _Leaving(shared, local=local)
    leaving.install()
    try:
        yield leaving
    finally:
        leaving.remove()


def _preemption() -> str:
    from submitit import JobEnvironment

    return JobEnvironment.USR_SIG
