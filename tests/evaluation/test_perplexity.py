"""Bits per byte: against a plain loop over tokens, against transformers' own loss, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch

from featcl.errors import FeatclError
from featcl.evaluation.perplexity import text_perplexity
from tests.conftest import tiny_model, tiny_tokenizer

TEXT = "The grüne house stands by the sea; nobody counts its windows. " * 3


def by_hand(model, ids: list[int], context: int, stride: int) -> float:
    """Σ NLL, token by token: the window of a token is the first of 0, stride, 2·stride, … that reaches it."""
    total = 0.0
    for place in range(1, len(ids)):
        begin = 0
        while begin + context <= place:
            begin += stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:place]])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[place]].item()
    return total


@pytest.mark.parametrize(("context", "stride"), [(32, 1), (32, 8), (32, 31), (50, 25), (512, 256)])
def test_every_token_counts_once_with_the_context_that_is_promised(context: int, stride: int) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    found = text_perplexity(model, tokenizer, [TEXT], context=context, stride=stride)
    expected = by_hand(model, ids, context, stride)
    assert found.tokens == len(ids) - 1
    assert found.nll * found.tokens == pytest.approx(expected, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert found.bytes == len(TEXT.encode()) > len(TEXT)  # ü has two bytes


def test_a_short_text_has_the_loss_that_transformers_gives() -> None:
    model, tokenizer = tiny_model("gemma2"), tiny_tokenizer("gemma2")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    found = text_perplexity(model, tokenizer, [TEXT])
    assert found.nll == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.get_output_embeddings().weight.data.zero_()
    found = text_perplexity(model, tokenizer, [TEXT], context=32)
    assert found.bits_per_byte == pytest.approx(math.log2(model.config.vocab_size), rel=1e-6)  # one token a byte
    assert found.perplexity == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_documents_are_read_apart_and_their_order_does_not_matter() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = ["one small text", "another, longer text about the sea", "x"]
    found = text_perplexity(model, tokenizer, texts)
    alone = [text_perplexity(model, tokenizer, [text]) for text in texts]
    assert found.nll * found.tokens == pytest.approx(sum(each.nll * each.tokens for each in alone), rel=1e-6)
    assert text_perplexity(model, tokenizer, texts[::-1]).bits_per_byte == pytest.approx(found.bits_per_byte, rel=1e-6)
    joined = text_perplexity(model, tokenizer, ["".join(texts)])  # control: read as one it is another number
    assert abs(joined.bits_per_byte - found.bits_per_byte) > 1e-3


def test_without_bos_a_text_starts_from_the_end_of_another() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with_bos = text_perplexity(model, tokenizer, [TEXT]).nll
    tokenizer.bos_token = None
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    found = text_perplexity(model, tokenizer, [TEXT])
    assert found.nll * found.tokens == pytest.approx(by_hand(model, ids, 512, 256), rel=1e-5)
    assert abs(found.nll - with_bos) > 1e-6
    tokenizer.eos_token = None
    with pytest.raises(FeatclError, match="neither a BOS nor an end-of-text token"):
        text_perplexity(model, tokenizer, [TEXT])


def test_a_change_of_the_model_shows_and_none_does_not() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = text_perplexity(model, tokenizer, [TEXT])
    assert text_perplexity(model, tokenizer, [TEXT]) == before
    model.get_output_embeddings().weight.data.mul_(1.5)
    assert abs(text_perplexity(model, tokenizer, [TEXT]).bits_per_byte - before.bits_per_byte) > 1e-3
    assert set(before.record("wiki")) == {"general/wiki_bits_per_byte", "general/wiki_perplexity"}


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "hold no token"),
        ([""], {}, "hold no token"),
        (["a"], {"context": 1}, "a context of 1 tokens; this model takes 2 to 512"),
        (["a"], {"context": 513}, "a context of 513 tokens; this model takes 2 to 512"),
        (["a"], {"context": 32, "stride": 32}, "a stride of 32 does not fit a context of 32: 1 to 31"),
        (["a"], {"context": 32, "stride": 0}, "a stride of 0 does not fit"),
    ],
)
def test_bad_input(texts, options, message) -> None:
    with pytest.raises(FeatclError, match=message):
        text_perplexity(tiny_model(), tiny_tokenizer(), texts, **options)
