"""`featcl log`: the versions of a run, read from its folder; and what the other commands on a ledger share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.html import card, long_table, note
from featcl.learning.blame import label_of
from featcl.learning.history import VERSIONS, History

FOLDER = "ledger"
TITLES = ("version", "when", "from", "task", "objective", "loss", "KL", "moved", "features moved most", "")


def history_of(run_dir: str | Path, *, size: int | None = None) -> History:
    """The ledger of a run.

    Args:
        run_dir: Its folder.
        size: Of its lines, the bytes that a checkpoint counts on; None: all.

    Raises:
        FeatclError: If it is no run's folder, or has no ledger, or a damaged one.
    """
    run_dir = Path(run_dir)
    if not (run_dir / FOLDER).is_dir():
        what = "it holds no ledger" if (run_dir / "config.json").is_file() else "not a run's folder"
        raise FeatclError(f"{run_dir}: {what}; give results/<study>/<arm>/seed-<n> of a run that has learned something")
    return History(run_dir / FOLDER, size=size)


def config_of(run_dir: str | Path) -> RunConfig:
    """The config that a run was started with.

    Raises:
        FeatclError: If there is none.
    """
    path = Path(run_dir) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FeatclError(f"{run_dir} is not a run's folder: {error.strerror}") from error
    except ValueError as error:
        raise FeatclError(f"{path} is not JSON: {error}") from error
    return RunConfig.from_dict({key: value for key, value in found.items() if key != "digest"})


def version_number(text: str, history: History) -> int:
    """`v7`, `7`, `base` (where the ledger starts) or `head` as a number.

    Raises:
        FeatclError: For anything else.
    """
    named = {"base": history.first, "head": history.head}
    if text in named:
        return named[text]
    number = text.removeprefix("v")
    if not number.isdecimal():
        raise FeatclError(f"version {text!r}: give v7, 7, base or head")
    return int(number)


# --- log ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of the log.

    Attributes:
        version: Its number.
        kind: `update`, `revert`, or with `everything` also `rollback` and what was noted.
        when: Local time, ISO 8601.
        on_line: Whether it is on the way to the head; False for what was rolled back.
        learned: Trajectory ids, or what was done.
        source, task, objective: Of the experience.
        loss, kl: At the update, in nats per token.
        moved: ‖change of the coordinates‖.
        delta_norm: ‖ΔW‖ after it.
        weight, step_scale: What weighing and the trust region let through.
        top: The features that it moved most.
        canaries: Change of the canaries' losses since their last reading, where they were read at this version.
        note: An alarm, or what else was said.
    """

    version: int
    kind: str
    when: str
    on_line: bool
    learned: str
    source: str = ""
    task: str = ""
    objective: str = ""
    loss: float | None = None
    kl: float | None = None
    moved: float | None = None
    delta_norm: float | None = None
    weight: float | None = None
    step_scale: float | None = None
    top: tuple[Mapping[str, Any], ...] = ()
    canaries: Mapping[str, float] | None = None
    note: str = ""

    def cells(self) -> list[Any]:
        """As a row under `TITLES`."""
        version = f"v{self.version}" if self.on_line else f"(v{self.version})"
        return [version, self.when.replace("T", " "), self.learned, self.task, self.objective, digits(self.loss),
                digits(self.kl), digits(self.moved), shown_top(self.top), _remark(self)]  # fmt: skip

    def _repr_html_(self) -> str:
        return card(f"{self.kind} v{self.version}", long_table(TITLES, [self.cells()]))


@dataclass(frozen=True)
class RunLog:
    """The versions of a run, newest first."""

    run: Path
    head: int
    entries: tuple[Entry, ...]
    torn: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"run": str(self.run), "head": self.head, "torn": self.torn,
                "versions": [asdict(entry) for entry in self.entries]}  # fmt: skip

    def rows(self) -> tuple[tuple[str, ...], list[list[Any]]]:
        """Titles and cells, as text and HTML show them."""
        return TITLES, [entry.cells() for entry in self.entries]

    def _repr_html_(self) -> str:
        head = f"{self.run}: the head is v{self.head}; newest first"
        return card("Log", note(self.torn or ""), note(head), long_table(*self.rows()))

    def __str__(self) -> str:
        titles, rows = self.rows()
        head = f"{self.run}: the head is v{self.head}; newest first"
        return "\n".join([*([self.torn] if self.torn else []), head, *aligned(titles, rows)])


def log_run(run_dir: str | Path, *, everything: bool = False) -> RunLog:
    """The versions of a run, like a commit log.

    Args:
        run_dir: Folder of a run.
        everything: Also what was rolled back, and when; and what was noted.
    """
    history = history_of(run_dir)
    line = set(history.line.values())
    canaries = _canary_changes(history)
    alarms = {place: str(value) for place, value in history.notes("alarm")}
    entries = []
    for place, record in enumerate(history.records):
        on_line = place in line
        if record["kind"] in VERSIONS and (on_line or everything):
            extra = {"canaries": canaries.get(place), "note": alarms.get(place, "")}
            entries.append(_entry(record, on_line=on_line, **extra))
        elif everything and record["kind"] == "rollback":
            entries.append(_entry(record, on_line=True, learned=f"back to v{record['version']} from v{record['from']}"))
        elif everything and record["kind"] == "note" and record["what"] != "canaries":
            entries.append(_entry(record, on_line=True, learned=f"{record['what']}: {record['value']}"))
    return RunLog(Path(run_dir), history.head, tuple(reversed(entries)), history.torn)


def _entry(record: Mapping[str, Any], *, on_line: bool, learned: str | None = None, **extra: Any) -> Entry:
    names = ("source", "task", "objective", "loss", "kl", "moved", "delta_norm", "weight", "step_scale")
    when = datetime.fromtimestamp(record["when"], UTC).astimezone().isoformat(timespec="seconds")
    found = {name: record[name] for name in names if name in record}
    return Entry(record["version"], record["kind"], when[:19], on_line, learned or label_of(record),
                 top=tuple(record.get("top", ())), **found, **extra)  # fmt: skip


def _canary_changes(history: History) -> dict[int | None, dict[str, float]]:
    """Place of the version at which canaries were read -> change of their losses since the reading before."""
    changes: dict[int | None, dict[str, float]] = {}
    before: Mapping[str, Any] = {}
    for place, value in history.notes("canaries"):
        now = {name: loss for name, loss in value.items() if name.startswith("canary/loss_")}
        if shared := [name for name in now if name in before]:
            changes[place] = {name.removeprefix("canary/loss_"): now[name] - before[name] for name in shared}
        before = now
    return changes


# --- showing -----------------------------------------------------------------------------------------------------


def aligned(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a plain table."""
    table = [list(titles), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def shown_top(top: Sequence[Mapping[str, Any]]) -> str:
    """The features of a ledger line, `write 1203 (formal register) 0.8`."""
    return ", ".join(
        f"{f['role']} {f['feature']}{' (' + f['name'] + ')' if f.get('name') else ''} {f['strength']:.3g}" for f in top
    )


def _remark(entry: Entry) -> str:
    parts = [f"canaries {name} {value:+.3f}" for name, value in (entry.canaries or {}).items()]
    if entry.weight not in (None, 1.0):
        parts.append(f"weight {entry.weight:.3g}")
    if entry.step_scale not in (None, 1.0):
        parts.append(f"step scaled by {entry.step_scale:.3g}")
    if not entry.on_line:
        parts.append("rolled back")
    return "; ".join([*parts, *([entry.note] if entry.note else [])])


def digits(value: float | None) -> str:
    """Four digits, or nothing."""
    return "" if value is None else f"{value:.4g}"
