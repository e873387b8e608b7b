"""The numbers of an old folder once more, for any backend: `metrics.jsonl` is the truth, and the rest follows from it.

rebuild("results/quickstart/base/seed-0", "tensorboard")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from featcl.errors import FeatclError
from featcl.tracking.base import RunNames, Tracker
from featcl.tracking.jsonl import read_metrics
from featcl.tracking.opening import Backend, open_backends

Target = Literal["wandb", Backend]


def rebuild(folder: str | Path, backend: Target, *, online: bool = False) -> int:
    """Open a backend in a run's folder and send it all that the folder holds.

    Args:
        folder: A run's folder, finished or not.
        backend: `wandb`, `tensorboard` or `trackio`.
        online: W&B at once, not as an offline run.

    Returns:
        The number of records sent.

    Raises:
        FeatclError: If the folder is no run's, or the backend cannot be opened or fails on the way.
    """
    if backend not in (known := ("wandb", *get_args(Backend))):
        raise FeatclError(f"{backend!r} is none of {', '.join(known)}")
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FeatclError(f"{folder}: no config.json; this is not a run's folder")
    names = RunNames.of(_json(folder / "config.json"))
    wandb = ("online" if online else "offline") if backend == "wandb" else "disabled"
    optional = () if backend == "wandb" else (backend,)
    opened = open_backends(folder, names, wandb=wandb, backends=optional)
    if not opened:
        raise FeatclError(f"{folder}: {backend} cannot be opened; the line above says why")
    [tracker] = opened
    return replay(folder, tracker)


def replay(folder: str | Path, tracker: Tracker) -> int:
    """Send a tracker every record, table and picture of a run's folder, and its final numbers; then it is closed.

    Args:
        folder: A run's folder; of a metrics file that is cut off, what is whole counts.
        tracker: Open, and empty.

    Returns:
        The number of records.

    Raises:
        FeatclError: If there is no metrics file, a file is damaged, or the tracker fails.
    """
    folder = Path(folder)
    records = read_metrics(folder / "metrics.jsonl").records
    for record in records:
        tracker.log({key: value for key, value in record.items() if key != "update"}, int(record.get("update", 0)))
    for path in sorted((folder / "tables").glob("*.json")):
        table = _json(path)
        tracker.table(table["name"], table["columns"], table["rows"])
    for path in sorted((folder / "plots").glob("*.png")):
        tracker.image(f"plots/{path.stem}", path)
    tracker.finish(_json(folder / "summary.json") if (folder / "summary.json").is_file() else {})
    if getattr(tracker, "failed", False):
        raise FeatclError(f"{folder}: not all of it could be sent; the line above says why")
    return len(records)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FeatclError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise FeatclError(f"{path}: expected a JSON object, not {type(data).__name__}")
    return data
