"""A saved adapter is plain PEFT, byte for byte the same, and merging touches only a copy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from featcl import cli
from featcl.adapters import constrain
from featcl.adapters.export import add_update_, load_peft
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.features import Directions
from featcl.models import model_digest

LOADER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
home, cases = sys.argv[1], int(sys.argv[2])
batch, found = torch.load(f"{home}/ids.pt", weights_only=True), []
for number in range(cases):
    base = AutoModelForCausalLM.from_pretrained(f"{home}/base{number}", dtype="float32")
    model = PeftModel.from_pretrained(base, f"{home}/adapter{number}").eval()
    with torch.no_grad():
        found.append(model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits)
torch.save(found, f"{home}/out.pt")
assert not any(name.split(".")[0] == "featcl" for name in sys.modules)
"""


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


CASES = [("gemma2", "both", None), ("olmo2", "both", 2), ("olmo3", "read", None), ("gemma3", "write", 3)]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Adapters saved here and run by one process that has no featcl: folder and logits of each case."""
    from tests.adapters import conftest as zoo

    home = tmp_path_factory.mktemp("elsewhere")
    ids, mask = zoo.batch()
    torch.save({"ids": ids, "mask": mask}, home / "ids.pt")
    live = {}
    for number, (family, kind, rank) in enumerate(CASES):
        model = zoo.build_model(family)
        model.save_pretrained(home / f"base{number}")
        adapter = zoo.train(constrain(model, zoo.build_directions(), kind=kind, rank=rank))
        adapter.save(home / f"adapter{number}")
        with adapter.disabled():
            base = logits(adapter.model, ids, mask)
        live[number] = (logits(adapter.model, ids, mask), base)
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, str(home), str(len(CASES))], cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = torch.load(home / "out.pt", weights_only=True)
    return {case: (loaded[number], *live[number]) for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_a_process_without_featcl_loads_the_folder_and_gets_the_same_logits(elsewhere, case):
    loaded, live, base = elsewhere[case]
    assert float((live - loaded).abs().max()) <= 1e-5
    assert float((base - loaded).abs().max()) > 1e-3


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


FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3_conditional", "olmo", "olmo2", "olmo3", "llama", "qwen3")


@pytest.mark.parametrize(("family", "kind", "rank"), [*((f, "both", None) for f in FAMILIES), ("olmo2", "both", 2),
                                                      ("llama", "none", None)])  # fmt: skip
def test_the_merged_copy_equals_the_live_model_also_after_reloading(zoo, tmp_path, family, kind, rank):
    from transformers import AutoModelForCausalLM

    adapter = zoo.train(constrain(zoo.model(family), zoo.directions(), kind=kind, rank=rank))
    before = logits(adapter.model, *zoo.batch())
    merged = adapter.merge()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert not any("featcl" in name for name in vars(merged))
    assert float((logits(merged, *zoo.batch()) - before).abs().max()) <= 1e-5
    with adapter.disabled():
        assert float((logits(merged, *zoo.batch()) - logits(adapter.model, *zoo.batch())).abs().max()) > 1e-3
    merged.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    reloaded, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(reloaded, *zoo.batch()), logits(merged, *zoo.batch()))
    if family != "gemma3_conditional":
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(merged)
    assert torch.equal(logits(adapter.model, *zoo.batch()), before)
    assert all(parameter.requires_grad for parameter in adapter.parameters())


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_tied_embeddings_stay_tied_and_untied_ones_untied(zoo, tmp_path, family):
    merged = constrain(zoo.model(family), zoo.directions()).merge()
    merged.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    tied = family == "gemma2"
    assert ("lm_head.weight" in names) == (not tied)
    assert (merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()) == tied


def test_merging_takes_one_adapter_and_leaves_the_others_out(zoo):
    model = zoo.model("gemma2")
    first = zoo.train(constrain(model, zoo.directions(), kind="write", name="first"))
    with first.disabled():
        base = logits(first.model, *zoo.batch())
    alone = logits(first.model, *zoo.batch())
    second = zoo.train(constrain(model, zoo.directions(seed=3), kind="read", name="second"))
    shifted = zoo.train(constrain(model, zoo.directions(seed=4), kind="shift", name="shifted"))
    merged = first.merge()
    assert float((logits(merged, *zoo.batch()) - alone).abs().max()) <= 1e-5
    together = logits(second.model, *zoo.batch())
    assert float((together - alone).abs().max()) > 1e-3
    assert float((alone - base).abs().max()) > 1e-3
    assert torch.equal(logits(second.model, *zoo.batch()), together)
    assert shifted.delta_norm() > 1e-3


# --- the rules of plain LoRA, as llama.cpp's converter reads it


def converted(folder):
    """What `convert_lora_to_gguf.py` makes of a folder, by its own rules: target name -> (A, B) times alpha / rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    halves = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        base = name.replace("base_model.model.", "")
        for which in ("lora_A", "lora_B"):
            if f".{which}.weight" in name:
                halves.setdefault(base.replace(f".{which}.weight", ".weight"), {})[which] = tensor
    found = {}
    for name, pair in halves.items():
        a, b = pair["lora_A"], pair["lora_B"]
        assert a.shape[-2] == b.shape[-1]
        assert a.dtype == b.dtype
        for prefix, instead in (("model.language_model.", "model."), ("language_model.", "")):
            if name.startswith(prefix):
                name = name.replace(prefix, instead, 1)
                break
        found[name] = (config["lora_alpha"] / b.shape[-1]) * (b @ a)
    return found


