"""Every command of README, tutorial, own_model and commands is run, in the order of its page and in one folder.

In this process each run is shortened, and what takes minutes is left out; `test_as_written` runs it in a shell.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from featcl import cli
from tests.conftest import tiny_model, tiny_tokenizer
from tests.docs.pages import ROOT, blocks, commands
from tests.runs import make_home

pytest.importorskip("sae_lens", reason="sae-lens is not installed")

MINUTES = (["sweep"], ["lab", "check"])  # commands that only test_as_written runs
WIDTH = 64  # of the tiny models: the quickstart chooses 32 directions
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHORT = {"name": "lab/applications", "limit": 3, "tasks": ["home_facts"]}
GEMMA, OLMO = "google/gemma-2-2b-it", "allenai/OLMo-2-0425-1B-Instruct"
SCOPE = "layer_20/width_16k/average_l0_71/params.npz"  # what SAELens' list says of layer_20/width_16k/canonical


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the studies that the pages name, the reader's own files, and a cache with the hub's models."""
    home = tmp_path / "home"
    home.mkdir()
    make_home(home)
    here = tmp_path / "here"
    for study in ("quickstart", "chat"):
        shutil.copytree(ROOT / "experiments" / study, here / "experiments" / study)
    (here / "TRAJECTORIES.jsonl").write_bytes((home / "stream.jsonl").read_bytes())
    text = (home / "background.txt").read_text()
    (here / "TEXT.txt.gz").write_bytes(gzip.compress(text.encode()))
    (here / "OTHER.txt").write_text("\n".join(f"line {i} of quiet text about nothing" for i in range(200, 260)))
    tiny_model("olmo2", d_model=WIDTH).save_pretrained(here / "MODEL")
    tiny_tokenizer("olmo2").save_pretrained(here / "MODEL")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what does dora drink?\n/correct cider .\n/log\n/quit\n"))
    fill_hub(tmp_path / "hub", monkeypatch)
    return here


def fill_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny random models and a Gemma Scope SAE, under the real ones' names, as downloads would lie in the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, family, n_layers in ((GEMMA, "gemma2", 21), (OLMO, "olmo2", 10)):
        folder = cached(hub, name)
        tiny_model(family, n_layers=n_layers, d_model=WIDTH).save_pretrained(folder)
        tiny_tokenizer(family).save_pretrained(folder)
    generator = np.random.default_rng(0)
    d_sae = 4 * WIDTH
    shapes = {"W_enc": (WIDTH, d_sae), "W_dec": (d_sae, WIDTH), "b_enc": (d_sae,), "b_dec": (WIDTH,)}
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights["threshold"] = np.ones(d_sae, dtype=np.float32)
    file = cached(hub, "google/gemma-scope-2b-pt-res") / SCOPE
    file.parent.mkdir(parents=True)
    np.savez(file, **weights)


def cached(hub: Path, name: str) -> Path:
    """The folder of a repository's snapshot."""
    root = hub / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    folder = root / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def shorten(here: Path) -> None:
    """The quickstart's base learns a little of one task; a random SAE is not asked whether it fits."""
    path = here / "experiments" / "quickstart" / "base.yaml"
    config = yaml.safe_load(path.read_text())
    config["stream"] |= SHORT
    config["features"]["check"] = False
    config["phases"][1]["experiences"] = 1
    config |= {"evaluation": {"suites": [], "canaries": None}, "tracking": {"wandb": "disabled", "samples": 0}}
    path.write_text(yaml.safe_dump(config))


def play(lines: list[str], here: Path) -> list[list[str]]:
    """Run the `featcl` commands among the lines, but for those that take minutes; returns what was run."""
    ran = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            words = made(words[1])
        if words[0] != "featcl" or words[1 : 1 + len(MINUTES[1])] in MINUTES or words[1:2] in MINUTES:
            continue
        if words[1:3] == ["features", "train"]:
            words += ["--tokens", "100000"]
        assert cli.invoke(words[1:]) == 0, line
        ran.append(words)
    return ran


