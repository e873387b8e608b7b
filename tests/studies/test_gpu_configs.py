"""Configs for research GPUs, on stand-ins of the same classes: they expand, and all that they read is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from featcl.studies.arms import study_arms
from featcl.studies.dry_run import dry_run
from tests.conftest import tiny_tokenizer
from tests.runs import make_sae

pytest.importorskip("sae_lens", reason="sae-lens is not installed")

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.parent for path in (ROOT / "experiments" / "gpu").glob("*/base.yaml"))
CLASSES = {
    "gemma2_2b": "Gemma2ForCausalLM", "gemma2_9b": "Gemma2ForCausalLM", "gemma3_1b": "Gemma3ForCausalLM",
    "gemma3_4b": "Gemma3ForConditionalGeneration", "olmo2_1b": "Olmo2ForCausalLM", "olmo2_7b": "Olmo2ForCausalLM",
    "olmo3_7b": "Olmo3ForCausalLM",
}  # fmt: skip
STREAMS = ("base", "standard_cl", "persona", "code", "trajectories")
LAYERS = 4


def stand_in_folder(place: Path, name: str) -> Path:
    """config.json and tokenizer of a tiny model of the class; no weights."""
    from transformers import Gemma2Config, Gemma3Config, Gemma3TextConfig, Olmo2Config, Olmo3Config

    text: dict[str, Any] = {
        "vocab_size": 262, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    without = {key: value for key, value in text.items() if key != "head_dim"}
    config = {
        "Gemma2ForCausalLM": lambda: Gemma2Config(**text),
        "Gemma3ForCausalLM": lambda: Gemma3TextConfig(**text),
        "Gemma3ForConditionalGeneration": lambda: Gemma3Config(text_config=text, vision_config=vision),
        "Olmo2ForCausalLM": lambda: Olmo2Config(**without),
        "Olmo3ForCausalLM": lambda: Olmo3Config(**without),
    }[CLASSES[name]]()
    folder = place / "model"
    config.save_pretrained(folder)
    tiny_tokenizer("gemma2" if "gemma" in name else "olmo2").save_pretrained(folder)
    return folder


def conversation(number: int, source: str) -> dict[str, Any]:
    told = [
        {"role": "user", "content": f"what is {number} of {source}?"},
        {"role": "assistant", "content": f"{number}"},
    ]
    return {"id": f"{source}/{number}", "source": source, "task": source, "messages": told}


def lay_out(place: Path, config_files: set[str]) -> None:
    """A little of every file that configs name."""
    for name in config_files:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("\n".join(f"line {n} of ordinary text about nothing at all" for n in range(120)))
            continue
        records = [conversation(n, path.stem) for n in range(12)]
        if path.stem == "persona":
            records = [{**one, "messages": one["messages"][:1], "chosen": "yes", "rejected": "no"} for one in records]
        if path.stem == "sae_text":
            records = [{"id": one["id"], "source": "text", "text": f"text number {n}"} for n, one in enumerate(records)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def files_of(arms: Any) -> set[str]:
    found: set[str] = set()
    for arm in arms:
        config = arm.config
        found |= {config.stream.path} if isinstance(config.stream.path, str) else set(config.stream.path)
        found |= set(config.features.background)
        found |= set(config.features.train.text) if config.features.train else set()
        found |= {method.parameters["material"] for method in config.methods}
    return found


def test_every_model_has_its_study() -> None:
    assert {folder.name for folder in STUDIES} == set(CLASSES)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_configs_expand_with_controls_and_say_what_they_ask(folder: Path) -> None:
    arms = study_arms(folder)
    assert {"frozen", "full_lora", "lora_weight_decay", "random", "pca", *STREAMS} == {arm.family for arm in arms}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert f"**Budget.** {len(arms)} runs with one seed" in " ".join(readme.split())
    for part in ("**Question.**", "**Prediction", "**Finding"):
        assert part in readme
    for path in folder.glob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        assert path.stem == "base" or len(lines) <= 10
    own = yaml.safe_load((folder / "base.yaml").read_text())["features"]
    assert own["sae"].startswith(("gemma-scope", "saes/"))
    assert ("train" in own) == own["sae"].startswith("saes/")


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_all_that_a_run_reads_is_found_on_a_stand_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = stand_in_folder(tmp_path, folder.name)
    found = study_arms(folder, [f"model={model}", "features.k=4", "learner.lr=1e-3"])
    lay_out(tmp_path, files_of(found))
    train = found[0].config.features.train
    if train is None:
        make_sae(tmp_path / "sae", layer=LAYERS - 1)
        found = study_arms(folder, [f"model={model}", "features.k=4", "learner.lr=1e-3",
                                    f"features.sae={tmp_path / 'sae'}"])  # fmt: skip
    else:
        found = study_arms(folder, [f"model={model}", "features.k=4", "learner.lr=1e-3", "features.train.layer=3"])
    for arm in found:
        looked = dry_run(arm.config)
        assert not looked.missing, arm.name
        assert any(CLASSES[folder.name] in line for line in looked.found), looked.found
        assert looked.estimate is not None
        assert looked.estimate.trained > 0
    gone = tmp_path / sorted(files_of(found))[0]
    gone.unlink()
    assert dry_run(found[0].config).missing, "control: what is gone is missed"


def test_published_layouts_become_trajectories(tmp_path: Path) -> None:
    from featcl.streams import read_trajectories

    raw = tmp_path / "raw"
    for file, content in {
        "TRACE/FOMC/train.json": json.dumps([{"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": 2}]),
        "CL/TC/agnews/train.json": json.dumps(
            {"Definition": ["Choose."], "Instances": [{"input": "x", "output": "World"}, {"input": "y", "output": "z"}]}
        ),
        "pairs.jsonl": json.dumps({"prompt": "who?", "chosen": "me", "rejected": "you"}) + "\n",
        "code.jsonl": json.dumps({"question": "where?", "answer": "here", "path": "src/a.py"}) + "\n",
        "bad.jsonl": json.dumps({"question": "where?"}) + "\n",
    }.items():
        (raw / file).parent.mkdir(parents=True, exist_ok=True)
        (raw / file).write_text(content)

    def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "gpu" / "trajectories.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    jobs = {"trace": ("raw/TRACE", "data/trace"), "standard_cl": ("raw/CL", "data/standard_cl"),
            "pairs": ("raw/pairs.jsonl", "data/persona.jsonl"),
            "questions": ("raw/code.jsonl", "data/code.jsonl")}  # fmt: skip
    made = {}
    for layout, (source, out) in jobs.items():
        done = convert(layout, source, out)
        assert done.returncode == 0, done.stderr
        [path] = done.stdout.split()
        made[layout] = list(read_trajectories(tmp_path / path))
    assert [t.messages[-1]["content"] for t in made["trace"]] == ["a", "2"]
    assert made["standard_cl"][0].messages[0]["content"] == "Choose.\nx"
    assert made["pairs"][0].rejected is not None
    assert made["questions"][0].source == "src"
    wrong = convert("questions", "raw/bad.jsonl", "data/bad.jsonl")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "lacks 'answer'" in wrong.stderr
