"""Weights & Biases: offline by default, never in the way of a run. The only module that imports wandb.

An offline run lies in `<run folder>/wandb/offline-run-*`; `wandb sync <that folder>` uploads it later. A resumed run
has the same id. Offline, its earlier records are written again into a new folder and the older one is renamed
`superseded-…`, so that what is synced is whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from featcl.errors import FeatclError
from featcl.files import digest_json
from featcl.tracking.base import Record, flatten
from featcl.tracking.names import TOKENS_SEEN

log = logging.getLogger(__name__)
Mode = Literal["offline", "online", "disabled"]


@dataclass(frozen=True)
class WandbRun:
    """What a run is called in W&B.

    Attributes:
        project: W&B project.
        study: Group: a question.
        arm: Job type: one config in it.
        seed: Named in the run's title.
        config: The resolved config; its digest is the run's id, so that a resumed run is the same run.
    """

    project: str
    study: str
    arm: str
    seed: int
    config: Record

    @property
    def id(self) -> str:
        """Stable over restarts: from the content of the config alone."""
        return digest_json(dict(self.config))[:16]


class WandbTracker:
    """Sends records to an open W&B run. A failure is said once, and the run goes on without W&B."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._tokens = 0

    def log(self, record: Record, step: int) -> None:
        self._tokens = record.get(TOKENS_SEEN, self._tokens)
        scalars = {name: value for name, value in record.items() if _is_number(value)}
        self._try("log", lambda run: run.log({**scalars, "update": step, TOKENS_SEEN: self._tokens}))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        def send(run: Any) -> None:
            import wandb

            data: list[Any] = [list(row) for row in rows]
            run.log({name: wandb.Table(columns=list(columns), data=data), TOKENS_SEEN: self._tokens})

        self._try("table", send)

    def image(self, name: str, path: str | Path) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path)), TOKENS_SEEN: self._tokens})

        self._try("image", send)

    def finish(self, summary: Record) -> None:
        def send(run: Any) -> None:
            run.summary.update({name: value for name, value in flatten(summary).items() if _is_number(value)})
            run.finish()

        self._try("finish", send)
        self._run = None

    def _try(self, what: str, send: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run must go on; metrics.jsonl has it all
            self._run = None
            log.warning("W&B %s failed (%s); the run goes on without it, metrics.jsonl is whole", what, _line(error))


def open_wandb(
    folder: str | Path, run: WandbRun, *, mode: Mode = "offline", history: Iterable[Record] = ()
) -> WandbTracker | None:
    """Open a W&B run in a run's folder.

    Args:
        folder: The run's folder; W&B writes to `wandb/` in it.
        run: Names and config.
        mode: `offline`, `online` (falls back to offline if W&B cannot be reached), or `disabled`.
        history: Records of `metrics.jsonl` up to where a resumed run continues.

    Returns:
        A tracker, or None if W&B is disabled, not installed, or does not start; the last two are said in one line.

    Raises:
        FeatclError: If the mode is none of the three.
    """
    if mode not in ("offline", "online", "disabled"):
        raise FeatclError(f"tracking.wandb is {mode!r}; it must be offline, online or disabled")
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        log.warning(
            "wandb is not installed; the run goes on without it (pip install wandb, or tracking.wandb=disabled)"
        )
        return None
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return _start(wandb, Path(folder), run, attempt, history)
        except Exception as error:  # noqa: BLE001 - see WandbTracker
            log.warning("W&B does not start %s (%s); metrics.jsonl is whole", attempt, _line(error))
    return None


def _start(wandb: Any, folder: Path, names: WandbRun, mode: Mode, history: Iterable[Record]) -> WandbTracker:
    folder.mkdir(parents=True, exist_ok=True)
    if mode == "offline":
        _supersede(folder / "wandb", names.id)
    run = wandb.init(
        project=names.project,
        id=names.id,
        name=f"{names.arm}-seed-{names.seed}",
        group=names.study,
        job_type=names.arm,
        config=dict(names.config),
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(mode=mode, root_dir=str(folder.resolve()), **_QUIET),
    )
    run.define_metric(TOKENS_SEEN)
    run.define_metric("*", step_metric=TOKENS_SEEN)
    tracker = WandbTracker(run)
    for record in history if mode == "offline" else ():
        tracker.log(record, int(record.get("update", 0)))
    return tracker


# No console noise, no capture of the console or of the source, no background polling: 0.4 s to start, 0.3 ms a record.
_QUIET: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "symlink": False,
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "init_timeout": 20.0,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


def _supersede(folder: Path, run_id: str) -> None:
    for old in sorted(folder.glob(f"offline-run-*-{run_id}")):
        target = old.with_name(old.name.replace("offline-run", "superseded", 1))
        count = 1
        while target.exists():
            count += 1
            target = old.with_name(f"{old.name.replace('offline-run', 'superseded', 1)}.{count}")
        old.rename(target)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