@pytest.mark.parametrize("family", ["gemma2", "gemma3_conditional", "olmo2", "llama"])
@pytest.mark.parametrize("protected", [False, True])
def test_a_reader_that_knows_only_names_ranks_and_alpha_gets_the_same_update(zoo, tmp_path, family, protected):
    protect = {"write": zoo.directions().vectors[:2]} if protected else None  # writers then have a smaller rank
    adapter = zoo.train(constrain(zoo.model(family), zoo.directions(), kind="both", protect=protect))
    adapter.save(tmp_path)
    lora = load_peft(tmp_path)
    assert lora.rank == 6
    names = {name for name, _ in zoo.model("llama").named_parameters()}  # the layout that the converter maps
    found = converted(tmp_path)
    assert len(found) == len(adapter.sites)
    for site in adapter.sites:
        a, b = site.factors()
        target = f"{site.name.replace('language_model.', '')}.weight"
        assert target in names
        torch.testing.assert_close(found[target], b @ a, atol=1e-6, rtol=1e-5)
        assert torch.equal(lora.factors[site.name][0], a)
        if protected and site.plan.role == "write":
            assert int((lora.factors[site.name][1].norm(dim=0) > 0).sum()) == 4  # padded from 4 to 6


def test_a_kept_part_and_an_alpha_are_inside_the_saved_factors(zoo, tmp_path):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind="none", alpha=3.0))
    adapter.save(tmp_path)
    lora = load_peft(tmp_path)
    merged, live = adapter.merge(), logits(adapter.model, *zoo.batch())
    assert float((logits(merged, *zoo.batch()) - live).abs().max()) <= 1e-5
    plain = zoo.model("olmo2")
    add_update_(plain, lora.factors)
    assert float((logits(plain, *zoo.batch()) - live).abs().max()) <= 1e-5


def test_what_earlier_directions_left_behind_is_exported_with_the_rest(zoo, tmp_path):
    """After a change of directions the update is a sum of two LoRAs: one of a larger rank in the folder."""
    adapter = zoo.train(constrain(zoo.model("gemma2"), zoo.directions(), kind="both"))
    adapter.change_directions(zoo.directions(seed=7), remainder="keep")
    zoo.train(adapter)
    live = logits(adapter.model, *zoo.batch())
    adapter.save(tmp_path)
    lora = load_peft(tmp_path)
    assert lora.rank > 6
    plain = zoo.model("gemma2")
    add_update_(plain, lora.factors)
    assert float((logits(plain, *zoo.batch()) - live).abs().max()) <= 1e-5
    assert float((logits(adapter.merge(), *zoo.batch()) - live).abs().max()) <= 1e-5
    with adapter.disabled():
        assert float((logits(adapter.model, *zoo.batch()) - live).abs().max()) > 1e-3


def _config(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _tensors(edit):
    def change(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return change


A, B = (f"base_model.model.model.layers.1.mlp.down_proj.lora_{which}.weight" for which in "AB")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_config(lora_alpha=12), "not a LoRA with lora_alpha == r and no bias"),
        (_config(bias="all"), "not a LoRA with lora_alpha == r and no bias"),
        (_config(rank_pattern={"q_proj": 2}), "rank_pattern is set"),
        (_config(use_dora=True), "use_dora is set"),
        (_tensors(lambda t: t.pop(A)), "has only one of lora_A and lora_B"),
        (_tensors(lambda t: t.update({A: t[A][:-1].contiguous()})), r"is \[5, 48\], but the rank is 6"),
        (_tensors(lambda t: t.update({B: t[B].int()})), "does not hold finite floats"),
        (_tensors(lambda t: t.update({B: t[B] * float("nan")})), "does not hold finite floats"),
        (_tensors(lambda t: t.update({"lm_head.weight": torch.ones(2, 2)})), "neither a lora_A nor a lora_B weight"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is damaged"),
    ],
)
def test_a_folder_that_breaks_a_rule_is_refused(zoo, tmp_path, change, says):
    zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind="write"), steps=1, lr=1.0).save(tmp_path)
    load_peft(tmp_path)
    change(tmp_path)
    with pytest.raises(FeatclError, match=says):
        load_peft(tmp_path)


