"""The training corpus is the same every time, and the training loop trains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch

from featcl.files import digest_json
from featcl.lab import training
from featcl.lab.corpus import SKILL_WEIGHTS, conversations, texts
from featcl.lab.skills import SKILLS
from featcl.lab.tokenizer import train_tokenizer
from featcl.lab.training import CONTEXT_WEIGHT, Schedule, batches, gain_spread, new_model, train_, weighted_loss
from featcl.streams.chat import Chat

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@cache
def chat(family: str = "olmo2") -> Chat:
    return Chat(train_tokenizer(family, texts(0, 1000)))


@pytest.fixture(params=["olmo2", "gemma2"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(training, "SHAPE", SMALL)
    return request.param


# --- corpus -----------------------------------------------------------------------------------------------------------


def test_the_corpus_is_seeded() -> None:
    one, two, other = (digest_json(list(islice(conversations(seed), 500))) for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert texts(1, 20) == texts(1, 40)[:20]


def test_drawing_from_one_corpus_does_not_move_another() -> None:
    one, alone = conversations(1), conversations(1)
    mixed = []
    for _ in range(50):
        mixed.append(next(one))
        random.random()
        next(conversations(9))
    assert mixed == list(islice(alone, 50))


def test_every_skill_is_practised() -> None:
    assert set(SKILL_WEIGHTS) == set(SKILLS)
    assert min(SKILL_WEIGHTS.values()) > 0


def test_conversations_can_be_encoded_by_both_families() -> None:
    for made in islice(conversations(3), 200):
        for name in ("olmo2", "gemma2"):
            encoded = chat(name).encode(made)
            assert any(encoded.loss_mask)
            assert len(encoded) <= 512


# --- schedule and batches ---------------------------------------------------------------------------------------------


def test_schedule_rises_then_falls_to_zero() -> None:
    schedule = Schedule(steps=100)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 5)
    assert max(factors) == factors[4] == factors[5] == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[50] == pytest.approx(50 / 95)
    assert factors[100] == 0.0


def test_batches_are_full_and_weigh_replies_more() -> None:
    made = list(islice(batches(chat(), conversations(1), tokens=1024, seed=0), 40))
    for ids, weights in made:
        assert ids.shape == weights.shape
        assert ids.shape[1] % 16 == 0
        assert 1024 - ids.shape[1] < ids.numel() <= 1024
        assert set(weights.unique().tolist()) <= {0.0, torch.tensor(CONTEXT_WEIGHT).item(), 1.0}
        assert (weights.max(1).values == 1.0).all()
    again = list(islice(batches(chat(), conversations(1), tokens=1024, seed=0), 40))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(made, again, strict=True))


def test_batches_hold_what_the_source_said() -> None:
    source = list(islice(conversations(2), 1024))
    pad = chat().tokenizer.pad_token_id
    made = batches(chat(), source, tokens=512, seed=0)
    rows = [[i for i in row.tolist() if i != pad] for ids, _ in made for row in ids]
    wanted = [chat().encode(made).input_ids for made in source]
    assert len(rows) > 0.9 * len(wanted)  # groups that did not fill up are left over
    assert all(row in wanted for row in rows)


def test_weighted_loss_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    ids, weights = torch.tensor([[2, 1, 1]]), torch.tensor([[5.0, 1.0, 0.5]])
    want = -(torch.log(torch.tensor(0.25)) + 0.5 * torch.log(torch.tensor(0.8))) / 1.5
    assert weighted_loss(logits, ids, weights).item() == pytest.approx(want.item(), rel=1e-6)


# --- model and training -----------------------------------------------------------------------------------------------


def offset(family: str) -> float:
    return 1.0 if family == "gemma2" else 0.0


def test_gains_are_spread(family: str) -> None:
    model = new_model(family, chat(family), seed=0)
    assert gain_spread(model, offset=offset(family)) > 0.25
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            assert parameter.min() + offset(family) > 0
            parameter.data.fill_(1.0 - offset(family))
    assert gain_spread(model, offset=offset(family)) == 0.0


def test_the_seed_decides_the_model(family: str) -> None:
    one, two, other = (new_model(family, chat(family), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def mean_loss(model: Any, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    with torch.no_grad():
        return sum(weighted_loss(model(input_ids=i).logits, i, w).item() for i, w in data) / len(data)


def test_thirty_steps_reduce_the_loss_on_other_text(family: str) -> None:
    heldout = list(islice(batches(chat(family), conversations(7), tokens=1024, seed=0), 4))
    model = new_model(family, chat(family), seed=0)
    before = mean_loss(model, heldout)
    data = batches(chat(family), conversations(1), tokens=1024, seed=0)
    train_(model, data, Schedule(steps=30, lr=1e-2, batch_tokens=1024))
    after = mean_loss(model, heldout)
    assert after < before - 1.5
    assert gain_spread(model, offset=offset(family)) > 0.25
    assert not any(parameter.requires_grad for parameter in model.parameters())
    still = new_model(family, chat(family), seed=0)
    train_(still, batches(chat(family), conversations(1), tokens=1024, seed=0), Schedule(steps=3, lr=0.0))
    assert mean_loss(still, heldout) == pytest.approx(before, abs=1e-5)


def test_a_loss_that_is_not_finite_stops_training(family: str) -> None:
    model = new_model(family, chat(family), seed=0)
    next(iter(model.parameters())).data.fill_(float("nan"))
    kept = [parameter.clone() for parameter in model.parameters()]

    def data() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from batches(chat(family), conversations(1), tokens=512, seed=0)

    with pytest.raises(ArithmeticError, match="step 0"):
        train_(model, data(), Schedule(steps=2))
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(kept, model.parameters(), strict=True))
