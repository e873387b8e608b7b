"""Weights & Biases: offline by default, never in the way of a run. The only module that imports wandb.

An offline run lies in `<run folder>/wandb/offline-run-*`; `wandb sync <that folder>` uploads it later. A resumed run
has the same id. Offline, its earlier records are written again into a new folder and the older one is renamed
`superseded-…`, so that what is synced is whole.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from featcl.errors import FeatclError
from featcl.tracking.base import Behind, Guarded, Record, RunNames, cells, flatten, line_of, scalars
from featcl.tracking.names import TOKENS_SEEN

log = logging.getLogger(__name__)
Mode = Literal["offline", "online", "disabled"]
ARTIFACTS = {"adapter": "model", "directions": "directions"}
"""Folder of a run -> type of the artifact that it becomes at the end."""
FINISH_SECONDS = 60  # that a finished run waits for its upload


class WandbTracker:
    """Sends records to an open W&B run. It raises what W&B raises: `Guarded` keeps that from the run.

    Args:
        run: From `wandb.init`.
        folder: The run's folder, whose adapter and directions become artifacts; None for none.
    """

    def __init__(self, run: Any, folder: str | Path | None = None) -> None:
        self._run = run
        self._folder = None if folder is None else Path(folder)
        self._tokens = 0

    def log(self, record: Record, step: int) -> None:
        self._tokens = record.get(TOKENS_SEEN, self._tokens)
        self._run.log({**scalars(record), "update": step, TOKENS_SEEN: self._tokens})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        data: list[Any] = cells(rows)
        self._run.log({name: wandb.Table(columns=list(columns), data=data), TOKENS_SEEN: self._tokens})

    def image(self, name: str, path: str | Path) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path)), TOKENS_SEEN: self._tokens})

    def finish(self, summary: Record) -> None:
        """Final numbers and artifacts, and close; an interrupted run (no numbers) has no artifacts yet."""
        if summary:
            self._run.summary.update(scalars(flatten(summary)))
            if self._folder is not None:
                for name, kind in ARTIFACTS.items():
                    self._log_artifact(self._folder / name, kind)
        self._run.finish()

    def _log_artifact(self, folder: Path, kind: str) -> None:
        """Its files stay where they are, and are read from there when they are uploaded."""
        import wandb

        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            return
        artifact = wandb.Artifact(f"{folder.name}-{self._run.id}", type=kind)
        for path in files:
            artifact.add_file(str(path.resolve()), name=path.relative_to(folder).as_posix(), policy="immutable")
        self._run.log_artifact(artifact)


def open_wandb(
    folder: str | Path, run: RunNames, *, mode: Mode = "offline", history: Iterable[Record] = ()
) -> Behind | None:
    """Open a W&B run in a run's folder.

    Args:
        folder: The run's folder; W&B writes to `wandb/` in it.
        run: Names and config.
        mode: `offline`, `online` (falls back to offline without a login or if W&B cannot be reached), or `disabled`.
        history: Records of `metrics.jsonl` up to where a resumed run continues; empty for a run that starts anew.

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
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        why = "is not installed" if isinstance(error, ImportError) else f"cannot be imported ({line_of(error)})"
        log.warning("wandb %s; the run goes on without it (pip install wandb, or tracking.wandb=disabled)", why)
        return None
    reasons = []
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            opened = _start(wandb, Path(folder), run, attempt, tuple(history))
        except Exception as error:  # noqa: BLE001 - see Guarded
            reasons.append(f"{attempt}: {line_of(error)}")
            if attempt == "online":
                _let_go(wandb)
            continue
        if reasons:
            log.warning("W&B does not start %s; it goes on offline, and wandb sync uploads it later", reasons[0])
        return opened
    log.warning("W&B does not start (%s); the run goes on without it, metrics.jsonl is whole", "; ".join(reasons))
    return None


def _start(wandb: Any, folder: Path, names: RunNames, mode: Mode, history: Sequence[Record]) -> Behind:
    folder.mkdir(parents=True, exist_ok=True)
    if mode == "online":
        _require_login(wandb)
    else:
        _supersede(folder / "wandb", names.id)
    known = wandb.Settings.model_fields
    settings = {key: value for key, value in _QUIET.items() if key in known}
    run = wandb.init(
        project=names.project,
        id=names.id,
        name=names.title,
        group=names.study,
        job_type=names.arm,
        tags=list(names.tags),
        config=dict(names.config),
        resume="allow" if mode == "online" and history else None,  # None: a run started anew replaces the old one
        settings=wandb.Settings(mode=mode, root_dir=str(folder.resolve()), **settings),
    )
    run.define_metric(TOKENS_SEEN)
    run.define_metric("*", step_metric=TOKENS_SEEN)
    tracker = Behind(Guarded(WandbTracker(run, folder), "W&B"))
    for record in history if mode == "offline" else ():
        tracker.log(record, int(record.get("update", 0)))
    return tracker


def _require_login(wandb: Any) -> None:
    """Refuse to go online without a key, where W&B itself would stop and ask for one.

    Raises:
        FeatclError: If there is no login; it is not asked whether the login is valid.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # it says where it found the key
        prompts = "prompt" in inspect.signature(wandb.login).parameters
        there = wandb.login(prompt=False, verify=False) if prompts else wandb.api.api_key
    if not there:
        raise FeatclError("no login; run `wandb login` once, or set WANDB_API_KEY")


def _let_go(wandb: Any) -> None:
    """End W&B's own process: it holds on to the id of a run that did not start, and would refuse it offline."""
    with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
        wandb.teardown()


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
    "finish_timeout": float(FINISH_SECONDS),
    "finish_timeout_raises": True,
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
