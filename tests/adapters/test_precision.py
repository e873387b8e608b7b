"""Dtypes, devices, compilation, checkpointing: the constraint holds, and says so where it cannot."""

from __future__ import annotations

import shutil

import pytest
import torch

from featcl.adapters import constrain
from featcl.adapters.checkpointing import checkpoint_
from featcl.adapters.trunk import resumed, run_trunk
from featcl.errors import FeatclError
from featcl.models import blocks

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def gradients(adapter, zoo):
    adapter.model.zero_grad()
    zoo.loss(adapter.model, *zoo.batch()).backward()
    return [parameter.grad.clone() for parameter in adapter.parameters()]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "llama"])
@pytest.mark.parametrize("rank", [None, 2])
def test_bases_and_coordinates_are_float32_whatever_the_models_dtype(zoo, family, dtype, rank):
    base = zoo.model(family).to(LOW[dtype])
    expected = logits(base, *zoo.batch())
    adapter = zoo.train(constrain(base, zoo.directions(), kind="both", rank=rank))
    for site in adapter.sites:
        assert all(factor.dtype == torch.float32 for factor in site.factors())
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    assert logits(adapter.model, *zoo.batch()).dtype == LOW[dtype]
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    with adapter.disabled():
        assert torch.equal(logits(adapter.model, *zoo.batch()), expected)


def test_control_a_basis_rounded_to_bfloat16_leaks_until_it_is_restored(zoo):
    adapter = zoo.train(constrain(zoo.model("llama"), zoo.directions(), kind="write"))
    adapter.model.to(torch.bfloat16)
    assert adapter.leak(*zoo.batch()).leak > 1e-4
    adapter.restore_()
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    assert adapter.sites[0].factor("lora_B").weight.dtype == torch.float32


def test_a_post_norm_cast_after_constraining_is_another_norm_and_the_leak_says_so(zoo):
    """The basis was folded with the float32 gain: choose the model's dtype first."""
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind="write"))
    adapter.model.to(torch.bfloat16)
    adapter.restore_()
    assert 1e-4 < adapter.leak(*zoo.batch()).leak < 1e-2


def test_merging_a_low_precision_model_rounds_once(zoo):
    adapter = zoo.train(constrain(zoo.model("olmo2").to(torch.bfloat16), zoo.directions(), kind="write"))
    merged, base = adapter.merge(), zoo.model("olmo2").to(torch.bfloat16)
    for site in adapter.sites:
        a, b = site.factors()
        exact = base.get_submodule(site.name).weight.float() + b @ a
        assert torch.equal(merged.get_submodule(site.name).weight, exact.to(torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(zoo, family, dtype):
    ids, mask = (tensor.cuda() for tensor in zoo.batch())
    base = zoo.model(family).to("cuda", dtype)
    expected = logits(base, ids, mask)
    adapter = constrain(base, zoo.directions(), kind="both")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        zoo.loss(adapter.model, ids, mask).backward()
        optimizer.step()
    assert min(adapter.delta_norms().values()) > 1e-3
    assert adapter.leak(ids, mask).leak <= 1e-6
    with adapter.disabled():
        assert torch.equal(logits(adapter.model, ids, mask), expected)
    state = run_trunk(adapter.model, ids, mask, layer=adapter.lowest_layer)
    full = logits(adapter.model, ids, mask)
    with resumed(adapter.model, state):
        assert torch.equal(logits(adapter.model, ids, mask), full)


# --- torch.compile


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiled_model_trains_as_the_eager_one(zoo, backend, rank):
    """First touched under no_grad, two backward passes before a step, and again after it: nothing is stale."""
    torch.compiler.reset()
    eager, traced = (constrain(zoo.model("olmo2"), zoo.directions(), kind="both", rank=rank) for _ in range(2))
    compiled = torch.compile(traced.model, backend=backend)
    for adapter, model in ((eager, eager.model), (traced, compiled)):
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        logits(model, *zoo.batch())
        for _ in range(3):
            optimizer.zero_grad()
            zoo.loss(model, *zoo.batch()).backward()
            zoo.loss(model, *zoo.batch(seed=1)).backward()
            optimizer.step()
    for mine, other in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)
    assert traced.delta_norm() > 1e-3
    torch.testing.assert_close(logits(compiled, *zoo.batch()), logits(traced.model, *zoo.batch()), atol=1e-5, rtol=0)
    with traced.disabled():
        base = logits(zoo.model("olmo2"), *zoo.batch())
        torch.testing.assert_close(logits(compiled, *zoo.batch()), base, atol=1e-5, rtol=0)
    assert traced.leak(*zoo.batch()).leak <= 1e-6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_eager_logits(zoo):
    torch.compiler.reset()
    adapter = zoo.train(constrain(zoo.model("gemma2"), zoo.directions(), kind="both"))
    compiled = torch.compile(adapter.model)
    torch.testing.assert_close(logits(compiled, *zoo.batch()), logits(adapter.model, *zoo.batch()), atol=1e-5, rtol=0)
    adapter.model.zero_grad()
    zoo.loss(compiled, *zoo.batch()).backward()
    traced = [parameter.grad.clone() for parameter in adapter.parameters()]
    for mine, other in zip(traced, gradients(adapter, zoo), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)


# --- gradient checkpointing


def recomputed(adapter):
    """How often each block's MLP ran in one forward and backward pass."""
    counts = dict.fromkeys(range(4), 0)

    def count(layer):
        counts[layer] += 1

    handles = [
        block.mlp.register_forward_hook(lambda *_, layer=layer: count(layer))
        for layer, block in enumerate(blocks(adapter.model))
    ]
    return counts, handles


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_checkpointing_recomputes_the_adapted_blocks_only_and_changes_no_gradient(zoo, use_reentrant, rank):
    adapter = zoo.train(constrain(zoo.model("gemma2"), zoo.directions(layer=3), layers=[2, 3], rank=rank))
    plain = gradients(adapter, zoo)
    adapter.model.train()
    checkpoint_(adapter.model, use_reentrant=use_reentrant)
    counts, handles = recomputed(adapter)
    for mine, other in zip(plain, gradients(adapter, zoo), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-5)
    for handle in handles:
        handle.remove()
    assert counts == {0: 1, 1: 1, 2: 2, 3: 2}
    seen = []
    blocks(adapter.model)[1].register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad))
    zoo.loss(adapter.model, *zoo.batch())
    assert seen == [False]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("first", ["constrain", "checkpoint"])
