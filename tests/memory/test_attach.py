"""A memory on a frozen model: nothing while untrained, then exactly what its form says, beside whatever else is on."""

from __future__ import annotations

import copy

import pytest
import torch
from einops import rearrange

from featcl.adapters import constrain, resumed, run_trunk
from featcl.adapters.checkpointing import checkpoint_
from featcl.adapters.trunk import TrunkCache, trunk_end
from featcl.errors import FeatclError
from featcl.memory import NeuralMemory
from featcl.memory.attach import attach_memory, memories_of
from featcl.memory.context import ContextRead
from featcl.models import model_digest, residual_stream
from featcl.objectives.scoring import Scorer, TokenBatch
from tests.adapters.conftest import N_LAYERS, batch, build_directions, build_model, loss_of, train
from tests.memory.attaching import FAMILIES, FORMS, LAYER, attached_to, logits, neural, open_, text

# --- the zero start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_memory_changes_no_bit(family, form):
    ids, mask = batch()
    base = logits(build_model(family), ids, mask)
    attached = attached_to(family, form, shut=True)
    assert torch.equal(logits(attached.model, ids, mask), base)
    assert not torch.equal(logits(open_(attached).model, ids, mask), base)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_an_untrained_memory_changes_no_bit_in_any_dtype_and_attention(family, form, dtype, attention):
    ids, mask = batch()
    model = build_model(family).to(dtype)
    model.set_attn_implementation(attention)
    base = logits(model, ids, mask)
    attached = attached_to(model=model, form=form, shut=True)
    found = logits(model, ids, mask)
    assert found.dtype == dtype
    assert torch.equal(found, base)
    assert all(parameter.dtype == torch.float32 for parameter in attached.parameters())
    assert not torch.equal(logits(open_(attached).model, ids, mask), base)


def test_generation_with_an_untrained_memory_is_the_bases():
    ids, mask = batch()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    base = build_model("gemma3").generate(ids, output_logits=True, return_dict_in_generate=True, **settings)
    model = attached_to("gemma3", "context", shut=True).model
    found = model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)
    assert torch.equal(found.sequences, base.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, base.logits, strict=True))


# --- the forms -----------------------------------------------------------------------------------------------------


def inputs_of(model, ids, layer):
    return residual_stream(model, ids, layer=layer - 1)


