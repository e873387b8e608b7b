"""A memory while text is generated: the state goes where the cache goes, one token at a time, and nowhere else."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from featcl.adapters import constrain
from featcl.errors import FeatclError
from featcl.memory.carried import CarriedLayer, carried_in
from featcl.streams.rollouts import generate
from tests.adapters.conftest import build_directions, build_model
from tests.memory.attaching import (
    FAMILIES,
    FORMS,
    attached_to,
    logits,
    neural,
    open_,
    padded,
    positions,
    step_by_step,
    text,
)

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def greedy(model, ids, mask=None, *, new=8, **settings):
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | settings
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=new,
                          **settings)  # fmt: skip


def loud(family, form="gate", **memory):
    """The model of a memory that changes what the model says."""
    return open_(attached_to(family, form, **memory), scale=3.0).model


# --- with a cache as without -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_gives_the_logits_of_one_pass(family, form):
    attached = attached_to(family, form)
    rows = [text(length=length, seed=length)[0] for length in (20, 17, 11)]
    ids, mask = padded(rows)
    whole = model_logits = logits(attached.model, ids, mask, position_ids=positions(mask))
    stepped = step_by_step(attached.model, ids, mask, splits=(10,))
    torch.testing.assert_close(stepped[mask.bool()], whole[mask.bool()], **TOLERANCE)
    for row, found, real in zip(rows, model_logits, mask.bool(), strict=True):  # padding is neither read nor written
        torch.testing.assert_close(found[real], logits(attached.model, row[None])[0], **TOLERANCE)


@pytest.mark.parametrize(
    "settings", [{"conv": 3}, {"persistent": 3}, {"depth": 2, "chunk_size": 1}, {"chunk_size": 64}]
)
def test_cached_decoding_of_other_memories(settings):
    attached = attached_to("olmo2", **settings)
    ids, mask = padded([text(length=length, seed=length)[0] for length in (20, 13)])
    whole = logits(attached.model, ids, mask, position_ids=positions(mask))
    stepped = step_by_step(attached.model, ids, mask, splits=(3, 6))
    torch.testing.assert_close(stepped[mask.bool()], whole[mask.bool()], **TOLERANCE)


def test_the_memory_matters_for_the_comparisons_above(monkeypatch):
    """Negative control: with a memory that forgets everything between passes, cached decoding differs."""
    attached = attached_to("olmo2")
    whole = logits(attached.model, text(length=20))
    torch.testing.assert_close(step_by_step(attached.model, text(length=20)), whole, **TOLERANCE)
    begun = type(attached)._begun

    def forgetful(self, call):
        run = begun(self, call)
        run.start = type(run.start)()
        return run

    monkeypatch.setattr(type(attached), "_begun", forgetful)
    assert not torch.allclose(step_by_step(attached.model, text(length=20)), whole, **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gemma2", "gemma3_conditional", "llama"])
def test_generate_equals_generate_without_a_cache(family, form):
    model = loud(family, form)
    ids, mask = padded([text(length=length, seed=length)[0] for length in (9, 14)])
    found = greedy(model, ids, mask, new=12)
    assert torch.equal(found, greedy(model, ids, mask, new=12, use_cache=False))
    assert torch.equal(found, greedy(model, ids, mask, new=12, prefill_chunk_size=4))
    assert not torch.equal(found, greedy(build_model(family), ids, mask, new=12))


def test_the_state_advances_once_per_token():
    attached = attached_to("llama", chunk_size=64)
    cache = DynamicCache(config=attached.model.config)
    greedy(attached.model, text(length=9), new=6, past_key_values=cache)
    layer = carried_in(cache, attached._key)
    assert layer.tokens == cache.get_seq_length() == 9 + 5  # the last token drawn was not read by anyone
    assert layer.carried.state.count.tolist() == [14]
    assert attached.state is None


@pytest.mark.parametrize("form", FORMS)
def test_beam_search(form, monkeypatch):
    model = loud("olmo2", form)
    ids, mask = padded([text(length=length, seed=length)[0] for length in (9, 6)])
    beams = {"num_beams": 3, "num_return_sequences": 3, "new": 12, "return_dict_in_generate": True}
    beams["output_scores"] = True
    expected = greedy(model, ids, mask, use_cache=False, **beams)
    found = greedy(model, ids, mask, **beams)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, **TOLERANCE)
    # negative control: states that stay where they are when their beams move
    monkeypatch.setattr(CarriedLayer, "reorder_cache", lambda self, beam_idx: None)
    assert not torch.allclose(greedy(model, ids, mask, **beams).sequences_scores, expected.sequences_scores)


def test_several_sequences_per_prompt():
    model = attached_to("olmo3").model
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(greedy(model, text(2, 7), do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert torch.equal(*found)


def test_rows_are_selected_repeated_and_reset_with_the_cache():
    attached = attached_to("olmo2", "context")
    ids = text(3, 11)
    model, cache = attached.model, DynamicCache(config=attached.model.config)
    more = text(3, 4, seed=9)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for change, rows in (
            (lambda: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
            (lambda: cache.batch_repeat_interleave(2), [2, 2, 0, 0]),
            (lambda: cache.batch_select_indices(torch.tensor([False, True, True, False])), [2, 0]),
        ):
            change()
            new = more[torch.arange(len(rows)) % 3]
            whole = logits(model, torch.cat([ids[rows], new], dim=1))
            found = model(new, past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(found, whole[:, 11:], **TOLERANCE)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, logits(model, ids), **TOLERANCE)


def test_rollouts_of_several_prompts_are_those_of_each_alone():
    model = loud("gemma2")
    prompts = [text(length=length, seed=length)[0].tolist() for length in (5, 9, 7)]
    prompts = [prompts[0], prompts[1], prompts[0], prompts[2]]  # equal prompts are read once
    settings = {"max_new_tokens": 20, "temperature": 0.0}
    free = generate(model, prompts, **settings).token_ids
    stop = next(token for token in free[1] if token not in free[0])  # so that rows end at different times
    together = generate(model, prompts, stop_ids=[stop], **settings)
    alone = [generate(model, [prompt], stop_ids=[stop], **settings).token_ids[0] for prompt in prompts]
    assert together.token_ids == alone
    assert len({len(reply) for reply in alone}) > 1


@pytest.mark.parametrize("kind", ["both", "residual"])
def test_generation_beside_an_adapter(kind):
    adapter = constrain(build_model("gemma2"), build_directions(), kind=kind)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    attached = attached_to(model=adapter.model)
    ids = text(2, 9)
    found = greedy(adapter.model, ids)
    assert torch.equal(found, greedy(adapter.model, ids, use_cache=False))
    with adapter.disabled():
        assert torch.equal(greedy(adapter.model, ids), greedy(adapter.model, ids, use_cache=False))
    with adapter.disabled(), attached.disabled():
        assert torch.equal(greedy(adapter.model, ids), greedy(build_model("gemma2"), ids))


def test_several_memories_share_a_cache():
    model = build_model("olmo2")
    for layer, form in ((1, "gate"), (2, "layer"), (3, "context")):
        attached_to(model=model, layer=layer, form=form)
    whole = logits(model, text(2, 15))
    torch.testing.assert_close(step_by_step(model, text(2, 15), splits=(6,)), whole, **TOLERANCE)


# --- conversations that go on ----------------------------------------------------------------------------------------


def test_a_conversation_goes_on_with_its_cache():
    attached = attached_to("llama")
    ids, more = text(1, 8), text(1, 5, seed=4)
    cache = DynamicCache(config=attached.model.config)
    first = greedy(attached.model, ids, past_key_values=cache)
    second = greedy(attached.model, torch.cat([first, more], dim=1), past_key_values=cache)
    assert torch.equal(second, greedy(attached.model, torch.cat([first, more], dim=1), use_cache=False))


def test_a_cache_that_the_model_makes_itself_carries_the_state():
    attached = attached_to("gemma3")
    ids = text(2, 14)
    with torch.no_grad():
        cache = attached.model(ids[:, :9]).past_key_values
        found = attached.model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(found, logits(attached.model, ids)[:, 9:], **TOLERANCE)


def test_a_cache_that_takes_no_part_carries_nothing():
    """Gradient checkpointing keeps the cache away from the blocks."""
    attached = attached_to("olmo2")
    attached.model.train()
    attached.model.gradient_checkpointing_enable()
    cache = DynamicCache()
    attached.model(text(), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0
    assert len(cache.layers) == 0


def test_a_copied_cache_is_a_conversation_of_its_own():
    attached = attached_to("olmo2")
    ids, ends = text(1, 9), [text(1, 4, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        prompt = attached.model(ids).past_key_values
        found = [attached.model(end, past_key_values=copy.deepcopy(prompt)).logits for end in ends]
    for end, logit in zip(ends, found, strict=True):
        torch.testing.assert_close(logit, logits(attached.model, torch.cat([ids, end], 1))[:, 9:], **TOLERANCE)


def test_conversations_in_threads_do_not_meet():
    """What each thread decodes is what it decodes alone, bit for bit, though they share the memory."""
    attached = attached_to("olmo2")
    texts = [text(1, 24, seed=seed) for seed in range(3)]
    alone, met = [step_by_step(attached.model, ids) for ids in texts], threading.Barrier(len(texts))

    def together(_module, _inputs, _output):
        met.wait(timeout=30)  # every pass is at the block below the memory at the same time

    handle = attached.model.model.layers[0].register_forward_hook(together)
    with ThreadPoolExecutor(len(texts)) as pool:
        found = list(pool.map(lambda ids: step_by_step(attached.model, ids), texts))
    handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert not attached._passes


def test_interleaved_calls_do_not_meet():
    """Two conversations and a scoring pass between their tokens give what each gives alone, bit for bit."""
    attached = attached_to("olmo2")
    model, a, b = attached.model, text(1, 10, seed=1), text(1, 10, seed=2)
    alone = step_by_step(model, a)
    caches, found = [DynamicCache(config=model.config) for _ in range(2)], []
    with torch.no_grad():
        for place in range(10):
            found.append(model(a[:, place : place + 1], past_key_values=caches[0]).logits)
            model(b[:, place : place + 1], past_key_values=caches[1])
            logits(model, b)
    assert torch.equal(torch.cat(found, dim=1), alone)


# --- what cannot be right is refused ---------------------------------------------------------------------------------


def test_a_cache_that_the_memory_has_not_read_is_refused():
    attached = attached_to("olmo2")
    with attached.disabled(), torch.no_grad():
        cache = attached.model(text()).past_key_values
    with pytest.raises(FeatclError, match="holds 12 tokens, of which the memory has read 0"):
        attached.model(text(), past_key_values=cache)
    with torch.no_grad():
        cache = attached.model(text()).past_key_values
        with attached.disabled():
            attached.model(text(), past_key_values=cache)
    with pytest.raises(FeatclError, match="holds 24 tokens, of which the memory has read 12"):
        attached.model(text(), past_key_values=cache)


def test_tokens_cannot_be_taken_back():
    attached = attached_to("olmo2")
    with torch.no_grad():
        cache = attached.model(text()).past_key_values
    cache.crop(0)
    with pytest.raises(FeatclError, match="2 tokens cannot be taken back"):
        cache.crop(-2)
    with pytest.raises((FeatclError, ValueError), match=r"taken back|crop|roll"):
        greedy(attached.model, text(), prompt_lookup_num_tokens=3)
    with attached.disabled():
        greedy(attached.model, text(), prompt_lookup_num_tokens=3)


def test_a_static_cache_is_refused():
    with pytest.raises(FeatclError, match="static cache prepares its masks"):
        greedy(attached_to("gemma2").model, text(), cache_implementation="static")


@pytest.mark.parametrize("family", ["gemma3_conditional", "olmo2"])
def test_a_failed_pass_leaves_no_trace(family):
    attached = attached_to(family)
    attached.state = attached.memory(torch.randn(1, 9, 32))[1].detach()
    model, before = attached.model, attached.state
    expected = logits(model, text())
    with torch.no_grad():
        cache = model(text()).past_key_values
    kept = carried_in(cache, attached._key).carried

    def fail(*_):
        raise MemoryError("in a block above")

    block = next(module for name, module in model.named_modules() if name.endswith("layers.2"))
    handle = block.register_forward_hook(fail)
    with pytest.raises(MemoryError), attached.writing():
        model(text(), use_cache=False)
    with pytest.raises(MemoryError):
        model(text(seed=1), past_key_values=cache)
    handle.remove()
    assert attached.state is before
    assert not attached._passes
    assert carried_in(cache, attached._key).carried is kept
    assert torch.equal(logits(model, text()), expected)
    with pytest.raises(FeatclError, match="a pass that failed"):  # some blocks of the cache have gone on, others not
        model(text(), past_key_values=cache)


def test_another_memory_reads_nothing_of_this_ones_state():
    """A cache knows whose state it carries."""
    attached = attached_to("olmo2")
    with torch.no_grad():
        cache = attached.model(text()).past_key_values
    attached.detach()
    open_(attached_to(model=attached.model))
    with pytest.raises(FeatclError, match="of which the memory has read 0"):
        attached.model(text(), past_key_values=cache)
    assert neural().width == 32
