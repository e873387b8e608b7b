"""Ctrl-C and SIGTERM at safe moments only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptible:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, after a protected block where one is running.

    A second signal within a protected block does not wait for its end; `torn` is then True, and what the block was
    changing must not be saved. Outside the main thread, where Python delivers no signals, nothing is installed.
    """

    def __init__(self) -> None:
        self.torn = False
        self._depth = 0
        self._requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def protected(self) -> Iterator[None]:
        """Within the block a first signal waits for its end."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._requested and not self._depth:
            self._requested = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: Any) -> None:
        if self._depth and not self._requested:
            self._requested = True
            return
        self.torn = self._depth > 0
        raise KeyboardInterrupt
