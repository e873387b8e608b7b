"""Execute the notebooks from their sources and keep what they show.

    python scripts/docs/notebooks.py                  # all of notebooks/*.py
    python scripts/docs/notebooks.py quickstart       # some

Needs the extra `notebooks`. Each runs in an empty folder, with nothing on standard error that comes from other
libraries' deprecations; cells have fixed ids and no times, so that a new execution changes what the outputs changed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
TIMEOUT = 1200  # seconds of one cell
QUIET = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def execute(name: str) -> float:
    """Write `notebooks/NAME.ipynb` from `notebooks/NAME.py`; returns the seconds that it took."""
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, resources=resources
        ).execute()
    notebook.metadata.pop("language_info", None)  # of the machine on which it was run
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names or sorted(path.stem for path in FOLDER.glob("*.py"))
    os.environ.update(QUIET)
    failed = 0
    for name in names:
        try:
            print(f"{name}: {execute(name):.0f} s", flush=True)
        except CellExecutionError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
