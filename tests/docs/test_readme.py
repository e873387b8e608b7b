"""What README and CONTRIBUTING tell people to type exists, and what they claim is so."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

import featcl
from featcl import cli
from featcl.config import RunConfig
from tests.docs.pages import commands, links

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/commands.md", "docs/tutorial.md", "experiments/quickstart/README.md")


@pytest.fixture(scope="module")
def pictures(root: Path) -> ModuleType:
    """scripts/docs/pictures.py."""
    spec = importlib.util.spec_from_file_location("pictures", root / "scripts" / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_lines(root: Path) -> list[str]:
    """Every line of a shell block, continuation lines joined."""
    return [line for name in DOCUMENTS for line in commands(root / name)]


def test_make_targets_exist(root: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), flags=re.MULTILINE))
    named = {line.split()[1] for line in code_lines(root) if line.startswith("make ")}
    assert {"quickstart", "test"} <= named
    assert named <= targets
    assert "make test" in (root / ".ci" / "run").read_text()


def test_commands_and_options_exist(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [shlex.split(line, comments=True) for line in code_lines(root) if line.startswith("featcl ")]
    assert len(lines) > 20
    for _, *words in lines:
        path = words[: 2 if words[0] in ("features", "lab") else 1]
        assert cli.invoke([*path, "--help"]) == 0, words
        listed = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert word in listed, words
            if word.startswith("experiments/"):
                assert (root / word).exists(), words
        if path == ["run"] and words[1].startswith("experiments/"):
            RunConfig.load(root / words[1], [word for word in words[2:] if "=" in word])


def test_the_readme_is_two_pages_at_most(root: Path) -> None:
    assert len((root / "README.md").read_text().splitlines()) <= 120
    assert len((root / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def test_pictures_are_small_and_as_the_script_draws_them(root: Path, pictures: ModuleType, tmp_path: Path) -> None:
    shown = [link for link in links(root / "README.md") if link.startswith("docs/images/")]
    assert {"docs/images/idea.svg", "docs/images/recall.svg"} <= set(shown)
    for path in (root / "docs" / "images").iterdir():
        assert path.stat().st_size <= 100 * 1024, path.name
    for name in ("idea", "recall"):
        drawn = pictures.save(getattr(pictures, name)(), tmp_path / f"{name}.svg")
        assert drawn.read_bytes() == (root / "docs" / "images" / f"{name}.svg").read_bytes(), "scripts/docs/pictures.py"


def test_the_table_is_what_the_results_say(root: Path, pictures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (root / "README.md").read_text()
    assert pictures.with_table(readme, pictures.found_table()) == readme, "python scripts/docs/pictures.py"
    [value] = [row.split("|")[2].strip() for row in readme.splitlines() if row.startswith("| truncated |")]
    rights = [
        json.loads(path.read_text())["right"][str(gap)]
        for path in (pictures.STUDY / "results" / "memory" / "recall" / "truncated").glob("seed-*.json")
        for gap in (1, 2, 3)
    ]
    mean = sum(map(sum, rights)) / sum(map(len, rights))  # the rows' first numbers are these, without the script
    assert value.startswith(f"{mean:.2f} [")
    monkeypatch.setitem(pictures.ARMS, "truncated", "something else")
    assert pictures.with_table(readme, pictures.found_table()) != readme


def test_what_is_not_answered_yet_has_no_runs(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert "**not answered yet**" in text
    for link in re.findall(r"\]\((experiments/\w+/README\.md)\)", text.split("**not answered yet**")[1]):
        assert "Not run yet" in (root / link).read_text(), f"{link} was run: say in README.md what was found"


def test_metadata_agree(root: Path) -> None:
    citation = (root / "CITATION.cff").read_text()
    assert f"version: {featcl.__version__}\n" in citation
    project = (root / "pyproject.toml").read_text()
    assert f'version = "{featcl.__version__}"' in project
    for text in (citation, project):
        assert "Apache-2.0" in text
    licence = (root / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize("name", ["olmo2", "gemma2"])
def test_model_cards_are_true(name: str) -> None:
    """What a card of the laboratory says of a model and its SAEs is what their files say."""
    from featcl.models import LAB_ASSETS

    folder, card = LAB_ASSETS / name, (LAB_ASSETS / name / "README.md").read_text()
    model, _ = featcl.load_model(f"lab/{name}")
    millions, architecture = re.findall(r"A ([\d.]+) M-parameter `(\w+)`", card)[0]
    assert architecture == type(model).__name__
    assert float(millions) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.05)
    saes = sorted(path.parent.name for path in folder.glob("*/sae_weights.safetensors"))
    assert re.findall(r"^\| (resid_post_\d+) \|", card, flags=re.MULTILINE) == saes
    for sae in saes:
        health = json.loads((folder / sae / "featcl.json").read_text())["held_out"]
        shown = [f"{health['fvu']:.3f}", f"{health['l0']:.1f}", f"{health['dead_fraction']:.3f}"]
        assert f"| {sae} | {' | '.join(shown)} | {health['loss_recovered']:.3f} |" in card
    for fact in ("Licence: Apache-2.0", f"featcl lab train --model lab/{name}", "no use outside"):
        assert fact in " ".join(card.split()), fact


def test_contributing_tells_the_layers_in_order(root: Path) -> None:
    from tests.test_layers import HOUSE

    text = (root / "CONTRIBUTING.md").read_text().split("From top to bottom:")[1].split("Only `build`")[0]
    named = re.findall(r"`(\w+)`", text)
    assert sorted(named) == sorted(name for name in HOUSE if name != "__main__")
    rooms = [name for name in named if "_" not in name and name not in ("session", "plan")]
    assert rooms == [name for name in HOUSE if name in rooms]
