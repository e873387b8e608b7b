"""The four commands on material that this project did not make: a trained Llama-class model and public texts."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from featcl.features import Directions, load_sae
from featcl.models import load_model

pytestmark = pytest.mark.slow


def featcl(*arguments: object, cwd: Path) -> str:
    """`featcl features …` in a process of its own; what it prints."""
    command = [sys.executable, "-m", "featcl", "features", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def texts(real, tmp_path) -> dict[str, Path]:
    """Two kinds of text, each in documents, the last ones kept from selecting."""
    found = {}
    for name, file in (("plays", "shakespeare_8_plays"), ("speeches", "inaugural")):
        text = gzip.decompress((real / "text" / f"{file}.txt.gz").read_bytes()).decode()
        blocks = [text[start : start + 1500] for start in range(0, 60_000, 1500)]
        for part, chosen in (("", blocks[:30]), ("_held_out", blocks[30:])):
            found[name + part] = tmp_path / f"{name}{part}.txt"
            found[name + part].write_text("\f".join(chosen))
    return found


def test_train_check_select_show(real, texts, tmp_path, root):
    model, sae, out = real / "models" / "stories260K", tmp_path / "sae", tmp_path / "directions"
    material = [real / "text" / "genesis_english-web.txt.gz", texts["plays"], texts["speeches"]]
    trained = featcl(
        "train", "--model", model, "--layer", 2, "--out", sae, "--text", *material,
        "--tokens", 300_000, "--json", cwd=root,
    )  # fmt: skip
    assert json.loads(trained)["2"]["fvu"] <= 0.2
    given = ("--sae", sae, "--model", model)

    health = json.loads(featcl("check", *given, "--text", texts["speeches_held_out"], "--json", cwd=root))
    assert health["fvu"] <= 0.3
    assert health["loss_recovered"] >= 0.8
    assert health["hook_name"] == "blocks.2.hook_resid_post"

    printed = featcl(
        "select", *given, "--selector", "contrast", "--k", 8, "--positive", texts["plays"], "--negative",
        texts["speeches"], "--held-out", texts["plays_held_out"], "--out", out, "--validate", cwd=root,
    )  # fmt: skip
    directions = Directions.load(out)
    assert directions.k == 8
    assert "directions have an effect beyond random ones" in printed
    assert all(q <= 0.05 for q in directions.manifest["scores"]["q_value"])
    assert auc(sae, model, directions.feature_ids, texts) >= 0.9

    page = tmp_path / "features.html"
    looked = json.loads(
        featcl("show", out, "--model", model, "--text", texts["plays_held_out"], "--out", page, "--json", cwd=root)
    )
    assert len(looked["features"]) == 8
    assert any(feature["active"] > 50 for feature in looked["features"])
    text = page.read_text()
    assert text.count("<h3>Feature") == 8
    assert "http" not in text
    best = max(looked["features"], key=lambda feature: feature["active"])
    shown = "".join(best["contexts"][0]["tokens"])
    assert any(word in texts["plays_held_out"].read_text() for word in shown.split()[2:-2])


def auc(sae, model, feature_ids, texts) -> float:
    """On held-out blocks: how well the summed activation of the chosen features tells plays from speeches."""
    import torch

    from featcl.features import FeatureEncoder, read_texts
    from featcl.features.activations import feature_rows
    from featcl.features.hooks import resolve

    loaded, tokenizer = load_model(model)
    loaded_sae = load_sae(sae)
    encoder = FeatureEncoder.from_sae(loaded_sae, feature_ids)
    scores, options = {}, {"hook": resolve(loaded, loaded_sae)}
    for name in ("plays_held_out", "speeches_held_out"):
        scores[name] = torch.tensor([
            torch.cat([r.feature_acts for r in feature_rows(encoder, loaded, tokenizer, [block], **options)]).mean()
            for block in read_texts(texts[name])
        ])  # fmt: skip
    plays, speeches = scores.values()
    return float((plays[:, None] > speeches[None]).float().mean())


def test_trains_from_real_trajectories(real, tmp_path, root):
    trained = featcl(
        "train", "--model", real / "models" / "stories260K", "--layer", 1, "--layer", 3, "--out", tmp_path,
        "--text", real / "trajectories" / "reflexion_alfworld_early.jsonl", "--tokens", 60_000, "--d-sae", 256,
        "--json", cwd=root,
    )  # fmt: skip
    for layer in ("1", "3"):
        assert json.loads(trained)[layer]["fvu"] <= 0.3
        assert load_sae(tmp_path / f"resid_post_{layer}").cfg.d_sae == 256


def test_killed_by_the_system_and_resumed(real, tmp_path, root):
    """SIGKILL in the middle, the same command again, the same bits as without."""
    command = [sys.executable, "-c", "from featcl.features import fitting; fitting.SAVE_EVERY = 0.05\n"
               "from featcl.cli import main; main()",
               "features", "train", "--model", str(real / "models" / "stories260K"), "--layer", "2", "--layer", "4",
               "--text", str(real / "text" / "genesis_english-web.txt.gz"), "--tokens", "300000", "--out"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], cwd=root, check=True, capture_output=True)
    running = subprocess.Popen([*command, str(killed)], cwd=root, stderr=subprocess.DEVNULL)
    log = killed / "resid_post_2" / "metrics.jsonl"
    while running.poll() is None and not (log.exists() and log.read_text().count("\n") > 60):
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (killed / "resid_post_2" / "cfg.json").exists()
    assert (killed / "training-state.safetensors").exists()
    subprocess.run([*command, str(killed)], cwd=root, check=True, capture_output=True)
    for layer in (2, 4):
        for name in ("sae_weights.safetensors", "cfg.json", "featcl.json", "metrics.jsonl"):
            path = Path(f"resid_post_{layer}") / name
            assert (killed / path).read_bytes() == (whole / path).read_bytes(), path
