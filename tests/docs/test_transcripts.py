"""What docs/terminal.md shows is what `featcl run` says."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sae_lens", reason="sae-lens is not installed")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    """scripts/docs/transcripts.py."""
    spec = importlib.util.spec_from_file_location("transcripts", root / "scripts" / "docs" / "transcripts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["run", "typo", "killed"])
def test_it_still_says_so(name: str, script: ModuleType, tmp_path: Path) -> None:
    kept = (script.FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    now = script.TRANSCRIPTS[name](script.Terminal(tmp_path))
    assert script.normalised(now) == script.normalised(kept), "python scripts/docs/transcripts.py writes it anew"


def test_every_transcript_is_shown(script: ModuleType, root: Path) -> None:
    page = (root / "docs" / "terminal.md").read_text()
    for name in script.TRANSCRIPTS:
        assert f'--8<-- "transcripts/{name}.txt"' in page
    assert {path.stem for path in script.FOLDER.glob("*.txt")} == set(script.TRANSCRIPTS)


def test_other_words_are_a_difference_and_other_numbers_are_none(script: ModuleType) -> None:
    kept = (script.FOLDER / "killed.txt").read_text(encoding="utf-8")
    assert "Killed" in kept
    assert "the state is saved in results/demo/stopped/seed-0; the same command goes on from there" in kept
    same, plain = script.normalised, script.normalised(kept)
    assert same(kept.replace("the state is saved", "the state is gone")) != plain
    assert same(kept.replace("[exit code 130]", "[exit code 1]")) != plain
    assert same(kept.replace("│ home_facts", "│ home_moves")) != plain
    assert same(re.sub(r"\d\.\d{3}", "0.917", kept)) == plain
    assert same("going on after 3 updates") == same("going on after 12 updates")
    assert same("┃      ┃ base") == same("┃ ┃   base")


def test_a_typo_elsewhere_says_something_else(script: ModuleType, tmp_path: Path) -> None:
    terminal = script.Terminal(tmp_path)
    said = terminal.types("featcl run demo.yaml learner.optimiser=adamw")
    assert "learner.optimiser: unknown key, did you mean 'optimizer'?" in said
    assert said not in (script.FOLDER / "typo.txt").read_text(encoding="utf-8")
    assert "Traceback" in terminal.types("featcl run demo.yaml learner.optimiser=adamw --debug")
