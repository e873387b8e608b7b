"""Loading refuses what does not fit; the residual map is checked against what the forward pass does."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featcl.errors import FeatclError
from featcl.models import load_model, max_context, model_digest, residual_map, residual_stream, resolve_hook

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


def test_the_map_accounts_for_everything_that_a_block_writes(tiny, family):
    """The stream after a block is the stream before it, plus g ⊙ y / rms(y) of each writer (y without post-norm)."""
    model, _ = tiny(family)
    residual = residual_map(model)
    ids = torch.randint(0, 200, (2, 9))
    caught: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(site.name).register_forward_hook(
            lambda _m, _i, out, name=site.name: caught.update({name: out})
        )
        for site in residual.writers
    ]
    before, after = (residual_stream(model, ids, layer=layer) for layer in (0, 1))
    for handle in handles:
        handle.remove()
    total = before
    for site in residual.writers:
        if site.layer == 1:
            y = caught[site.name]
            rms = (y.square().mean(-1, keepdim=True) + site.eps).sqrt()
            total = total + (y if site.gain is None else site.gain * y / rms)
    torch.testing.assert_close(total, after, atol=2e-5, rtol=1e-5)


def test_the_map_accounts_for_what_readers_see(tiny, family):
    """The input of q_proj is g ⊙ h / rms(h), or the raw stream on OLMo-2."""
    model, _ = tiny(family)
    site = next(site for site in residual_map(model).readers if site.name.endswith("layers.1.self_attn.q_proj"))
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(site.name).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    ids = torch.randint(0, 200, (2, 9))
    residual_stream(model, ids, layer=1)
    handle.remove()
    h = residual_stream(model, ids, layer=0)
    expected = h if site.gain is None else site.gain * h / (h.square().mean(-1, keepdim=True) + site.eps).sqrt()
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


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
