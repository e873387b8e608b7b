"""A progress bar with the time left, on a terminal only: nothing under CI, in logs and in pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, *, done: int = 0) -> Iterator[Callable[[str | None], None]]:
    """A bar on standard error.

    Args:
        total: Number of steps.
        done: Steps that are done already.

    Returns:
        A function that advances the bar by one step; a name given to it is shown.
    """
    if not on_terminal():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("learning", total=total, completed=done)

        def advance(name: str | None) -> None:
            if name:
                bar.update(task, description=name)
            bar.advance(task)

        yield advance


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A line that moves while something of unknown length is under way."""
    if not on_terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def say(text: str) -> None:
    """One line on standard error, where it is in the way of no result."""
    print(f"featcl: {text}", file=sys.stderr)


def on_terminal() -> bool:
    """Whether somebody is watching."""
    return sys.stderr.isatty() and not os.environ.get("CI")
