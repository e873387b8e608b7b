"""The bridge computes what the model computes, adapted or not, and the model stays what it was."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import featcl
from featcl.errors import FeatclError
from featcl.features import bridge as bridge_module
from featcl.features import hooks
from featcl.features.activations import capture
from featcl.features.tokens import token_batches
from featcl.models import residual_stream
from tests.adapters.conftest import build_directions, build_model, train
from tests.conftest import tiny_tokenizer

pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")

FAMILIES = ("gemma2", "gemma3", "olmo", "olmo2", "olmo3")
OTHERS = ("gemma", "gemma3_conditional", "llama", "qwen3")
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_hook_activations_equal_the_bridges(family):
    """Our own capture against `blocks.L.hook_resid_post` and the other two sites.

    The bridge runs eager attention. With the same kernel both agree to the last bit; with the model's usual one to
    rounding, 1e-5 on streams of size about 1 (these go up to 16).
    """
    model = build_model(family)
    bridge = featcl.as_bridge(model)
    _, cache = bridge.run_with_cache(IDS)
    usual = residual_stream(model, IDS, layer=3)
    assert (usual - cache["blocks.3.hook_resid_post"]).abs().max() <= 1e-5 * max(1.0, float(usual.abs().max()))
    model.set_attn_implementation("eager")
    [batch] = token_batches(IDS.tolist(), tiny_tokenizer())
    names = [f"blocks.{layer}.{point}" for layer in range(4) for point in
             ("hook_resid_post", "hook_mlp_out", "attn.hook_z")]  # fmt: skip
    found = capture(model, batch, hooks=[hooks.resolve(model, name) for name in names])
    for name, rows in zip(names, found, strict=True):
        expected = cache[name].flatten(0, 1).flatten(1)  # heads side by side
        assert (rows - expected).abs().max() <= 1e-5, name
    other = capture(model, batch, hooks=[hooks.resolve(model, "blocks.1.hook_resid_post")])[0]
    assert (other - cache["blocks.2.hook_resid_post"].flatten(0, 1)).abs().max() > 1e-2  # control: another layer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_what_it_was(family):
    model = build_model(family)
    keys, before = list(model.state_dict()), logits(model)
    config = model.config.to_dict()
    implementation = model.config._attn_implementation
    bridge = featcl.as_bridge(model)
    assert (bridge(IDS) - before).abs().max() <= 1e-5
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    shared = {t.data_ptr() for t in model.parameters()} & {t.data_ptr() for t in bridge.original_model.parameters()}
    assert not shared
    assert not any("original_component" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(("kind", "rank"), [("both", None), ("write", 2), ("none", None)])
@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_an_adapters_update_comes_along(family, kind, rank):
    base = logits(build_model(family))
    adapter = train(featcl.constrain(build_model(family), build_directions(), kind=kind, rank=rank), steps=3)
    adapted, keys = logits(adapter.model), list(adapter.model.state_dict())
    for given in (adapter, adapter.model, adapter.model.get_base_model()):
        found = featcl.as_bridge(given)(IDS)
        assert (found - adapted).abs().max() <= 1e-5
        assert (found - base).abs().max() > 1e-3  # control: not the base model
    with adapter.disabled():
        assert (featcl.as_bridge(adapter)(IDS) - base).abs().max() <= 1e-5
    assert list(adapter.model.state_dict()) == keys
    assert torch.equal(logits(adapter.model), adapted)
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_an_adapter_that_acts_by_hooks_comes_along_or_is_refused(monkeypatch):
    """A shift written by a forward hook of a block is still there; one that does not survive is an error."""
    model = build_model("olmo2")
    shift = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    handle = model.model.layers[1].register_forward_hook(lambda _m, _i, out: out + shift)
    assert (featcl.as_bridge(model)(IDS) - logits(model)).abs().max() <= 1e-5
    handle.remove()
    # control: an update that the copy does not carry (here: whatever is copied is the base model) is noticed
    monkeypatch.setattr(bridge_module, "_merged_copy", lambda _model: build_model("olmo2"))
    model.model.layers[1].register_forward_hook(lambda _m, _i, out: out + shift)
    with pytest.raises(FeatclError, match="the bridge does not give the model's logits"):
        featcl.as_bridge(model)


def test_the_tokenizer_is_a_copy_that_puts_bos():
    model, tokenizer = _byte_model()
    bridge = featcl.as_bridge(model, tokenizer)
    assert bridge.to_tokens("ab").tolist() == [[256, *tokenizer("ab").input_ids]]
    assert bridge.to_string(bridge.to_tokens("ab")[0, 1:]) == "ab"
    assert bridge.tokenizer is not tokenizer
    assert list(tokenizer("a").input_ids) != [256, *tokenizer("a").input_ids]
    assert bridge.generate("ab", max_new_tokens=2, verbose=False, do_sample=False)


def test_logit_lens_and_activation_patching():
    """The lens at the last layer is the model's prediction; patching the clean stream in restores it."""
    model, tokenizer = _byte_model()
    bridge = featcl.as_bridge(model, tokenizer)
    clean, corrupted = bridge.to_tokens("The cat sat on"), bridge.to_tokens("The dog sat on")
    clean_logits, cache = bridge.run_with_cache(clean)
    corrupted_logits = bridge(corrupted)

    lens = [bridge.unembed(bridge.ln_final(cache[f"blocks.{layer}.hook_resid_post"])) for layer in range(3)]
    cap = model.config.final_logit_softcapping
    lens = [cap * torch.tanh(scores / cap) for scores in lens]  # Gemma-2's own last step
    assert torch.allclose(lens[-1], clean_logits, atol=1e-4)
    assert not torch.allclose(lens[0], clean_logits, atol=1e-1)  # control: earlier layers say something else

    def patched(layer: int, positions: slice) -> torch.Tensor:
        def put(value: torch.Tensor, hook: Any) -> torch.Tensor:
            changed = value.clone()
            changed[:, positions] = cache[hook.name][:, positions]
            return changed

        return bridge.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", put)])

    answer = int(clean_logits[0, -1].argmax())
    gap = clean_logits[0, -1, answer] - corrupted_logits[0, -1, answer]
    recovered = [
        float((patched(layer, slice(None))[0, -1, answer] - corrupted_logits[0, -1, answer]) / gap)
        for layer in range(3)
    ]
    assert recovered == pytest.approx([1, 1, 1], abs=1e-3)
    # the last position after the last block decides; the changed word's positions there do not reach it any more
    assert torch.allclose(patched(2, slice(-1, None))[0, -1], clean_logits[0, -1], atol=1e-4)
    assert torch.allclose(patched(2, slice(5, 8))[0, -1], corrupted_logits[0, -1], atol=1e-4)
    assert not torch.allclose(patched(0, slice(5, 8))[0, -1], corrupted_logits[0, -1], atol=1e-3)


def test_unknown_architecture_and_missing_library(monkeypatch):
    class StrangeForCausalLM(type(build_model("llama"))):
        pass

    model = build_model("llama")
    model.__class__ = StrangeForCausalLM
    with pytest.raises(FeatclError, match="no bridge for StrangeForCausalLM"):
        featcl.as_bridge(model)
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(FeatclError, match="transformer_lens, which is not installed: pip install transformer-lens"):
        featcl.as_bridge(model)


def _byte_model() -> tuple[Any, Any]:
    from tests.conftest import tiny_model

    return tiny_model("gemma2"), tiny_tokenizer("gemma2")
