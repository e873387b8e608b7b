"""Whatever of a config's backends can be opened; what cannot is said in one line, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from featcl.errors import FeatclError
from featcl.tracking.base import Behind, Guarded, Record, RunNames, line_of
from featcl.tracking.tensorboard import open_tensorboard
from featcl.tracking.trackio import open_trackio
from featcl.tracking.wandb import Mode, open_wandb

log = logging.getLogger(__name__)
Backend = Literal["tensorboard", "trackio"]
OPTIONAL: dict[str, Callable[..., Guarded]] = {"tensorboard": open_tensorboard, "trackio": open_trackio}


def open_backends(
    folder: str | Path,
    run: RunNames,
    *,
    wandb: Mode = "offline",
    backends: Sequence[str] = (),
    history: Iterable[Record] = (),
) -> list[Behind | Guarded]:
    """Everything beside `metrics.jsonl` that a run's numbers go to.

    Args:
        folder: The run's folder.
        run: Names and config.
        wandb: As in `open_wandb`.
        backends: Of `tensorboard` and `trackio`.
        history: Records of `metrics.jsonl` up to where a resumed run continues.

    Returns:
        Those that opened.

    Raises:
        FeatclError: If a name is none of those.
    """
    unknown = next((name for name in backends if name not in OPTIONAL), None)
    if unknown is not None:
        raise FeatclError(f"tracking.backends: {unknown!r} is none of {', '.join(OPTIONAL)}")
    records = tuple(history)
    opened: list[Behind | Guarded | None] = [open_wandb(folder, run, mode=wandb, history=records)]
    opened += [_open(name, folder, run, records) for name in dict.fromkeys(backends)]
    return [tracker for tracker in opened if tracker is not None]


def _open(name: str, folder: str | Path, run: RunNames, history: Sequence[Record]) -> Guarded | None:
    try:
        return OPTIONAL[name](folder, run, history=history)
    except ImportError as error:
        log.warning(
            "%s is not installed (%s); the run goes on without it (pip install 'featcl[%s]')", name, error, name
        )
    except Exception as error:  # noqa: BLE001 - see Guarded
        log.warning("%s does not start (%s); the run goes on without it", name, line_of(error))
    return None
