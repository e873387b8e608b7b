"""The notebooks: each is its source, executed; none holds logic; together they are small."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = (
    "anatomy_of_an_update", "applications", "bring_your_own_model", "distillation", "features", "forgetting", "memory",
    "quickstart",
)  # fmt: skip
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.If, ast.Try, ast.Match)
LARGEST = 1_500_000  # bytes of the whole folder
SECONDS = 240  # of one notebook at most

nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
jupytext = pytest.importorskip("jupytext", reason="the extra `notebooks` is not installed")
every = pytest.mark.parametrize("name", NAMES)


def source_of(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text("utf-8")


def executed(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def cells_of(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def logic_in(source: str) -> list[str]:
    """What is more than calls, assignments and comprehensions; a loop may only show something."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, LOGIC) or (isinstance(node, ast.For) and not shows(node)):
            found.append(f"{type(node).__name__} in line {node.lineno}")
    return found


def shows(loop: ast.For) -> bool:
    """Whether all that a loop does is to print or display."""
    calls = [line.value for line in loop.body if isinstance(line, ast.Expr) and isinstance(line.value, ast.Call)]
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    return len(names) == len(loop.body) and set(names) <= {"print", "display"}


def test_they_are_the_ones_there_are() -> None:
    for ending in ("py", "ipynb"):
        assert sorted(path.stem for path in FOLDER.glob(f"*.{ending}")) == sorted(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < LARGEST


@every
def test_a_notebook_is_its_source(name: str) -> None:
    notebook, wanted = executed(name), jupytext.reads(source_of(name), fmt="py:percent")
    assert cells_of(notebook) == cells_of(wanted)
    wanted.cells[-1].source += "\n1"
    assert cells_of(notebook) != cells_of(wanted)  # the control


@every
def test_a_notebook_holds_no_logic(name: str) -> None:
    assert logic_in(source_of(name)) == []


def test_logic_would_be_found() -> None:
    assert len(logic_in("def f():\n    pass\nclass A:\n    pass\nif 1:\n    pass\n")) == 3
    assert logic_in("for x in y:\n    total += x\n") == ["For in line 1"]
    assert logic_in("for x in y:\n    print(x)\n    learn(x)\n") == ["For in line 1"]
    assert logic_in("for x in y:\n    print(x)\nz = [f(x) for x in y]\n") == []


@every
def test_every_cell_was_run_in_order_and_none_failed(name: str) -> None:
    cells = [cell for cell in executed(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert str(FOLDER.parent) not in str(outputs)  # of the machine on which it was run


@every
def test_what_it_points_to_exists(name: str) -> None:
    text = "\n".join(text for kind, text in cells_of(executed(name)) if kind == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    missing = [link for link in links if "://" not in link and not (FOLDER / link).exists()]
    assert missing == []
    for path in re.findall(r"\b(?:docs|experiments)/[\w./-]*\w", text):
        assert (FOLDER.parent / path).exists(), path


@pytest.mark.slow
@every
def test_it_runs(name: str, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    notebook = jupytext.reads(source_of(name), fmt="py:percent")
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    errors = [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    assert errors == []
