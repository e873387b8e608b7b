"""Loading refuses what does not fit; the residual map is checked against what the forward pass does."""

from __future__ import annotations

import copy
import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featcl.errors import FeatclError
from featcl.models import (
    Family,
    check_residual_map,
    declare_residual_map_,
    load_model,
    max_context,
    model_digest,
    residual_map,
    residual_stream,
    resolve_hook,
)
from tests.adapters.conftest import build_model

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def rewrite(folder: Any, change: Any) -> None:
    """Load the folder's tensors, let `change` edit them, write them back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_loads_frozen_in_float32_with_a_padding_token(tiny_folder, family):
    folder = tiny_folder(family)
    model, tokenizer = load_model(folder, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.pad_token is not None


def test_a_bfloat16_checkpoint_runs_in_float32_on_a_cpu_unless_asked(tiny, tmp_path):
    model, tokenizer = tiny("olmo2")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu")[0].dtype == torch.float32
    assert load_model(tmp_path, device="cpu", dtype="auto")[0].dtype == torch.float32
    kept, _ = load_model(tmp_path, device="cpu", dtype="bfloat16")
    assert kept.dtype == torch.bfloat16
    loaded = dict(kept.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.named_parameters())


def test_a_tokenizer_without_padding_token_pads_with_its_end_of_text(tiny, tmp_path):
    model, tokenizer = tiny("olmo2")
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path)[1].pad_token == "<|end|>"


def test_tied_weights_are_stored_once_and_still_load(tiny_folder):
    folder = tiny_folder("gemma2")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, _ = load_model(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def _drop(tensors):
    del tensors[WEIGHT]


def _nan(tensors):
    tensors[WEIGHT][0, 0] = float("nan")


def _infinite(tensors):
    tensors[WEIGHT][1, 2] = float("inf")


def _reshape(tensors):
    tensors[WEIGHT] = tensors[WEIGHT][:, :-1].contiguous()


def _extra(tensors):
    tensors["model.layers.1.mlp.side_proj.weight"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop, f"lack {WEIGHT}"),
        (_nan, f"{WEIGHT} holds NaN or infinity"),
        (_infinite, f"{WEIGHT} holds NaN or infinity"),
        (_reshape, rf"{WEIGHT} is \[64, 31\] but config.json asks for \[64, 32\]"),
        (_extra, "hold model.layers.1.mlp.side_proj.weight, unknown"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_line(tiny_folder, change, says):
    folder = tiny_folder("olmo2")
    rewrite(folder, change)
    with pytest.raises(FeatclError, match=says) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_an_untied_head_that_is_missing_is_not_filled_in(tiny_folder):
    folder = tiny_folder("olmo2")
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(FeatclError, match=r"lack lm_head\.weight"):
        load_model(folder)


def test_a_config_with_another_number_of_layers_does_not_fit(tiny_folder):
    folder = tiny_folder("olmo2")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config["layer_types"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FeatclError, match=r"lack model\.layers\.3"):
        load_model(folder)


def test_pickles_are_not_loaded(tiny_folder):
    folder = tiny_folder("olmo2")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FeatclError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load_model(folder)


def test_a_truncated_file_says_so(tiny_folder):
    folder = tiny_folder("olmo2")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FeatclError, match="not a complete safetensors file"):
        load_model(folder)


def test_a_missing_shard_says_so(tiny, tmp_path):
    model, tokenizer = tiny("olmo2")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path)
    load_model(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FeatclError, match=f"lacks {shard.name}"):
        load_model(tmp_path)


def test_missing_folders_and_ids_say_what_would_be_right(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, says in [
        (tmp_path / "nothing", "no model folder"),
        ("lab/mistral", "no laboratory model 'lab/mistral'"),
        ("somebody/some-model", "without network, give a local folder"),
        (tmp_path, r"no config\.json"),
    ]:
        with pytest.raises(FeatclError, match=says) as caught:
            load_model(name)
        assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_not_run(tiny_folder):
    folder = tiny_folder("olmo2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "strange.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(FeatclError, match="does not load as a causal language model"):
        load_model(folder)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tiny, tiny_folder, tmp_path):
    folder = tiny_folder("olmo2")
    _, tokenizer = tiny("olmo2")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(FeatclError, match="embeds only 262 tokens"):
        load_model(folder)


def test_unknown_dtype_and_device_are_refused(tiny_folder):
    folder = tiny_folder("olmo2")
    with pytest.raises(FeatclError, match="unknown dtype 'float12'"):
        load_model(folder, dtype="float12")
    with pytest.raises(FeatclError, match="unknown device 'abacus'"):
        load_model(folder, device="abacus")


def test_a_real_trained_model_loads_and_gives_its_reference_values(real):
    folder = real / "models" / "stories260K"
    model, tokenizer = load_model(folder, device="cpu")
    assert tokenizer.pad_token == tokenizer.eos_token
    assert max_context(model) == 512
    for text in json.loads((folder / "reference.json").read_text())["texts"]:
        ids = torch.tensor([text["ids"]])
        assert tokenizer(text["text"]).input_ids == text["ids"]
        with torch.no_grad():
            logits = model(ids).logits
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        assert abs(float(nll) - text["mean_nll"]) < 1e-3
        torch.testing.assert_close(logits[0, -1, :8], torch.tensor(text["last_logits_first_8"]), atol=1e-3, rtol=0)


# --- the residual stream


ALL = ("gemma", "gemma2", "gemma3", "gemma3_conditional", "olmo", "olmo2", "olmo3", "llama", "qwen3")
# What stands around o_proj and down_proj (post) and before q_proj and gate_proj (pre), written down by hand.
BY_HAND = {
    "gemma": {"pre": "1+w", "post": None},
    "gemma2": {"pre": "1+w", "post": "1+w"},
    "gemma3": {"pre": "1+w", "post": "1+w"},
    "gemma3_conditional": {"pre": "1+w", "post": "1+w"},
    "olmo": {"pre": "mean", "post": None},
    "olmo2": {"pre": None, "post": "w"},
    "olmo3": {"pre": None, "post": "w"},
    "llama": {"pre": "w", "post": None},
    "qwen3": {"pre": "w", "post": None},
}
_SANDWICH = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS = {  # their names: before attention, after it, before the MLP, after it
    "gemma": ("input_layernorm", None, "post_attention_layernorm", None),
    "gemma2": ("input_layernorm", *_SANDWICH),
    "olmo2": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}
NORMS |= {"gemma3": NORMS["gemma2"], "gemma3_conditional": NORMS["gemma2"], "olmo3": NORMS["olmo2"]}
NORMS |= dict.fromkeys(("olmo", "llama", "qwen3"), NORMS["gemma"])


def norm_by_hand(form: str | None, module: Any, x: torch.Tensor) -> torch.Tensor:
    """The formula of the papers in float64, from the stored weight."""
    x = x.double()
    if form is None:
        return x
    if form == "mean":
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    weight = module.weight.double() + (form == "1+w")
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("name", ALL)
def test_the_map_is_what_a_block_does_computed_by_hand(name):
    """h' = h + post(attention(pre(h))); h'' = h' + post(down(act(gate) ⊙ up)): the MLP's products by hand as well."""
    model = build_model(name)
    residual, ids = residual_map(model), torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    block = model.get_submodule(f"{residual.layers_path}.1")
    pre, post = BY_HAND[name]["pre"], BY_HAND[name]["post"]
    norms = [block.get_submodule(norm) if norm else None for norm in NORMS[name]]
    attended: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    handles = [
        block.self_attn.o_proj.register_forward_hook(lambda _m, _i, out: attended.append(out)),
        block.self_attn.q_proj.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0])),
        block.mlp.gate_proj.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0])),
    ]
    h, after = (residual_stream(model, ids, layer=layer) for layer in (0, 1))
    for handle in handles:
        handle.remove()
    middle = h + norm_by_hand(post, norms[1], attended[0])
    x = norm_by_hand(pre, norms[2], middle)
    mlp = block.mlp.double()
    y = (mlp.act_fn(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(middle + norm_by_hand(post, norms[3], y), after.double(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(seen[0].double(), norm_by_hand(pre, norms[0], h), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[1].double(), x, atol=1e-5, rtol=1e-5)
    sites = (*residual.writers, *residual.readers)
    found = {site.name.removeprefix(f"{residual.layers_path}.1."): site for site in sites}
    places = {"self_attn.q_proj": 0, "self_attn.o_proj": 1, "mlp.up_proj": 2, "mlp.down_proj": 3}
    for linear, place in places.items():
        site, form = found[linear], (post if place % 2 else pre)
        expected = NORMS[name][place]
        assert site.norm_name == (None if expected is None else f"{residual.layers_path}.1.{expected}")
        assert (site.gain is None) == (form in (None, "mean"))
        assert site.centered == (form == "mean")
        if site.gain is not None:
            torch.testing.assert_close(site.gain.double(), norms[place].weight.double() + (form == "1+w"))
            assert float((site.gain - 1).abs().max()) > 0.3  # log-normal: a forgotten gain would be seen


@pytest.mark.parametrize("name", ALL)
def test_the_check_of_a_map_holds_for_every_family(name):
    check_residual_map(build_model(name))


# --- a map that the user gives


def mistral() -> Any:
    """An architecture that featcl does not know, of Llama's form, with gains far from one."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = torch.exp(0.5 * torch.randn_like(parameter)) if "norm" in name else torch.randn_like(parameter)
    return model


def rows(**changes: Any) -> dict[str, Any]:
    """Mistral's map, or a wrong one."""
    before = {f"self_attn.{part}_proj": "input_layernorm" for part in "qkv"}
    readers = before | dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")
    right: dict[str, Any] = {"writers": {"self_attn.o_proj": None, "mlp.down_proj": None}, "readers": readers}
    return {**right, "gain": "weight", **changes}


def test_a_map_in_the_users_words_makes_an_architecture_known():
    from featcl.adapters import constrain
    from featcl.features import Directions

    model = mistral()
    with pytest.raises(FeatclError, match=r"unknown architecture 'mistral': what is missing is its residual map"):
        residual_map(model)
    declared = declare_residual_map_(model, rows())
    assert len(declared.writers) == 4
    assert len(declared.readers) == 10
    assert residual_map(model).writers[0].name == "model.layers.0.self_attn.o_proj"
    adapter = constrain(model, Directions.from_vectors(torch.randn(4, 32), layer=1), kind="both")
    ids = torch.randint(3, 60, (2, 9))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapter.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert adapter.leak(ids).leak <= 1e-6
    assert residual_map(copy.deepcopy(model)).n_layers == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"writers": {"self_attn.o_proj": None}}, "adds something else to the stream than its writers"),
        ({"writers": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": None}}, "adds something else"),
        ({"readers": {"self_attn.q_proj": None}}, "q_proj does not read the stream through no norm"),
        ({"readers": {"self_attn.q_proj": "post_attention_layernorm"}}, "through model.layers.0.post"),
        ({"readers": {"mlp.down_proj": None}}, "in_features is 48, but the residual stream has d_model = 32"),
        ({"readers": {"self_attn.query": None}}, r"no module model\.layers\.0\.self_attn\.query"),
        ({"gain": "one_plus_weight"}, "does not read the stream through"),
        ({"centered": True}, "does not read the stream through"),
        ({"gain": "twice"}, "gain 'twice' is none of weight, one_plus_weight, none"),
        ({"norms": {}}, "unknown key 'norms', it has writers, readers, gain, centered, layers"),
        ({"readers": {}}, "readers must map module paths in a block to norms"),
        ({"readers": {"self_attn.q_proj": 3}}, "readers holds 3, where a norm's path or null belongs"),
        ({"layers": "model.blocks"}, r"has no list of blocks at model\.blocks"),
    ],
)
def test_a_wrong_map_is_refused_by_what_the_model_does(changes, says):
    model = mistral()
    with pytest.raises(FeatclError, match=says):
        declare_residual_map_(model, rows(**changes))
    with pytest.raises(FeatclError, match="unknown architecture"):
        residual_map(model)


def test_the_config_carries_a_map():
    from featcl.config import RunConfig

    config = RunConfig.from_dict({"adapter": {"residual_map": rows()}})
    read_back = RunConfig.from_dict(config.to_dict()).adapter.residual_map
    assert Family.from_dict(read_back) == Family.from_dict(rows())
    assert len(declare_residual_map_(mistral(), read_back).readers) == 10


def test_a_list_of_blocks_in_another_place():
    model = mistral()
    model.model.h = model.model.layers
    del model.model.layers
    model.model.layers = model.model.h  # the forward pass needs its own name; the map goes by the other
    declared = declare_residual_map_(model, rows(layers="model.h"))
    assert declared.layers_path == "model.h"
    assert resolve_hook(model, "model.h.1") == resolve_hook(model, "blocks.1.hook_resid_post") == ("model.h.1", 1)


def test_both_spellings_of_a_hook_name_one_block(tiny):
    model, _ = tiny("olmo2", n_layers=3)
    assert resolve_hook(model, "blocks.2.hook_resid_post") == ("model.layers.2", 2)
    assert resolve_hook(model, "model.layers.2") == ("model.layers.2", 2)
    assert resolve_hook(model, "blocks.2.hook_resid_pre") == ("model.layers.1", 1)
    for bad in ("blocks.3.hook_resid_post", "blocks.0.hook_resid_pre", "model.layers.9"):
        with pytest.raises(FeatclError, match="blocks 0 to 2"):
            resolve_hook(model, bad)
    with pytest.raises(FeatclError, match="no residual-stream hook"):
        resolve_hook(model, "blocks.1.attn.hook_z")


def test_the_stopped_forward_equals_the_full_one_and_leaves_no_hook(tiny, family):
    model, _ = tiny(family)
    ids, mask = torch.randint(0, 200, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        full = model(ids, attention_mask=mask, output_hidden_states=True)
    for layer in (0, 1):
        assert torch.equal(residual_stream(model, ids, mask, layer=layer), full.hidden_states[layer + 1])
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, full.logits)


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(FeatclError, match=r"unknown architecture 'gpt2'.*gemma2.*olmo2"):
        residual_map(model)


def test_the_digest_is_that_of_the_weights(tiny, tiny_folder, tmp_path):
    model, _ = tiny("olmo2")
    folder = tiny_folder("olmo2")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert model_digest(model) == model_digest(load_model(copy)[0])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert model_digest(model) != model_digest(load_model(copy)[0])
