"""Every block of code in the documentation runs, or is a config that loads; commands are in test_commands.py."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from featcl.config import RunConfig
from tests.docs.pages import ROOT, Block, blocks, pages

ELSEWHERE = {  # pages whose blocks another test runs
    "docs/memory.md": "tests/memory/test_docs.py",
    "docs/tracking.md": "tests/tracking/test_backends.py",  # needs a finished run
}
OF_STUDIES = ("base", "grid")  # keys of an arm's file that are not a config's


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_of(page: Path) -> list[Block]:
    """What is run: neither fragments, nor what is a file of its own (test_howto.py)."""
    return [block for block in blocks(page, "python") if not block.fragment and block.title is None]


WITH_PYTHON = [page for page in pages() if python_of(page) and name_of(page) not in ELSEWHERE]


def run_blocks(page: Path) -> None:
    """A page's blocks in order, and the tests in them."""
    space: dict[str, object] = {"__name__": "page"}
    for block in python_of(page):
        exec(compile(block.source, page.name, "exec"), space)
    for name, value in list(space.items()):
        if name.startswith("test_") and inspect.isfunction(value):
            value()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_fragments_are_few_and_the_main_pages_have_none() -> None:
    fragments = [name_of(page) for page in pages() for block in blocks(page, "python") if block.fragment]
    assert len(fragments) <= 3, fragments
    assert not {"README.md", "docs/tutorial.md", "docs/index.md"} & set(fragments)
    assert {"README.md", "docs/tutorial.md", "docs/index.md"} <= {name_of(page) for page in WITH_PYTHON}


def test_a_block_that_does_not_run_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "index.md"
    copy.write_text((ROOT / "docs" / "index.md").read_text().replace("featcl.load_model", "featcl.load_modell"))
    with pytest.raises(AttributeError, match="load_modell"):
        run_blocks(copy)


def yaml_blocks() -> list[tuple[str, dict[str, object]]]:
    """Blocks that are a config, or a part of one."""
    found = []
    for page in pages():
        for block in blocks(page, "yaml"):
            data = None if block.source.startswith("--8<--") else yaml.safe_load(block.source)
            if isinstance(data, dict) and set(data) <= {*RunConfig.model_fields, *OF_STUDIES}:
                found.append((name_of(page), {key: value for key, value in data.items() if key not in OF_STUDIES}))
    return found


@pytest.mark.parametrize(("page", "data"), yaml_blocks(), ids=[name for name, _ in yaml_blocks()])
def test_yaml_blocks_are_configs(page: str, data: dict[str, object]) -> None:
    RunConfig.model_validate(data)


def test_yaml_blocks_that_are_no_configs_are_known() -> None:
    every = [name_of(page) for page in pages() for block in blocks(page, "yaml") if "--8<--" not in block.source]
    assert sorted(every) == sorted(name for name, _ in yaml_blocks())
    with pytest.raises(ValueError, match="stepps"):
        RunConfig.model_validate({"learner": {"stepps": 1}})