def test_an_update_of_another_model_is_refused_before_anything_changes(zoo):
    factors = {"model.layers.0.mlp.down_proj": (torch.ones(1, 48), torch.ones(32, 1))}
    model = zoo.model("olmo2")
    start = model_digest(model)
    with pytest.raises(FeatclError, match=r"no linear model\.layers\.9"):
        add_update_(model, factors | {"model.layers.9.mlp.down_proj": (torch.ones(1, 48), torch.ones(32, 1))})
    with pytest.raises(FeatclError, match=r"is \[32, 48\], the adapter's update \[32, 40\]: another model"):
        add_update_(model, factors | {"model.layers.1.mlp.down_proj": (torch.ones(1, 40), torch.ones(32, 1))})
    assert model_digest(model) == start
    add_update_(model, factors)
    assert model_digest(model) != start


# --- featcl export


@pytest.fixture
def finished_run(tiny, tmp_path):
    """A run's folder as a finished run leaves it, and the adapter that it holds."""
    model, tokenizer = tiny("gemma2")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    directions = Directions.from_vectors(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), layer=2)
    adapter = constrain(model, directions, kind="both")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    ids = torch.arange(20)[None]
    for _ in range(5):
        optimizer.zero_grad()
        adapter.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    run = tmp_path / "run"
    adapter.save(run / "adapter")
    config = RunConfig.from_dict({"model": str(tmp_path / "model"), "evaluation": {"suites": []}}).to_dict()
    (run / "config.json").write_text(json.dumps({**config, "digest": "0"}))
    return run, adapter, ids


def test_export_writes_a_merged_folder_that_transformers_loads_with_its_tokenizer(finished_run, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, adapter, ids = finished_run
    assert cli.invoke(["export", str(run), "--to", "merged", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["folder"] == str(run / "merged")
    assert (done["rank"], done["modules"]) == (4, len(adapter.sites))
    loaded = AutoModelForCausalLM.from_pretrained(done["folder"])
    assert float((logits(loaded, ids, None) - logits(adapter.model, ids, None)).abs().max()) <= 1e-5
    assert AutoTokenizer.from_pretrained(done["folder"])("words").input_ids
    assert cli.invoke(["export", str(run), "--to", "merged"]) == 2
    assert "is not empty: use --overwrite" in capsys.readouterr().err
    assert cli.invoke(["export", str(run), "--to", "merged", "--overwrite"]) == 0


def test_export_copies_the_peft_folder_or_says_where_it_is(finished_run, tmp_path, capsys):
    run, _, _ = finished_run
    out = tmp_path / "for-llama.cpp"
    assert cli.invoke(["export", str(run), "--to", "peft", "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert load_peft(out).rank == 4
    capsys.readouterr()
    assert cli.invoke(["export", str(run), "--to", "peft"]) == 0
    assert str(run / "adapter") in capsys.readouterr().out


def test_bad_exports_are_one_line(finished_run, capsys):
    run, _, _ = finished_run
    config = json.loads((run / "config.json").read_text())
    for change, arguments, says in (
        ({}, ["--to", "merged", "--out", str(run / "adapter")], "holds the adapter: give another --out"),
        ({"adapter": {"kind": "gated"}}, ["--to", "peft"], "kind 'gated' has no PEFT form and cannot be merged"),
        ({"adapter": {"kind": "residual"}}, ["--to", "merged"], "kind 'residual' has no PEFT form"),
    ):
        (run / "config.json").write_text(json.dumps({**config, **change}))
        assert cli.invoke(["export", str(run), *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert len(error.splitlines()) == 1
    shutil.rmtree(run / "adapter")
    (run / "config.json").write_text(json.dumps(config))
    assert cli.invoke(["export", str(run), "--to", "peft"]) == 2
    assert "the run has not finished" in capsys.readouterr().err
