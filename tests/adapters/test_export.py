"""A saved adapter is plain PEFT, byte for byte the same, and merging touches only a copy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from featcl.adapters import constrain

LOADER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter).eval()
batch = torch.load(ids, weights_only=True)
with torch.no_grad():
    torch.save(model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits, out)
assert not any(name.split(".")[0] == "featcl" for name in sys.modules)
"""


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize(("family", "kind", "rank"), [("gemma2", "both", None), ("olmo2", "both", 2)])
def test_a_process_without_featcl_loads_the_folder_and_gets_the_same_logits(zoo, tmp_path, family, kind, rank):
    model = zoo.model(family)
    model.save_pretrained(tmp_path / "base")
    adapter = zoo.train(constrain(model, zoo.directions(), kind=kind, rank=rank))
    adapter.save(tmp_path / "adapter")
    ids, mask = zoo.batch()
    torch.save({"ids": ids, "mask": mask}, tmp_path / "ids.pt")
    command = [
        sys.executable,
        "-c",
        LOADER,
        *(str(tmp_path / name) for name in ("base", "adapter", "ids.pt", "out.pt")),
    ]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    loaded, live = torch.load(tmp_path / "out.pt", weights_only=True), logits(adapter.model, ids, mask)
    assert float((live - loaded).abs().max()) <= 1e-5
    with adapter.disabled():
        assert float((logits(adapter.model, ids, mask) - loaded).abs().max()) > 1e-3


@pytest.mark.parametrize(("kind", "rank"), [("none", None), ("both", None), ("both", 2)])
def test_the_folder_is_plain_lora_of_one_rank_with_unit_scaling(zoo, tmp_path, kind, rank):
    adapter = zoo.train(constrain(zoo.model("gemma2"), zoo.directions(), kind=kind, rank=rank), steps=2)
    adapter.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == (rank or 6)
    assert config["bias"] == "none"
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["target_modules"] == sorted(config["target_modules"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    names = {f"base_model.model.{site.name}.{which}.weight" for site in adapter.sites for which in ("lora_A", "lora_B")}
    assert set(tensors) == names
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
from conftest import build_directions, build_model
from featcl.adapters import constrain
constrain(build_model("olmo2"), build_directions(), seed=3, rank=2).save(sys.argv[1])
"""


def test_saving_gives_the_same_bytes_in_every_process(tmp_path, root):
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        command = [sys.executable, "-c", SAVER, str(folder), str(root / "tests" / "adapters")]
        environment = {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("family", "kind", "rank"), [("gemma2", "both", None), ("olmo2", "both", 2), ("llama", "none", None)]
)
def test_the_merged_copy_equals_the_live_model_also_after_reloading(zoo, tmp_path, family, kind, rank):
    from transformers import AutoModelForCausalLM

    adapter = zoo.train(constrain(zoo.model(family), zoo.directions(), kind=kind, rank=rank))
    before = logits(adapter.model, *zoo.batch())
    merged = adapter.merge()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert float((logits(merged, *zoo.batch()) - before).abs().max()) <= 1e-5
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded, *zoo.batch()), logits(merged, *zoo.batch()))
    assert torch.equal(logits(adapter.model, *zoo.batch()), before)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
