"""Whose state is read and written: nothing is kept but on purpose, and nobody's reaches anybody else."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from featcl.errors import FeatclError
from featcl.memory import MemoryState
from tests.adapters.conftest import batch, loss_of
from tests.memory.attaching import attached_to, logits, neural, padded, text

# --- the rule --------------------------------------------------------------------------------------------------------


def wrote(attached, ids, mask=None):
    with attached.writing():
        logits(attached.model, ids, mask)
    return attached.state


def test_nothing_is_kept_without_writing():
    attached = attached_to("gemma2")
    first = logits(attached.model, text())
    logits(attached.model, text(seed=1))
    attached.model.generate(text(seed=2), max_new_tokens=4, attention_mask=torch.ones(1, 12))
    assert attached.state is None
    assert torch.equal(logits(attached.model, text()), first)
    wrote(attached, text(seed=1))
    heard = logits(attached.model, text())
    assert not torch.equal(heard, first)
    attached.model.generate(text(seed=2), max_new_tokens=4, attention_mask=torch.ones(1, 12))
    assert torch.equal(logits(attached.model, text()), heard)


def test_a_text_may_be_written_in_pieces():
    """Each piece is a call of its own, so the model attends within it only; the state is that of all of them."""
    attached = attached_to("llama", layer=0)  # block 0 reads embeddings, which depend on no other token
    ids = text(2, 23)
    whole = wrote(attached, ids)
    attached.state = None
    for piece in ids.split([7, 1, 10, 5], dim=1):
        wrote(attached, piece)
    for name, tensor in attached.state.tensors().items():
        torch.testing.assert_close(tensor, whole.tensors()[name])


def test_a_short_text_is_heard_once_it_is_settled():
    attached = attached_to("olmo2", chunk_size=64)
    fresh = logits(attached.model, text(seed=1))
    wrote(attached, text())
    assert torch.equal(logits(attached.model, text(seed=1)), fresh)  # shorter than a chunk: not read yet
    attached.settle()
    assert not torch.equal(logits(attached.model, text(seed=1)), fresh)


def test_padding_is_not_written():
    attached = attached_to("olmo3")
    rows = [text(length=length, seed=length)[0] for length in (11, 6)]
    together = wrote(attached, *padded(rows))
    for row, alone in enumerate(rows):
        attached.state = None
        for name, tensor in wrote(attached, alone[None]).tensors().items():
            torch.testing.assert_close(together.rows(row).tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    attached.state = None  # negative control: padding that is called text is written
    unmasked = wrote(attached, padded(rows)[0])
    assert not torch.allclose(unmasked.rows(1).weights[0], attached.memory.initial_state(1).weights[0])
    assert not torch.allclose(unmasked.rows(1).weights[0], together.rows(1).weights[0], rtol=1e-2)


def test_held_reads_and_does_not_write():
    attached = attached_to("olmo2")
    kept = wrote(attached, text())
    expected = logits(attached.model, text(seed=1))
    with attached.writing(), attached.held():
        assert torch.equal(logits(attached.model, text(seed=1)), expected)
    assert attached.state is kept


def test_restored_puts_the_states_back():
    attached = attached_to("olmo2")
    kept = wrote(attached, text())
    with attached.restored():
        wrote(attached, text(seed=1))
        with attached.user("anna"):
            wrote(attached, text(seed=2))
    assert attached.state is kept
    assert len(attached.users) == 0


def test_using_another_state_for_a_while():
    attached = attached_to("olmo2")
    fresh = logits(attached.model, text(seed=1))
    kept = wrote(attached, text())
    with attached.using(None):
        assert torch.equal(logits(attached.model, text(seed=1)), fresh)
        other = wrote(attached, text(seed=3))
    assert attached.state is kept
    assert not other.equal(kept)


def test_an_exception_takes_back_what_its_block_wrote():
    attached = attached_to("olmo2")
    kept = wrote(attached, text())

    def read_half(read):
        read(attached.model if read is logits else attached, text(seed=1))
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), attached.writing(), attached.user("anna"):
        read_half(logits)
    assert attached.state is kept
    assert "anna" not in attached.users
    with pytest.raises(RuntimeError, match="half way"), attached.user("anna"):
        read_half(wrote)  # ends its own writing(): what was written in full stays
    assert "anna" in attached.users


def test_generation_can_be_written():
    attached = attached_to("llama")
    ids, ones = text(), torch.ones(1, 12)
    with attached.writing():
        reply = attached.model.generate(ids, max_new_tokens=6, attention_mask=ones, do_sample=False, eos_token_id=None)
    generated, attached.state = attached.state, None
    expected = wrote(attached, reply[:, :-1])
    for name, tensor in generated.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name], rtol=1e-4, atol=1e-5)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_one_users_state_is_read_by_a_batch():
    attached = attached_to("gemma2")
    wrote(attached, text())
    ids = text(3, 9, seed=1)
    together = logits(attached.model, ids)
    for row in range(3):
        torch.testing.assert_close(together[row], logits(attached.model, ids[row : row + 1])[0])
    with pytest.raises(
        FeatclError, match="the kept state has 1 rows, the call has 3; only as many rows can be written"
    ):
        wrote(attached, ids)


def test_a_batch_of_independent_states():
    attached = attached_to("gemma2")
    texts, asks = text(3, 9, seed=1), text(3, 7, seed=2)
    states = wrote(attached, texts)
    assert states.batch == 3
    together = logits(attached.model, asks)
    for row in range(3):
        with attached.using(states.rows(row)):
            torch.testing.assert_close(together[row], logits(attached.model, asks[row : row + 1])[0])
    with pytest.raises(FeatclError, match="the kept state has 3 rows, the call has 2"):
        logits(attached.model, asks[:2])


# --- users -----------------------------------------------------------------------------------------------------------


def test_what_one_user_says_leaves_the_others_logits_bit_equal():
    attached = attached_to("gemma3_conditional", "context")
    nobody = logits(attached.model, text(seed=9))
    with attached.user("bob"):
        bob = [wrote(attached, text(seed=seed)) and logits(attached.model, text(seed=9)) for seed in (1, 2)]
    attached.users = type(attached.users)()
    found = []
    for seed in (1, 2):
        with attached.user("anna"):
            wrote(attached, text(seed=5 + seed))
        with attached.user("bob"):
            wrote(attached, text(seed=seed))
            with attached.user("anna"):
                wrote(attached, text(seed=7 + seed))
            found.append(logits(attached.model, text(seed=9)))
    assert all(torch.equal(a, b) for a, b in zip(found, bob, strict=True))
    assert attached.state is None
    assert torch.equal(logits(attached.model, text(seed=9)), nobody)
    with attached.user("anna"):  # negative control: hers is another
        assert not torch.equal(logits(attached.model, text(seed=9)), bob[1])


def test_a_user_within_the_same_user_goes_on():
    attached = attached_to("olmo2")
    with attached.user("anna"):
        wrote(attached, text())
        with attached.user("anna"):
            inner = wrote(attached, text(seed=1))
        assert attached.state.equal(inner)
    assert attached.users["anna"].equal(inner)


def test_a_user_can_be_forgotten():
    attached = attached_to("olmo2")
    with attached.user("anna"):
        wrote(attached, text())
    with attached.user("anna"):
        attached.state = None
    assert "anna" not in attached.users


def test_users_that_overlap_are_refused():
    attached = attached_to("olmo2")
    anna, bob = attached.user("anna"), attached.user("bob")
    anna.__enter__()
    bob.__enter__()
    with pytest.raises(FeatclError, match="the block of user 'anna' ends inside that of 'bob'"):
        anna.__exit__(None, None, None)


def test_a_cache_belongs_to_its_user():
    attached = attached_to("olmo2")
    cache = DynamicCache(config=attached.model.config)
    with attached.user("anna"):
        logits(attached.model, text(), past_key_values=cache, use_cache=True)
    with pytest.raises(FeatclError, match="begun for user 'anna', now it is nobody"):
        logits(attached.model, text(), past_key_values=cache, use_cache=True)
    with attached.user("bob"), pytest.raises(FeatclError, match="begun for user 'anna', now it is user 'bob'"):
        logits(attached.model, text(), past_key_values=cache, use_cache=True)
    with attached.user("anna"):
        logits(attached.model, text(), past_key_values=cache, use_cache=True)


def test_a_conversation_is_written_turn_by_turn():
    attached = attached_to("olmo2")
    whole = wrote(attached, torch.cat([text(), text(seed=1)], dim=1))
    attached.state, cache = None, DynamicCache(config=attached.model.config)
    for seed in (0, 1):
        with attached.user("anna"), attached.writing():
            logits(attached.model, text(seed=seed), past_key_values=cache, use_cache=True)
    for name, tensor in attached.users["anna"].tensors().items():
        torch.testing.assert_close(tensor, whole.tensors()[name], rtol=1e-4, atol=1e-5)


# --- what writing refuses --------------------------------------------------------------------------------------------


def test_writing_does_not_lose_what_another_cache_wrote():
    attached = attached_to("olmo2")
    caches = [DynamicCache(config=attached.model.config) for _ in range(2)]
    with attached.writing():
        for cache in caches:
            logits(attached.model, text(), past_key_values=cache, use_cache=True)
        with pytest.raises(FeatclError, match="not the one that this cache stands at"):
            logits(attached.model, text(), past_key_values=caches[0], use_cache=True)
        logits(attached.model, text(), past_key_values=caches[1], use_cache=True)


def test_writing_refuses_to_write_a_text_once_per_token():
    attached = attached_to("olmo2")
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(1, 12), "eos_token_id": None}
    with pytest.raises(FeatclError, match="write it once per token"), attached.writing():
        attached.model.generate(text(), use_cache=False, **settings)
    assert attached.state is None
    with attached.writing():
        logits(attached.model, text(length=12))
        logits(attached.model, text(length=13, seed=1))  # another text may be a token longer


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}])
def test_writing_refuses_to_decode_several_rows(more):
    attached = attached_to("olmo2")
    ids = text(1 if more else 2)
    with pytest.raises(FeatclError, match="2 rows are decoded inside writing"), attached.writing():
        attached.model.generate(ids, max_new_tokens=4, attention_mask=torch.ones_like(ids), **more)
    assert attached.state is None


def test_bad_states_are_refused():
    attached = attached_to("olmo2")
    for other in (neural(depth=2), neural(heads=4), neural(chunk_size=8), neural(momentum=False), neural().double()):
        with pytest.raises(FeatclError, match=r"memory: (the state's|a state of another memory)"):
            attached.state = other.initial_state(1).detach()
    with pytest.raises(FeatclError, match="a MemoryState or None, not Tensor"):
        attached.state = torch.zeros(3)
    attached.users["anna"] = neural(depth=2).initial_state(1)
    with pytest.raises(FeatclError, match="a state of another memory"), attached.user("anna"):
        pass
    attached.state = neural(seed=9).initial_state(1).detach()
    assert isinstance(attached.state, MemoryState)


def test_a_damaged_state_is_refused():
    attached = attached_to("olmo2")
    before = wrote(attached, text())
    for name in ("weights.0", "momentum.0", "keys"):
        tensors = before.tensors()
        tensors[name].view(-1)[-1] = torch.nan
        damaged = MemoryState.from_tensors(tensors)
        with pytest.raises(FeatclError, match=f"the state's {name} holds NaN"):
            attached.state = damaged
        with pytest.raises(FeatclError, match=f"the state's {name} holds NaN"):
            attached.load_state_({f"kept/{key}": tensor for key, tensor in tensors.items()})
        with pytest.raises(FeatclError, match=f"the state's {name} holds NaN"):
            attached.memory(torch.randn(1, 3, 32), damaged)
    assert attached.state is before


def test_a_name_that_is_none_leaves_everything_as_it_was():
    attached = attached_to("olmo2")
    kept = wrote(attached, text())
    with pytest.raises(FeatclError, match="a user is a string, not 3"), attached.user(3):
        wrote(attached, text(seed=1))
    assert attached.state is kept
    assert attached._user is None


def test_a_detached_memory_does_not_pretend_to_write():
    attached = attached_to("olmo2")
    attached.detach()
    with pytest.raises(FeatclError, match="it is detached, so it reads and writes nothing"), attached.writing():
        logits(attached.model, text())


# --- gradients, versions, surprise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gate", "context", "layer"])
def test_gradients_flow_from_one_pass_to_the_next_inside_writing(form):
    attached = attached_to("olmo2", form)
    ids, mask = batch()
    with attached.writing():
        attached.model(ids, attention_mask=mask, use_cache=False)
        state = attached.state
        state.weights[0].retain_grad()
        loss_of(attached.model, ids, mask).backward()
        assert float(state.weights[0].grad.norm()) > 0
    assert not attached.state.weights[0].requires_grad
    loss_of(attached.model, ids, mask).backward()  # the graph of before is not asked for
    assert all(parameter.grad is not None for parameter in attached.branch.memory.parameters() if parameter.numel())


def test_versions_restore_slow_weights_and_states():
    attached = attached_to("gemma2")
    wrote(attached, text())
    with attached.user("anna"):
        wrote(attached, text(seed=1))
    weights, states = attached.tensors(), attached.state_tensors()
    heard = logits(attached.model, text(seed=2))
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.1)
    wrote(attached, text(seed=3))
    attached.users["bob"] = attached.state
    assert not torch.equal(logits(attached.model, text(seed=2)), heard)
    attached.load_tensors_(weights)
    attached.load_state_(states)
    assert torch.equal(logits(attached.model, text(seed=2)), heard)
    assert list(attached.users) == ["anna"]
    assert attached.state_tensors().keys() == states.keys()
    attached.load_state_({})
    assert attached.state is None
    with pytest.raises(FeatclError, match="the tensors lack gate"):
        attached.load_tensors_({name: tensor for name, tensor in weights.items() if name != "gate"})
    with pytest.raises(FeatclError, match="hold the unknown"):
        attached.load_tensors_(weights | {"memory.other": torch.zeros(1)})
    with pytest.raises(FeatclError, match=r"gate is \[3\], here it is \[32\]"):
        attached.load_tensors_(weights | {"gate": torch.zeros(3)})
    with pytest.raises(FeatclError, match="'elsewhere' is no state"):
        attached.load_state_({f"elsewhere/{k.removeprefix('kept/')}": t for k, t in states.items() if "kept" in k})


def test_states_written_under_inference_mode_can_be_trained_on():
    attached = attached_to("olmo2")
    with torch.inference_mode(), attached.user("anna"):
        wrote(attached, text())
    with attached.writing(), torch.inference_mode():
        attached.model(text())
    loss_of(attached.model, *batch()).backward()
    with attached.user("anna"):
        loss_of(attached.model, *batch()).backward()


def test_surprise_falls_with_what_was_read():
    """The inner loss of a text is lower once it has been read; that of another text falls less."""
    attached = attached_to("olmo2", max_step=0.3)
    ids, mask = padded([text(length=16)[0], text(length=12, seed=1)[0]])
    before = attached.surprise(ids, mask)
    assert attached.state is None
    torch.testing.assert_close(before[1], attached.surprise(ids[1:, 4:])[0], rtol=1e-4, atol=1e-5)
    with attached.writing():
        for _ in range(4):
            logits(attached.model, ids[:1])
        kept = attached.state
        after = attached.surprise(ids, mask)
        assert attached.state is kept
    assert float(after[0] / before[0]) < 0.8 * float(after[1] / before[1])
    with attached.disabled(), pytest.raises(FeatclError, match="switched off"):
        attached.surprise(ids, mask)
    for nothing in ((ids, torch.zeros_like(mask)), (ids[:, :0],)):
        with pytest.raises(FeatclError, match="a row without tokens"):
            attached.surprise(*nothing)
    with pytest.raises(FeatclError, match=r"of input_ids \[batch, seq\], not of \[16\]"):
        attached.surprise(ids[0])
    assert torch.equal(attached.surprise(ids, mask), after)
