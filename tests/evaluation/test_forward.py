"""Beginnings that are read once: the same logits, fewer tokens; batches that waste little; the same plan every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from featcl.adapters import constrain
from featcl.evaluation import forward
from featcl.evaluation.forward import plan_groups, target_batches
from featcl.evaluation.scoring import Reply
from featcl.memory import NeuralMemory, attach_memory
from tests.adapters.conftest import build_directions
from tests.evaluation import toys


def sequences(count: int, *, shared: int, seed: int = 0, vocab: int = 64) -> list[Reply]:
    """Texts of different lengths that begin with the same tokens, three targets each, the last two neighbours."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, vocab, (shared,), generator=generator).tolist()
    made = []
    for _ in range(count):
        own = int(torch.randint(5, 12, (1,), generator=generator))
        ids = (*start, *torch.randint(3, vocab, (own,), generator=generator).tolist())
        mask = [False] * len(ids)
        mask[shared + 1] = mask[-2] = mask[-1] = True
        made.append(Reply(ids, tuple(mask)))
    return made


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens of every forward inside the block, padding included."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def alone(model: Any, sequence: Reply) -> torch.Tensor:
    places = [place for place, wanted in enumerate(sequence.loss_mask) if wanted]
    with torch.no_grad():
        logits = model(torch.tensor([sequence.input_ids])).logits[0]
    return logits[[place - 1 for place in places]]


def check(model: Any, texts: list[Reply], **options: Any) -> None:
    seen: set[int] = set()
    for batch in target_batches(model, texts, **options):
        for owner in batch.owner.unique().tolist():
            own = batch.owner == owner
            torch.testing.assert_close(batch.logits[own], alone(model, texts[owner]), rtol=0, atol=3e-5)
            assert batch.targets[own].tolist() == [
                id for id, wanted in zip(texts[owner].input_ids, texts[owner].loss_mask, strict=True) if wanted
            ]
            seen.add(owner)
    assert seen == set(range(len(texts)))


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_a_shared_beginning_is_read_once_and_changes_no_logit(family: str) -> None:
    """Gemma's window of eight tokens slides over the seam."""
    model = toys.model(family)
    texts = [*sequences(14, shared=60), *sequences(12, shared=40, seed=1), *sequences(5, shared=3, seed=2)]
    check(model, texts)
    check(model, texts, batch_tokens=40)
    with counted(model) as read:
        list(target_batches(model, texts))
    everything = sum(len(text.input_ids) for text in texts)
    assert sum(read) < 0.5 * everything
    assert 60 in read, "one beginning alone"
    assert 40 in read, "the other alone"


def test_without_long_beginnings_nothing_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: short beginnings are not worth a forward, and without sharing the long ones are read every time."""
    model = toys.model()
    short = sequences(14, shared=12)
    plans = [[p for p, wanted in enumerate(text.loss_mask) if wanted] for text in short]
    assert all(group.shared == 0 for group in plan_groups(short, plans, batch_tokens=4096, vocab=64))
    long = sequences(14, shared=60)
    monkeypatch.setattr(forward, "SHARED_TOKENS", 1000)
    with counted(model) as read:
        list(target_batches(model, long))
    assert sum(read) >= 14 * 60


def test_a_beginning_ends_before_the_first_target() -> None:
    """All of a text may be shared, its targets too: what predicts a target is read with it."""
    model = toys.model()
    text = sequences(1, shared=50)[0]
    texts = [Reply(text.input_ids, tuple(place >= 45 for place in range(len(text.input_ids)))) for _ in range(12)]
    (batch,) = target_batches(model, texts)
    assert len(batch.targets) == 12 * (len(text.input_ids) - 45)
    places = torch.arange(45, len(text.input_ids))
    with torch.no_grad():
        expected = model(torch.tensor([text.input_ids])).logits[0][places - 1]
    torch.testing.assert_close(batch.logits[: len(places)], expected, rtol=0, atol=3e-5)


def test_a_memory_reads_on_where_the_beginning_ended() -> None:
    """Its state travels with keys and values, also from the middle of a chunk."""
    model = toys.model()
    memory = attach_memory(model, NeuralMemory(32, heads=2, chunk_size=7), layer=0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    texts = sequences(14, shared=60)
    check(model, texts)
    written = [alone(model, text) for text in texts]
    memory.detach()
    assert max((alone(model, text) - before).abs().max() for text, before in zip(texts, written, strict=True)) > 0.01


def test_a_batch_ends_where_its_padding_costs_more_than_a_forward() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 200, (300,), generator=generator).tolist()
    texts = [Reply(tuple(range(3, 3 + n)), (False,) * (n - 1) + (True,)) for n in lengths]
    plans = [[n - 1] for n in lengths]
    groups = list(plan_groups(texts, plans, batch_tokens=4096, vocab=64))
    assert sorted(index for group in groups for index in group.members) == list(range(300))
    for group in (group for group in groups if not group.shared):
        widths = [plans[index][-1] for index in group.members]
        assert sum(max(widths) - width for width in widths) <= forward.FORWARD_TOKENS
        assert max(widths) * len(widths) <= 4096
    assert groups == list(plan_groups(texts, plans, batch_tokens=4096, vocab=64))


def test_folded_weights_score_as_the_adapter_does() -> None:
    """Scored with the sum of its weights: the adapter's own logits; switched off, the base model to the last bit."""
    model = toys.model()
    texts = sequences(6, shared=3)
    base = [batch.logits for batch in target_batches(model, texts)]
    adapter = constrain(model, build_directions(4, layer=1), kind="write")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    check(adapter.model, texts)
    now = [batch.logits for batch in target_batches(adapter.model, texts)]
    assert max((a - b).abs().max() for a, b in zip(now, base, strict=True)) > 0.01, "the adapter does something"
    with adapter.disabled():
        off = [batch.logits for batch in target_batches(adapter.model, texts)]
    assert all(torch.equal(a, b) for a, b in zip(off, base, strict=True))
