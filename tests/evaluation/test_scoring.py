"""Scoring by one forward against decoding word by word, and held-out likelihood against a plain loop."""

from __future__ import annotations

import sys
import time
import types
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.evaluation.forward import target_batches
from featcl.evaluation.scoring import ItemScorer, encode_item, heldout_nll, lasting_items, score_items, weighted_nll
from featcl.lab.items import Item
from tests.evaluation import toys


def questions(count: int, *, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [" ".join(toys.WORDS[i] for i in torch.randint(0, 40, (n,), generator=generator).tolist()) for n in lengths]


def taught_and_new(count: int) -> tuple[list[Item], list[Item]]:
    """Items to teach, with answers of one to three words, and as many that are not taught."""
    text = questions(2 * count)
    items = [toys.item(f"q{i}", q, " ".join(toys.WORDS[i % 40 : i % 40 + 1 + i % 3])) for i, q in enumerate(text)]
    return items[:count], items[count:]


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_one_forward_agrees_with_greedy_decoding(family: str) -> None:
    chat = toys.chat()
    taught, new = taught_and_new(30)
    network = toys.teach(toys.model(family), chat, taught)
    longer = [toys.item(f"x{i}", item.messages[0]["content"], item.answer + " w1") for i, item in enumerate(taught)]
    items = [*taught, *new, *longer]
    truth = []
    for item in items:
        said = toys.greedy(network, chat.prompt(item.messages), stop_ids=chat.stop_ids, steps=12)
        truth.append(said[-1] in chat.stop_ids and said[:-1] == chat.reply_ids(item.answer)[:-1])
    assert sum(truth[:30]) > 20, "the model must be right on what it was taught"
    assert sum(truth[30:]) < 10, "and wrong on the rest"
    assert score_items(network, chat, items, batch_tokens=200) == truth
    assert score_items(network, chat, items, batch_tokens=20000) == truth


def test_every_sequence_gets_the_logits_it_would_get_alone() -> None:
    chat, network = toys.chat(), toys.model("gemma2")
    replies = [encode_item(chat, toys.item(str(i), q, "w3 w4")) for i, q in enumerate(questions(15))]
    seen = {}
    for batch in target_batches(network, replies, batch_tokens=120):
        for owner in batch.owner.unique().tolist():
            seen[owner] = batch.logits[batch.owner == owner]
            assert batch.last[batch.owner == owner].tolist() == [False, False, True]
    for index, reply in enumerate(replies):
        with torch.no_grad():
            alone = network(torch.tensor([reply.input_ids])).logits[0, -4:-1]
        torch.testing.assert_close(seen[index], alone, rtol=0, atol=2e-5)


def test_large_vocabularies_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    import featcl.evaluation.forward as forward

    chat, network = toys.chat(), toys.model()
    replies = [encode_item(chat, toys.item(str(i), q, "w3")) for i, q in enumerate(questions(12))]
    assert len(list(target_batches(network, replies))) == 1
    monkeypatch.setattr(forward, "MAX_LOGITS", 64 * 20)
    batches = list(target_batches(network, replies))
    assert len(batches) > 1
    assert sum(len(batch.targets) for batch in batches) == 24


def test_the_model_keeps_its_mode_and_gets_no_gradient() -> None:
    network = toys.model().train()
    scorer = ItemScorer(toys.chat(), [toys.item("a", "w1", "w2")])
    scorer.score(network)
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_heldout_nll_equals_a_plain_loop() -> None:
    chat, network = toys.chat(), toys.model()
    windows = [chat.encode_text(" ".join(questions(3, seed=seed))) for seed in range(5)]
    windows += [
        chat.encode(({"role": "user", "content": q}, {"role": "assistant", "content": "w7 w8"})) for q in questions(4)
    ]
    expected = []
    for window in windows:
        with torch.no_grad():
            logs = network(torch.tensor([window.input_ids])).logits[0].double().log_softmax(-1)
        places = [place for place, wanted in enumerate(window.loss_mask) if wanted]
        expected.append(-sum(logs[place - 1, window.input_ids[place]].item() for place in places) / len(places))
    assert heldout_nll(network, windows, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    tokens = [sum(window.loss_mask) for window in windows]
    mean = sum(e * t for e, t in zip(expected, tokens, strict=True)) / sum(tokens)
    assert weighted_nll(expected, windows) == pytest.approx(mean)


def test_code_is_generated_only_where_words_differ_and_judged_by_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that means the same is right; a wrong one is wrong; one that is word for word right is not generated."""
    chat, network = toys.chat(), toys.model()
    asked: list[list[int]] = []

    def generate(model: Any, prompts: list[list[int]], **options: Any) -> Any:
        asked.extend(prompts)
        assert options["temperature"] == 0
        assert options["stop_ids"] == chat.stop_ids
        return types.SimpleNamespace(token_ids=[[len(prompt)] for prompt in prompts])

    monkeypatch.setitem(sys.modules, "featcl.streams.rollouts", types.SimpleNamespace(generate=generate))
    scorer = ItemScorer(chat, [toys.item(str(n), " ".join(["w1"] * n), "w2", grader="code") for n in (3, 1, 2)])
    texts = {len(reply.prompt): text for reply, text in zip(scorer.replies, ["same", "other", "same"], strict=True)}
    monkeypatch.setattr(chat, "decode_reply", lambda ids: texts[ids[0]])
    monkeypatch.setattr("featcl.evaluation.scoring.grade", lambda item, reply: reply == "same")
    monkeypatch.setattr("featcl.evaluation.scoring.word_for_word", lambda *a, **k: [False, False, True])
    assert scorer.score(network) == [True, False, True]
    assert sorted(len(prompt) for prompt in asked) == sorted(len(reply.prompt) for reply in scorer.replies[:2])


def test_generated_code_is_graded_end_to_end() -> None:
    pytest.importorskip("featcl.streams.rollouts", reason="rollouts are not there yet")
    chat = toys.chat()
    taught, new = taught_and_new(10)
    items = [toys.item(item.id, item.messages[0]["content"], item.answer, grader="code") for item in [*taught, *new]]
    network = toys.teach(toys.model(), chat, taught)
    said = [toys.greedy(network, chat.prompt(item.messages), stop_ids=chat.stop_ids, steps=14) for item in items]
    words = [chat.decode_reply(ids) == item.answer for ids, item in zip(said, items, strict=True)]
    assert score_items(network, chat, items) == words  # words mean nothing as code, so only the same words are right


def test_superseded_items_leave() -> None:
    kept = Item("k", "t", ({"role": "user", "content": "q"},), "a")
    gone = Item("g", "t", ({"role": "user", "content": "q"},), "a", valid_until=2)
    assert lasting_items([kept, gone], 3) == (kept,)
    assert lasting_items([kept, gone], 2) == (kept, gone)


def test_a_sequence_without_target_is_refused() -> None:
    with pytest.raises(FeatclError, match="no target"):
        heldout_nll(toys.model(), [toys.chat().encode(({"role": "user", "content": "w1"},), mask="none")])


def test_scoring_costs_little_more_than_the_forward_itself() -> None:
    """500 items of about 35 tokens on a model of 2 M parameters, beside bare forwards of as many tokens."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=2048,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=2,
    )
    network = Olmo2ForCausalLM(config).eval()
    items = [toys.item(str(i), f"{q} " + "w1 " * 20, "w2 w3") for i, q in enumerate(questions(500))]
    scorer = ItemScorer(toys.chat(), items)
    tokens = sum(len(reply.input_ids) for reply in scorer.replies)
    ids = torch.randint(0, 2048, (tokens // 35, 35))

    @torch.no_grad()
    def bare() -> None:
        for batch in ids.split(4096 // 35):
            network(input_ids=batch, use_cache=False)

    pairs = [(_seconds(lambda: scorer.score(network)), _seconds(bare)) for _ in range(4)]
    assert min(score for score, _ in pairs) < 1.5 * min(forward for _, forward in pairs), pairs


def _seconds(work: Any) -> float:
    """Of the processor, not of the clock: other processes do not count."""
    start = time.process_time()
    work()
    return time.process_time() - start
