"""A prefix of keys and values is the text it was read from; trained, it stands for more than it could hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.evaluation.forward import target_batches
from featcl.methods.cartridge import BATCH, Cartridge, corpus_ids, distance
from featcl.methods.prefix import Prefix, attached, read_prefix
from featcl.models import max_context
from featcl.objectives.scoring import pack_group
from featcl.streams.chat import Encoded
from featcl.streams.rollouts import generate
from tests.conftest import FAMILIES, tiny_model, tiny_tokenizer
from tests.methods.library import first_task, learner_with
from tests.methods.replaying import Bench, ask, reloaded, resumes, same_state

TEXT = "mira plays golf. jonas has sister dirk."


def logits(model: Any, ids: list[int], **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False, **inputs).logits[0]


# --- the prefix is the context -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_the_prefix_are_those_with_the_text_in_context(family: str) -> None:
    bench = Bench(family)
    bench.move_()
    causal, chat = bench.student.scorer.causal, bench.student.chat
    context, prompt = corpus_ids(chat, TEXT * 2), chat.prompt([{"role": "user", "content": "whom?"}])
    assert len(context) > 64  # beyond Gemma's sliding window
    prefix = read_prefix(causal, context)
    with attached(causal, prefix):
        found = logits(causal, prompt)
    torch.testing.assert_close(found, logits(causal, [*context, *prompt])[len(context) :], atol=2e-5, rtol=1e-5)
    bare = logits(causal, prompt)
    assert float((found - bare).abs().max()) > 0.1  # negative control: the context matters
    assert torch.equal(bare, logits(causal, prompt))  # and it is gone after the block
    keys, values = prefix.rest.unbind(1)  # negative control: keys with the values of other tokens
    other = Prefix(prefix.sink, torch.stack([keys, values.roll(1, dims=2)], dim=1))
    with attached(causal, other):
        assert float((logits(causal, prompt) - found).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_evaluation_and_decoding_all_go_on_after_it(family: str) -> None:
    bench = Bench(family)
    bench.move_()
    scorer, chat = bench.student.scorer, bench.student.chat
    context = corpus_ids(chat, TEXT)[:20]
    prompts = [chat.prompt([{"role": "user", "content": asked}]) for asked in ("whom?", "what does she play?")]
    own = [Encoded([*p, 1, 2, 3], [False] * len(p) + [True] * 3) for p in prompts]
    told = [Encoded([*context, *e.input_ids], [False] * len(context) + e.loss_mask) for e in own]
    with attached(scorer.causal, read_prefix(scorer.causal, context)), torch.no_grad():
        hidden = scorer.hidden(pack_group(own))
        with scorer.trunks_kept():
            batch = pack_group(own)
            kept = [scorer.hidden(batch), scorer.hidden(batch)]
        scored = [batch.logits for batch in target_batches(scorer.causal, own)]
        written = generate(scorer.causal, prompts, max_new_tokens=12, temperature=0.0)
        drawn = generate(
            scorer.causal, prompts * 3, max_new_tokens=6, generator=torch.Generator().manual_seed(0), stop_ids=[100]
        )
    with torch.no_grad():
        torch.testing.assert_close(hidden, scorer.hidden(pack_group(told)), atol=2e-5, rtol=1e-5)
        assert all(torch.equal(hidden, each) for each in kept)
        for one, other in zip(scored, target_batches(scorer.causal, told), strict=True):
            torch.testing.assert_close(one, other.logits, atol=2e-5, rtol=1e-5)
    with_text = [[*context, *prompt] for prompt in prompts]
    assert written.token_ids == generate(scorer.causal, with_text, max_new_tokens=12, temperature=0.0).token_ids
    again = generate(
        scorer.causal, with_text * 3, max_new_tokens=6, generator=torch.Generator().manual_seed(0), stop_ids=[100]
    )
    assert drawn.token_ids == again.token_ids
    plain = generate(scorer.causal, prompts, max_new_tokens=12, temperature=0.0).token_ids  # negative control
    assert plain != written.token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_takes_room_of_the_context(family: str) -> None:
    bench = Bench(family)
    causal = bench.student.scorer.causal
    longest = max_context(causal)
    prefix = read_prefix(causal, list(range(20)))
    with attached(causal, prefix):
        logits(causal, [7] * (longest - 20))
        with pytest.raises(FeatclError, match=f"a prefix of 20 tokens and {longest - 19} to read are more than"):
            logits(causal, [7] * (longest - 19))
    logits(causal, [7] * longest)  # negative control: without it there is room for that


def test_chat_has_room_for_less_beside_a_cartridge() -> None:
    learner = first_task(learner_with(Cartridge(tokens=16, samples=2, steps=0, max_new_tokens=4)))
    causal, chat = learner.student.scorer.causal, learner.student.chat
    assert learner.answering().taken == 16
    bare = len(chat.prompt([{"role": "user", "content": ""}]))
    longest = max_context(causal)
    text = [{"role": "user", "content": "a" * (longest - 16 - 3 - bare)}]
    assert len(chat.prompt(text)) == longest - 16 - 3  # one token a letter
    assert len(learner.chat(text, max_new_tokens=50).token_ids) <= 3
    full = [{"role": "user", "content": "a" * (longest - 16 - bare)}]
    with pytest.raises(FeatclError, match="tokens beside 16 that methods take, the model's context is full"):
        learner.chat(full)
    assert learner_with().chat(full, max_new_tokens=2) is not None  # negative control: without a prefix it fits
    with pytest.raises(FeatclError, match="leaves nothing of the model's context"):
        learner_with(Cartridge(tokens=longest))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_pefts_cartridge(family: str) -> None:
    from peft import CartridgeConfig, get_peft_model, initialize_kv_prefix_from_text

    model, tokenizer = tiny_model(family), tiny_tokenizer(family)
    bench = Bench(family)
    ids = tokenizer(TEXT)["input_ids"][:20]
    prefix = read_prefix(bench.student.scorer.causal, ids)
    peft = get_peft_model(model, CartridgeConfig(num_virtual_tokens=20, task_type="CAUSAL_LM", num_frozen_tokens=1))
    initialize_kv_prefix_from_text(peft, tokenizer, text=TEXT, use_chat_template=False)
    flat = prefix.whole().permute(3, 0, 1, 2, 4).reshape(20, -1)
    torch.testing.assert_close(flat, peft.get_prompt_embedding_to_save("default"), atol=1e-6, rtol=1e-5)
    prompt = bench.student.chat.prompt([{"role": "user", "content": "whom?"}])
    with attached(bench.student.scorer.causal, prefix):
        found = logits(bench.student.scorer.causal, prompt)
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    torch.testing.assert_close(found, logits(peft, prompt, attention_mask=mask), atol=2e-5, rtol=1e-5)


def test_beyond_a_sliding_window_padded_prompts_are_refused() -> None:
    """Padding would stand between prefix and prompt, and push the prefix out of the window."""
    bench = Bench("gemma2")
    causal = bench.student.scorer.causal
    prefix = read_prefix(causal, list(range(60)))  # the window is 64
    with attached(causal, prefix):
        equal = generate(causal, [[1, 2], [3, 4]], max_new_tokens=6, temperature=0.0)
        with pytest.raises(FeatclError, match="sliding window of 64"):
            generate(causal, [[1], [3, 4]], max_new_tokens=6, temperature=0.0)
        short = generate(causal, [[1], [3, 4]], max_new_tokens=2, temperature=0.0)
    context = list(range(60))
    full = generate(causal, [[*context, 1, 2], [*context, 3, 4]], max_new_tokens=6, temperature=0.0)
    assert equal.token_ids == full.token_ids
    padded = generate(causal, [[*context, 1], [*context, 3, 4]], max_new_tokens=2, temperature=0.0)
    assert short.token_ids == padded.token_ids


def test_a_prefix_refuses_what_it_cannot_do() -> None:
    bench = Bench()
    causal = bench.student.scorer.causal
    with pytest.raises(FeatclError, match="cannot have 5 frozen"):
        read_prefix(causal, [1, 2], frozen=5)
    begun = causal(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values
    with attached(causal, read_prefix(causal, [5, 6, 7])):
        with pytest.raises(FeatclError, match="begun without the prefix"):
            causal(input_ids=torch.tensor([[3]]), past_key_values=begun)
        with pytest.raises(FeatclError, match="one value per token"):
            causal(input_ids=torch.tensor([[3]]), attention_mask=torch.zeros(1, 1, 1, 4))


# --- the method --------------------------------------------------------------------------------------------------


def studied(bench: Bench, **options: Any) -> Cartridge:
    method = Cartridge(**{"samples": 6, "steps": 4, "max_new_tokens": 8, "tokens": 24, **options})
    for number in range(4):
        assert bench.observe(ask(number), method) == "cartridge: kept outside the weights"
    method.end_task_("a", [], bench.view())
    return method


def test_untrained_the_cartridge_is_the_corpus_in_context() -> None:
    bench = Bench()
    method = studied(bench, steps=0, tokens=1000)
    causal, chat = bench.student.scorer.causal, bench.student.chat
    corpus = "\n".join(f"user: what is number {n}?\nassistant: it is {n * 7 % 10}" for n in range(4))
    context, prompt = corpus_ids(chat, corpus), chat.prompt([{"role": "user", "content": "whom?"}])
    assert method.prefix is not None
    assert method.prefix.tokens == len(context)
    with method.around(bench.view()):
        found = logits(causal, prompt)
    torch.testing.assert_close(found, logits(causal, [*context, *prompt])[len(context) :], atol=2e-5, rtol=1e-5)
    assert method.cost().stored_bytes == method.prefix.nbytes + len(corpus) - 3  # without the line feeds between


def test_training_brings_the_prefix_nearer_to_the_corpus_and_moves_nothing_else() -> None:
    bench = Bench()
    bench.move_()
    start = bench.adapter.coordinates()
    plain = studied(bench, steps=0)
    trained = studied(bench, steps=60, lr=3e-2, samples=BATCH)
    assert plain.prefix is not None
    assert trained.prefix is not None
    assert torch.equal(plain.prefix.sink, trained.prefix.sink)  # the first token is not trained
    assert not torch.equal(plain.prefix.rest, trained.prefix.rest)
    assert trained.prefix.tokens == 24
    fresh = Cartridge(samples=BATCH, max_new_tokens=8)
    fresh.texts = trained.texts
    fresh._studies = 7  # other conversations than those that were trained on
    with torch.no_grad():
        [lesson] = fresh._lessons(bench.view())
        before, after = (float(distance(m.prefix, lesson, bench.student)) for m in (plain, trained))  # type: ignore[arg-type]
    assert after < 0.8 * before
    now = bench.adapter.coordinates()
    assert all(torch.equal(start[name], now[name]) for name in start)
    assert all(parameter.grad is None for parameter in bench.student.scorer.causal.parameters())
    assert trained.cost().backward_tokens > 0 == plain.cost().backward_tokens


def test_nothing_acts_before_there_is_a_prefix_and_it_is_made_when_due() -> None:
    bench, method = Bench(), Cartridge(samples=2, steps=1, max_new_tokens=6, every=2)
    prompt = bench.student.chat.prompt([{"role": "user", "content": "whom?"}])
    bare = logits(bench.student.scorer.causal, prompt)
    bench.observe(ask(1), method)
    with method.around(bench.view()):
        assert torch.equal(logits(bench.student.scorer.causal, prompt), bare)
    bench.observe(ask(2), method)
    with method.around(bench.view()):
        assert not torch.equal(logits(bench.student.scorer.causal, prompt), bare)
    first = method.prefix
    method.end_task_("a", [], bench.view())
    assert method.prefix is first  # nothing new


def test_a_cartridge_resumes_to_the_same_bits() -> None:
    make = lambda: Cartridge(samples=2, steps=2, max_new_tokens=6, every=3, tokens=16)  # noqa: E731
    assert resumes(make, [ask(n) for n in range(7)], cut=4)
    method = studied(Bench(), steps=1)
    assert same_state(method, reloaded(method, Cartridge()))
    assert not same_state(method, studied(Bench(), steps=2))


def test_bad_settings_are_refused() -> None:
    for given, message in (
        ({"tokens": 0}, "tokens must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"steps": -1}, "steps must be"),
        ({"form": "x"}, "form 'x'"),
        ({"budget_bytes": 0}, "budget_bytes must be"),
    ):
        with pytest.raises(FeatclError, match=message):
            Cartridge(**given)
    bench, method = Bench(), Cartridge(max_new_tokens=4)
    bench.observe(ask(1, "x" * 600), method)
    with pytest.raises(FeatclError, match="no text of the corpus fits"):
        method.study_(bench.view())
