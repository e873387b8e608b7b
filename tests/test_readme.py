"""What README and CONTRIBUTING tell people to type exists."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import featcl
from featcl import cli
from featcl.config import RunConfig

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "experiments/quickstart/README.md")


def code_lines(root: Path) -> list[str]:
    """Every line of a shell block, continuation lines joined."""
    text = "\n".join((root / name).read_text() for name in DOCUMENTS)
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_make_targets_exist(root: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), flags=re.MULTILINE))
    named = {line.split()[1] for line in code_lines(root) if line.startswith("make ")}
    assert {"quickstart", "test"} <= named
    assert named <= targets
    assert "make test" in (root / ".ci" / "run").read_text()


def test_commands_and_options_exist(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [shlex.split(line, comments=True) for line in code_lines(root) if line.startswith("featcl ")]
    assert len(commands) > 6
    for _, *words in commands:
        path = words[: 2 if words[0] in ("features", "lab") else 1]
        assert cli.invoke([*path, "--help"]) == 0, words
        listed = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert word in listed, words
            if word.startswith("experiments/"):
                assert (root / word).exists(), words
        if path == ["run"]:
            RunConfig.load(root / words[1], [word for word in words[2:] if "=" in word])


def test_python_names_exist(root: Path) -> None:
    source = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)[0]
    names = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "featcl"
    }
    assert {"load_model", "constrain", "Learner"} <= names
    for name in names:
        assert callable(getattr(featcl, name))


def test_the_readme_is_two_pages_at_most(root: Path) -> None:
    assert len((root / "README.md").read_text().splitlines()) <= 120
