"""The site builds without a warning, and has a place for every public name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import featcl

ROOMS = ("adapters", "evaluation", "features", "learning", "memory", "objectives", "streams", "tracking")
CONSTANTS = {"featcl.evaluation.FORMULAS"}  # a table, not a function or a class
CALLED = {name for name in featcl.__all__ if inspect.isfunction(getattr(featcl, name))} | {"run"}

installed = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings"))
needs_mkdocs = pytest.mark.skipif(not installed, reason="mkdocs is not installed: pip install 'featcl[docs]'")


def build(config: Path, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=cwd, env=env)


def objects(site: Path) -> set[str]:
    """Names with an anchor of their own, from the site's inventory."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


@needs_mkdocs
def test_it_builds_without_a_warning_and_has_every_public_name(root: Path, tmp_path: Path) -> None:
    done = build(root / "mkdocs.yml", tmp_path / "site", root)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    known = objects(tmp_path / "site")
    for room in ROOMS:
        module = importlib.import_module(f"featcl.{room}")
        for name in module.__all__:
            place = f"featcl.{room}.{name}"
            assert {place, f"{place}.{name}"} & known or place in CONSTANTS, f"no reference for {place}"
    shown_names = {place.rpartition(".")[2] for place in known}
    public = [name for name in featcl.__all__ if inspect.isclass(getattr(featcl, name)) or name in CALLED]
    assert len(public) > 10
    assert set(public) - shown_names == set()
    shown = (tmp_path / "site" / "terminal" / "index.html").read_text()
    assert "the same command goes on from there" in shown, "transcripts are in the page"
    assert "--8&lt;--" not in shown


@needs_mkdocs
@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("[planted](nowhere.md)", "nowhere.md"),
        ("[planted](#nowhere)", "no such anchor"),
        ("::: featcl.no_such_room", "featcl.no_such_room"),
        ('--8<-- "transcripts/none.txt"', "none.txt"),
    ],
)
def test_a_planted_fault_fails_the_build(root: Path, tmp_path: Path, text: str, warning: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{text}\n")
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {root / 'mkdocs.yml'}\ndocs_dir: docs\nnav: [index.md]\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site", tmp_path)
    assert done.returncode != 0
    assert warning in done.stderr


def test_every_page_is_in_the_navigation(root: Path) -> None:
    listed = set(re.findall(r"([\w/]+\.md)$", (root / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert listed == {str(page.relative_to(root / "docs")) for page in (root / "docs").rglob("*.md")}