def test_transformers_own_switch_gives_the_same_gradients_but_recomputes_the_trunk(zoo, use_reentrant, first):
    reference = gradients(zoo.train(constrain(zoo.model("olmo2"), zoo.directions(layer=3), layers=[2, 3])), zoo)
    model = zoo.model("olmo2")
    if first == "checkpoint":
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    adapter = constrain(model, zoo.directions(layer=3), layers=[2, 3])
    if first == "constrain":
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    adapter.model.train()
    zoo.train(adapter)
    counts, _ = recomputed(adapter)
    for mine, other in zip(reference, gradients(adapter, zoo), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-3)
    assert counts == {0: 2, 1: 2, 2: 2, 3: 2}
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


def test_checkpointing_a_model_without_adapter_is_refused(zoo):
    with pytest.raises(FeatclError, match="no block is adapted"):
        checkpoint_(zoo.model("olmo2"))


# --- device maps


def test_a_model_with_a_device_map_is_constrained_trained_and_cached(zoo, tmp_path):
    from transformers import AutoModelForCausalLM

    zoo.model("gemma2").save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).requires_grad_(False).eval()
    adapter = zoo.train(constrain(mapped, zoo.directions(layer=3), layers=[2, 3]))
    plain = zoo.train(constrain(zoo.model("gemma2"), zoo.directions(layer=3), layers=[2, 3]))
    for mine, other in zip(adapter.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)
    ids, mask = zoo.batch()
    full = logits(adapter.model, ids, mask)
    with resumed(adapter.model, run_trunk(adapter.model, ids, mask, layer=2)):
        assert torch.equal(logits(adapter.model, ids, mask), full)


def test_hooks_of_accelerate_survive_a_resumed_trunk(zoo):
    from accelerate import dispatch_model

    model = zoo.model("gemma2")
    names = [name for name, _ in model.model.named_children() if name != "layers"]
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "cpu" for layer in range(4)}
    dispatched = dispatch_model(model, device_map=places, main_device="cpu", force_hooks=True)
    hooked = [vars(block).get("forward") for block in blocks(dispatched)]
    assert all(hooked)
    adapter = zoo.train(constrain(dispatched, zoo.directions(layer=3), layers=[2, 3]))
    ids, mask = zoo.batch()
    full = logits(adapter.model, ids, mask)
    with resumed(adapter.model, run_trunk(adapter.model, ids, mask, layer=2)):
        assert torch.equal(logits(adapter.model, ids, mask), full)
    assert [vars(block).get("forward") for block in blocks(dispatched)] == hooked
    assert adapter.leak(ids, mask).leak <= 1e-6


def test_offloaded_weights_are_refused_with_the_reason(zoo):
    from accelerate import cpu_offload

    model = cpu_offload(zoo.model("gemma2"), execution_device="cpu")
    with pytest.raises(FeatclError, match="is offloaded, so it cannot be adapted"):
        constrain(model, zoo.directions(), kind="both")
