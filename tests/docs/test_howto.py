"""What the how-to pages tell people to add works: done as written, in a copy of the package.

A block with a title is a file; a `diff` block with a title changes one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from featcl.config import ConfigError, RunConfig
from tests.docs.pages import ROOT, Block, blocks
from tests.runs import make_config, make_home

HOWTO = ROOT / "docs" / "howto"
PAGES = ("new_kind", "new_method", "new_objective", "new_family")
NAMED = (  # what a config may say afterwards, and not before
    "adapter.kind=written",
    "methods=[{name: slowing, factor: 0.5}]",
    "learner.objectives=[{name: sft}, {name: confidence, weight: 0.1}]",
)


def files_of(page: str) -> list[Block]:
    return [block for block in blocks(HOWTO / f"{page}.md") if block.title]


def changed(text: str, diff: str, where: str) -> str:
    """A file after a diff without line numbers: in each hunk (between lines `@@`) the old lines become the new ones."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[:1] in sides) + "\n" for sides in (" -", " +"))
        assert text.count(old) == 1, f"{where}: {text.count(old)} places for\n{old}"
        text = text.replace(old, new)
    return text


def add(page: str, copy: Path) -> list[str]:
    """Do what a page says; returns its test files."""
    added = []
    for block in files_of(page):
        assert block.title is not None
        path = copy / block.title
        if block.language == "diff":
            path.write_text(changed(path.read_text(), block.source, block.title))
        else:
            assert not path.exists(), f"{page}: {block.title} is there already"
            path.write_text(block.source)
            added.append(block.title)
    return [name for name in added if name.startswith("tests/")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A copy of the package and its tests in which all four pages were followed, and the tests that they add."""
    place = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "featcl", place / "featcl", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (place / "featcl" / "lab" / "assets").symlink_to(ROOT / "featcl" / "lab" / "assets")
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    return place, [test for page in PAGES for test in add(page, place)]


def run_in(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, whose featcl comes first."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=place, env=env, capture_output=True, text=True, timeout=600, check=False
    )


def test_each_page_shows_a_file_and_its_test() -> None:
    for page in PAGES:
        titles = [block.title or "" for block in files_of(page) if block.language == "python"]
        assert [title for title in titles if title.startswith("tests/")], page
        assert page == "new_family" or [title for title in titles if title.startswith("featcl/")], page


def test_their_tests_pass_in_a_copy(copy: tuple[Path, list[str]]) -> None:
    place, added = copy
    names = [*added, "tests/methods/test_build.py::test_config_and_classes_agree"]
    done = run_in(place, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 2 * len(PAGES)


def test_what_they_add_runs_from_a_config(copy: tuple[Path, list[str]], tmp_path: Path) -> None:
    place, _ = copy
    make_config(make_home(tmp_path), tmp_path)("phases=null")  # writes arm.yaml
    overrides = [*NAMED, "phases=null", "stream.limit=3", "evaluation.canaries=null"]
    done = run_in(place, "-m", "featcl.cli", "run", str(tmp_path / "arm.yaml"), *overrides)
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "results" / "test" / "arm" / "seed-0" / "metrics.jsonl").read_text()
    assert "confidence/neg_entropy" in metrics


@pytest.mark.parametrize("override", NAMED)
def test_without_the_pages_the_names_are_unknown(override: str, tmp_path: Path) -> None:
    (tmp_path / "arm.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"written|slowing|confidence"):
        RunConfig.load(tmp_path / "arm.yaml", [override])


def test_a_diff_that_fits_nowhere_is_found() -> None:
    assert changed("a\nb\n", " a\n+x\n b\n", "file") == "a\nx\nb\n"
    assert changed("a\nb\n", "-b\n+c\n", "file") == "a\nc\n"
    with pytest.raises(AssertionError, match="0 places"):
        changed("a\nb\n", " b\n+x\n a\n", "file")
