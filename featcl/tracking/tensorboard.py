"""TensorBoard: event files in `<run folder>/tensorboard`, drawn against tokens seen. An optional backend.

A resumed run writes its earlier records again, so that the files are whole; one record is one event.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from featcl.tracking.base import Guarded, Record, RunNames, cells, flatten, scalars
from featcl.tracking.names import TOKENS_SEEN

FOLDER = "tensorboard"
SHOWN_ROWS = 500  # of a table: TensorBoard shows text, and the whole table lies in tables/


class TensorBoardTracker:
    """Sends records to a writer. It raises what TensorBoard raises: `Guarded` keeps that from the run.

    Args:
        writer: `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._tokens = 0

    def log(self, record: Record, step: int) -> None:
        Summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._tokens = int(record.get(TOKENS_SEEN, self._tokens))
        found = {**scalars(record), "update": step}
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in found.items()]
        self._writer.file_writer.add_summary(Summary(value=values), self._tokens)  # one event for all of them

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        shown = cells(rows[:SHOWN_ROWS])
        lines = [_line(columns), _line(["---"] * len(columns)), *(_line(row) for row in shown)]
        more = [f"\n{len(rows) - len(shown)} more rows in tables/"] if len(rows) > len(shown) else []
        self._writer.add_text(name, "\n".join([*lines, *more]), self._tokens)

    def image(self, name: str, path: str | Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.array(image.convert("RGB")), self._tokens, dataformats="HWC")

    def finish(self, summary: Record) -> None:
        for name, value in scalars(flatten(summary)).items():
            self._writer.add_scalar(f"summary/{name}", value, self._tokens)
        self._writer.close()


def open_tensorboard(folder: str | Path, run: RunNames, *, history: Iterable[Record] = ()) -> Guarded:
    """Open TensorBoard's event file in a run's folder.

    Args:
        folder: The run's folder; what an earlier part of the run left in `tensorboard/` is written anew.
        run: Names and config, which is shown as text.
        history: Records of `metrics.jsonl` up to where a resumed run continues.

    Raises:
        ImportError: If the package `tensorboard` is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    place = Path(folder) / FOLDER
    shutil.rmtree(place, ignore_errors=True)
    tracker = TensorBoardTracker(SummaryWriter(str(place)))
    about = {"project": run.project, "study": run.study, "arm": run.arm, "seed": run.seed, "id": run.id,
             "tags": ", ".join(run.tags)}  # fmt: skip
    tracker.table("run", ("key", "value"), [*about.items(), *sorted(flatten(run.config).items())])
    opened = Guarded(tracker, "TensorBoard")
    for record in history:
        opened.log(record, int(record.get("update", 0)))
    return opened


def _line(row: Sequence[Any]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