@torch.no_grad()
def test_gate_is_a_branch_beside_the_block():
    ids = text(2)
    attached = attached_to("olmo2", "gate")
    with attached.disabled():
        before, after = (residual_stream(attached.model, ids, layer=layer) for layer in (LAYER - 1, LAYER))
    rms = (before.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    said, _ = attached.memory(before / rms)
    expected = after + rms * attached.branch.gate * said
    torch.testing.assert_close(residual_stream(attached.model, ids, layer=LAYER), expected)
    assert float((expected - after).norm()) > 0.01 * float(after.norm())


@torch.no_grad()
def test_layer_stands_before_the_block():
    ids = text(2)
    attached = attached_to("gemma2", "layer")
    seen = []
    with attached.disabled():
        before = residual_stream(attached.model, ids, layer=LAYER - 1)
    handle = attached.model.model.layers[LAYER].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    logits(attached.model, ids)
    handle.remove()
    rms = (before.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    said, _ = attached.memory(before / rms)
    torch.testing.assert_close(seen[0], before + rms * attached.branch.gate * said)


def attention_by_hand(read, x, retrieved, real):
    """softmax over all pairs of tokens at most window - 1 apart, row by row."""
    q, k, v = (rearrange(y @ w.T, "n (h d) -> h n d", h=read.heads)
               for y, w in ((x, read.query), (retrieved, read.key), (retrieved, read.value)))  # fmt: skip
    back = torch.arange(len(x))[:, None] - torch.arange(len(x))
    allowed = (back >= 0) & (back < read.window) & real[None, :]
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return rearrange(scores.softmax(-1) @ v, "h n d -> n (h d)") @ read.out.T


@torch.no_grad()
@pytest.mark.parametrize("splits", [(23,), (1,) * 23, (5, 1, 12, 5), (2, 21)])
@pytest.mark.parametrize("window", [1, 4, 7, 40])
def test_the_read_of_context_is_windowed_attention_in_any_split(window, splits):
    generator = torch.Generator().manual_seed(0)
    read = ContextRead(12, heads=3, window=window, seed=1).double()
    x, retrieved = torch.randn(2, 2, 23, 12, generator=generator, dtype=torch.double)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[1, :6] = False
    found, past, place = [], None, 0
    for length in splits:
        piece = slice(place, place + length)
        out, past = read(x[:, piece], retrieved[:, piece], past, mask=mask[:, piece])
        assert past.real.shape[1] == min(window - 1, place + length)
        found.append(out)
        place += length
    for row in range(2):
        real = mask[row]
        expected = attention_by_hand(read, x[row, real], retrieved[row, real], torch.ones(int(real.sum())).bool())
        torch.testing.assert_close(torch.cat(found, dim=1)[row, real], expected)
    if window > 1:  # negative control: without the mask the padded row reads its padding
        unmasked, _ = read(x, retrieved)
        assert not torch.allclose(unmasked[1, 6:], torch.cat(found, dim=1)[1, 6:])


def test_who_listens_to_the_block_hears_the_memory():
    attached = attached_to("llama", "gate", shut=True)
    hidden = attached.model(text(), output_hidden_states=True).hidden_states[LAYER + 1]  # installs hooks that stay
    attached.detach()
    again = attached_to(model=attached.model)
    heard = again.model(text(), output_hidden_states=True).hidden_states[LAYER + 1]
    assert torch.equal(heard, residual_stream(again.model, text(), layer=LAYER))
    assert not torch.equal(heard, hidden)


# --- on and off ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_disabled_and_detached_are_the_base(form):
    ids, mask = batch()
    model = build_model("gemma3_conditional")
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    names, digest, base = list(model.state_dict()), model_digest(model), logits(model, ids, mask)
    attached = attached_to(model=model, form=form)
    heard = logits(model, ids, mask)
    with attached.disabled(), attached.disabled():
        assert torch.equal(logits(model, ids, mask), base)
    assert torch.equal(logits(model, ids, mask), heard)
    assert not torch.equal(heard, base)
    assert list(model.state_dict()) == names
    assert attached.detach() is model
    assert torch.equal(logits(model, ids, mask), base)
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert model_digest(model) == digest
    assert memories_of(model) == []
    attached_to(model=model, form=form).detach()


def test_several_memories_on_one_model():
    ids, mask = batch()
    model = build_model("olmo3")
    base = logits(model, ids, mask)
    low, high = attached_to(model=model, layer=1), attached_to(model=model, layer=3, form="layer", depth=2)
    assert memories_of(model) == [low, high]
    both = logits(model, ids, mask)
    with low.disabled():
        alone = logits(model, ids, mask)
    with low.disabled(), high.disabled():
        assert torch.equal(logits(model, ids, mask), base)
    low.detach()
    assert torch.equal(logits(model, ids, mask), alone)
    assert not torch.equal(both, alone)
    with pytest.raises(FeatclError, match="block 3 has a memory already"):
        attach_memory(model, neural(), layer=3)


def test_a_copy_of_the_model_has_a_memory_of_its_own():
    attached = attached_to("llama")
    with attached.writing():
        logits(attached.model, text())
    twin = copy.deepcopy(attached.model)
    heard = logits(attached.model, text(seed=1))
    attached.state = None
    with torch.no_grad():
        attached.branch.gate.zero_()
    assert torch.equal(logits(twin, text(seed=1)), heard)
    [other] = memories_of(twin)
    other.detach()
    assert torch.equal(logits(twin, text(seed=1)), logits(build_model("llama"), text(seed=1)))


# --- beside adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["adapter", "memory"])
@pytest.mark.parametrize("kind", ["both", "residual", "shift"])
def test_a_memory_and_an_adapter_can_each_be_off(kind, first):
    ids, mask = batch()
    model = build_model("gemma2")
    base = logits(model, ids, mask)
    if first == "memory":
        attached = attached_to(model=model, layer=2)
        adapter = train(constrain(model, build_directions(), kind=kind), steps=3)
    else:
        adapter = train(constrain(model, build_directions(), kind=kind), steps=3)
        attached = attached_to(model=adapter.model, layer=2)
    both = logits(adapter.model, ids, mask)
    assert adapter.leak(ids, mask).leak <= 1e-6
    with adapter.disabled():
        memory_alone = logits(adapter.model, ids, mask)
        with attached.disabled():
            assert torch.equal(logits(adapter.model, ids, mask), base)
    with attached.disabled():
        adapter_alone = logits(adapter.model, ids, mask)
    attached.detach()
    assert torch.equal(logits(adapter.model, ids, mask), adapter_alone)
    adapter.remove()
    assert torch.equal(logits(open_(attached_to(model=model, layer=2)).model, ids, mask), memory_alone)
    for one, other in ((both, memory_alone), (both, adapter_alone), (memory_alone, base), (adapter_alone, base)):
        assert not torch.equal(one, other)


def test_the_order_of_attachment_does_not_matter():
    found = []
    for first in ("memory", "adapter"):
        model = build_model("llama")
        if first == "memory":
            attached_to(model=model, layer=2)
        adapter = constrain(model, build_directions(), kind="residual")
        if first == "adapter":
            attached_to(model=model, layer=2)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
        found.append(logits(model, *batch()))
    assert torch.equal(*found)


def test_the_frozen_trunk_ends_at_the_memory():
    ids, _ = batch()
    model = build_model("olmo2")
    adapter = train(constrain(model, build_directions(layer=3), kind="residual"), steps=3)
    assert trunk_end(model) == 3
    attached = attached_to(model=model, layer=1)
    assert trunk_end(model) == 1
    with torch.no_grad():
        full, cache = logits(model, ids), TrunkCache(model)
        for _ in range(2):
            with cache.over(ids, ids):
                assert torch.equal(logits(model, ids), full)
        tokens = TokenBatch(ids, torch.arange(4), torch.zeros(4, dtype=torch.long))
        scorer = Scorer(model)
        with scorer.trunks_kept():
            assert torch.equal(scorer.hidden(tokens), scorer.hidden(tokens))
        with attached.disabled():
            skipping = run_trunk(model, ids, layer=adapter.lowest_layer)
        with resumed(model, skipping), pytest.raises(FeatclError, match="end the trunk at block 1"):
            logits(model, ids)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(form, reentrant):
    found = []
    for checkpointing in (False, True):
        attached = attached_to("gemma2", form)
        attached.model.train()
        if checkpointing:
            checkpoint_(attached.model, use_reentrant=reentrant)
        loss_of(attached.model, *batch()).backward()
        found.append([parameter.grad for parameter in attached.parameters()])
    assert any(bool(gradient.any()) for gradient in found[0])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_only_the_memory_is_trained_and_it_learns():
    attached = attached_to("olmo2", shut=True)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2)
    first = float(loss_of(attached.model, *batch()).detach())
    for _ in range(15):
        optimizer.zero_grad()
        loss_of(attached.model, *batch()).backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in attached.model.parameters())
    assert float(loss_of(attached.model, *batch()).detach()) < first - 0.05
    assert len({id(parameter) for parameter in attached.parameters()}) == len(attached.tensors())


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": N_LAYERS}, "layer 4 is out of range, the model has blocks 0 to 3"),
        ({"layer": -1}, "layer -1 is out of range"),
        ({"layer": True}, "layer True is out of range"),
        ({"form": "side"}, "unknown form 'side'; choose from gate, context, layer"),
        ({"memory": 16}, "its width is 16, but the model's residual stream has 32"),
        ({"memory": torch.nn.Linear(32, 32)}, "a Linear is no memory"),
        ({"model": torch.nn.Linear(3, 3)}, "Linear is no Hugging Face language model"),
        ({"window": 0, "form": "context"}, "a window of 0 tokens"),
        ({"window": 2.5, "form": "context"}, "a window of 2.5 tokens"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_hooked(change, message):
    model = build_model("llama")
    given = {"model": model, "memory": 32, "layer": 1} | change
    memory = given.pop("memory")
    memory = NeuralMemory(memory, heads=2) if isinstance(memory, int) else memory
    with pytest.raises(FeatclError, match=message):
        attach_memory(given.pop("model"), memory, **given)
    assert memories_of(model) == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_is_no_decoder_is_refused():
    from transformers import BertConfig, BertModel

    tiny = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    with pytest.raises(FeatclError, match="unknown architecture 'bert'"):
        attach_memory(BertModel(tiny), neural(), layer=0)


def test_masks_that_do_not_tell_padding_are_refused():
    model = attached_to("llama").model
    ids, mask = batch()
    with pytest.raises(FeatclError, match="the attention mask is 4-D"):
        logits(model, ids, torch.zeros(3, 1, 12, 12))
    with pytest.raises(FeatclError, match="other values than 0 and 1"):
        logits(model, ids, mask * 2)
    with pytest.raises(FeatclError, match=r"an attention mask of shape \[2, 12\] for 3 rows"):
        logits(model, ids, mask[:2])
    with pytest.raises(FeatclError, match="with cu_seq_lens_q a row holds several conversations"):
        logits(model, ids, cu_seq_lens_q=torch.tensor([0, 12]))
    assert torch.equal(logits(model, ids, mask.bool()), logits(model, ids, mask))


def test_a_block_called_alone_is_refused():
    attached = attached_to("llama")
    model = attached.model
    positions = model.model.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
    with pytest.raises(FeatclError, match="outside a forward pass of the model"):
        model.model.layers[LAYER](torch.randn(1, 3, 32), position_embeddings=positions)