def made(target: str) -> list[str]:
    """The `featcl` command of a make target; none for those that only set up or test."""
    shown = subprocess.run(
        ["make", "-n", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^\S*bin/featcl (.*)$", shown, flags=re.MULTILINE)
    return ["featcl", *shlex.split(found[-1])] if found else ["make"]


def write_files(page: Path, here: Path) -> None:
    """The files that a page tells people to save."""
    for block in blocks(page):
        if block.title and block.language == "yaml":
            (here / block.title).parent.mkdir(parents=True, exist_ok=True)
            (here / block.title).write_text(block.source)


def test_the_readme(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shorten(place)
    ran = play(commands(ROOT / "README.md"), place)
    assert {tuple(words[1:2]) for words in ran} == {("run",), ("doctor",), ("table",), ("log",), ("features",)}
    for run in ("quickstart/base", "quickstart/full_lora", "gemma/base", "olmo/base"):
        assert (place / "results" / run / "seed-0" / "summary.json").is_file(), run
    printed = capsys.readouterr().out
    assert f"{GEMMA} " in printed, "the doctor sees the cache"
    assert "full_lora" in printed


@pytest.mark.slow
def test_the_tutorial(place: Path) -> None:
    page = ROOT / "docs" / "tutorial.md"
    write_files(page, place)
    base = place / "study" / "base.yaml"
    base.write_text(yaml.safe_dump(yaml.safe_load(base.read_text()) | {"stream": SHORT}))
    lines = commands(page)
    swept = next(number for number, line in enumerate(lines) if line.startswith("featcl sweep study "))
    lines[swept] = "featcl run study/full_lora.yaml"  # what the sweep would run, here in this process
    play(lines, place)
    table = (place / "results" / "tutorial" / "table.md").read_text()
    assert "full_lora" in table
    assert (place / "results" / "tutorial" / "base" / "seed-0" / "report.html").is_file()


@pytest.mark.slow
def test_the_page_of_commands(place: Path) -> None:
    shorten(place)
    ran = play(commands(ROOT / "docs" / "commands.md"), place)
    named = {tuple(words[1:3]) if words[1] == "features" else tuple(words[1:2]) for words in ran}
    expected = {"run", "table", "report", "reproduce", "export", "log", "chat", "doctor"}
    assert named == {(name,) for name in expected} | {
        ("features", name) for name in ("train", "check", "show", "select")
    }
    assert (place / "directions").is_dir()
    assert (place / "features.html").is_file()


@pytest.mark.slow
def test_own_model(place: Path) -> None:
    shorten(place)
    play(commands(ROOT / "docs" / "howto" / "own_model.md"), place)
    assert (place / "results" / "real" / "base" / "seed-0" / "merged" / "model.safetensors").is_file()


def test_a_command_that_does_not_work_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match=r"nowhere\.yaml"):
        play(["featcl run experiments/nowhere.yaml"], place)
    assert "nowhere.yaml" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="--no-such"):
        play(["featcl doctor --no-such"], place)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md", "docs/commands.md"])
def test_as_written(name: str, place: Path) -> None:
    """The page's own commands and sizes, in a shell; of the reader's own model only what needs no download."""
    page = ROOT / name
    write_files(page, place)
    lines = [line for line in commands(page) if line.startswith(("make quickstart", "featcl "))]
    lines = [" ".join(made("quickstart")) if line.startswith("make") else line for line in lines]
    lines = [line for line in lines if not re.search("model=|--model (?!lab)", line)]
    assert len(lines) >= 4
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = "\n".join(["set -euo pipefail", *(f"{line.partition(' #')[0]} < /dev/null" for line in lines)])
    done = subprocess.run(["bash", "-c", script], cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_tiny_models_are_not_trained(place: Path) -> None:
    """The control of the cache: what the commands above load under the hub's names is what was put there."""
    import featcl

    model, _ = featcl.load_model(GEMMA)
    expected = tiny_model("gemma2", n_layers=21, d_model=WIDTH)
    assert torch.equal(model.model.layers[20].mlp.up_proj.weight, expected.model.layers[20].mlp.up_proj.weight)
    with pytest.raises(featcl.FeatclError, match="no such model"):
        featcl.load_model("google/gemma-2-9b-it")
