"""Imports go down only: the order of the rooms is checked against the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# From top to bottom; a module may import from its own line and from below. `errors` and `files` are the ground.
HOUSE = (
    "__main__", "cli", "cli_ledger", "cli_report", "cli_study", "studies", "run", "session", "plan", "build",
    "learning", "methods", "objectives",
    "evaluation", "tracking", "adapters", "memory", "lab", "features", "streams", "models", "subspace", "config",
    "files", "html", "errors",
)  # fmt: skip
# Heavy or optional libraries, and the only places that may import them.
OWNERS = {
    "sae_lens": {"features/saelens.py"},
    "wandb": {"tracking/wandb.py"},
    "transformer_lens": {"features/"},
    "peft": {"adapters/"},
    "matplotlib": {"tracking/", "studies/"},
    "typer": {"cli.py", "cli_ledger.py", "cli_report.py", "cli_study.py"},
    "submitit": {"studies/"},
    "lm_eval": {"evaluation/harness.py"},
    "bm25s": {"methods/bm25.py"},
    "tensorboard": {"tracking/tensorboard.py"},
    "trackio": {"tracking/trackio.py"},
}
PACKAGE = Path(__file__).resolve().parents[1] / "featcl"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str, package: str = "featcl") -> list[tuple[str, bool]]:
    """Every imported module of a source text, with whether the import runs when the module is imported."""
    tree = ast.parse(source)
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
              for node in ast.walk(f)}  # fmt: skip
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((f"{package}.<relative>", True))
            else:
                found.append((node.module or "", id(node) not in inside))
                found += [(f"{node.module}.{a.name}", id(node) not in inside) for a in node.names]
    return found


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "featcl" and len(parts) > 1 and parts[1] in HOUSE else None


def upward(source: str, *, own: str) -> list[str]:
    """The imports of a file in room `own` that go up."""
    modules = {module for module, _ in imported(source)}
    return sorted(m for m in modules if (r := room(m)) and HOUSE.index(r) < HOUSE.index(own))


def rooms_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = rooms_of(path)
    if own == "__init__":
        return
    assert own in HOUSE, f"{path}: not a room of the house"
    assert upward(path.read_text(), own=own) == []


def test_config_imports_nothing_of_featcl() -> None:
    assert [m for m, _ in imported((PACKAGE / "config.py").read_text()) if m.startswith("featcl")] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_have_one_owner(path: Path) -> None:
    where = path.relative_to(PACKAGE).as_posix()
    for module, _ in imported(path.read_text()):
        owners = OWNERS.get(module.split(".")[0])
        assert owners is None or any(where.startswith(owner) for owner in owners), f"{where} imports {module}"


def test_an_upward_import_is_found() -> None:
    source = "from featcl.build import thing\nimport featcl.errors\ndef f():\n    from featcl.learning import Learner\n"
    assert upward(source, own="streams") == ["featcl.build", "featcl.build.thing", "featcl.learning",
                                             "featcl.learning.Learner"]  # fmt: skip
    assert upward(source, own="run") == []
