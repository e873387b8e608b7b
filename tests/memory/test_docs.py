"""What docs/memory.md tells people to type works, from an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import featcl
from featcl.config import RunConfig
from featcl.memory.attach import AttachedMemory, memories_of


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "docs" / "memory.md").read_text(), flags=re.DOTALL)


def test_the_python_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    [source] = blocks(root, "python")
    found: dict[str, object] = {}
    exec(source, found)
    attached = found["attached"]
    assert isinstance(attached, AttachedMemory)
    assert memories_of(found["model"]) == [attached]
    assert attached.users["anna"].count.tolist() == [0]
    assert attached.state is None
    assert "bytes=" in capsys.readouterr().out


def test_the_config_is_one(root: Path) -> None:
    [source] = blocks(root, "yaml")
    wanted = yaml.safe_load(source)["memory"]
    config = RunConfig.load(root / "experiments" / "memory" / "base.yaml", ["memory=null"])
    made = RunConfig.model_validate(config.model_dump() | {"memory": wanted})
    assert made.memory is not None
    assert made.memory.model_dump(include=set(wanted) - {"train"}) == {k: v for k, v in wanted.items() if k != "train"}


def test_what_is_named_exists(root: Path) -> None:
    text = (root / "docs" / "memory.md").read_text()
    names = set(re.findall(r"attached\.(\w+)", text))
    assert {"writing", "settle", "users"} <= names
    for name in names:
        assert hasattr(AttachedMemory, name) or name in ("users", "state"), name
    for name in set(re.findall(r"featcl\.memory\.(\w+)", text)):
        assert hasattr(featcl.memory, name), name
    for name in set(re.findall(r"MemoryState\.(\w+)", text)):
        assert hasattr(featcl.memory.MemoryState, name), name
