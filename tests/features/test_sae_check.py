"""SAEHealth against numbers known beforehand: a perfect SAE, a useless one, and one by hand."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import check_sae
from featcl.models import residual_stream

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs!"] * 4


def perfect(sae, d_model: int = 32):
    """x = relu(x) − relu(−x): a ReLU SAE that reconstructs everything, one of each pair of features active."""
    source = sae("standard", d_sae=2 * d_model)
    eye = torch.eye(d_model)
    source.W_enc.data, source.W_dec.data = torch.cat([eye, -eye], dim=1), torch.cat([eye, -eye])
    source.b_enc.data.zero_()
    source.b_dec.data.zero_()
    return source


def test_perfect_sae(sae, tiny):
    health = check_sae(perfect(sae), *tiny(), TEXTS)
    assert health.fvu < 1e-10
    assert health.l0 == pytest.approx(32)
    assert health.dead_fraction < 0.05  # a coordinate that never changes sign leaves one of its pair dead
    assert health.loss_recovered == pytest.approx(1, abs=1e-5)
    assert health.nll_zero != pytest.approx(health.nll, abs=1e-2)
    assert health.tokens == sum(map(len, TEXTS))


def test_useless_sae(sae, tiny):
    """Features that never fire: x̂ is b_dec; all dead, and zeros at b_dec = 0 recover nothing."""
    source = perfect(sae)
    source.b_enc.data.fill_(-1e6)
    health = check_sae(source, *tiny(), TEXTS)
    assert (health.l0, health.dead_fraction) == (0, 1)
    assert health.fvu >= 1
    assert health.loss_recovered == pytest.approx(0, abs=1e-6)


def test_by_hand(sae, tiny, family):
    model, tokenizer = tiny(family)
    source = sae("jumprelu")
    bos = tokenizer.bos_token_id
    ids = torch.tensor([[bos, *tokenizer(TEXTS[0]).input_ids]])
    x = residual_stream(model, ids, torch.ones_like(ids), layer=1)[0, 1:]  # without BOS
    feature_acts = source.encode(x)
    error = (source.decode(feature_acts) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    health = check_sae(source, model, tokenizer, TEXTS[:1])
    assert health.fvu == pytest.approx(float(error), rel=1e-4)
    assert health.l0 == pytest.approx(float((feature_acts > 0).sum(-1).float().mean()))
    assert health.dead_fraction == pytest.approx(float((feature_acts == 0).all(0).float().mean()))
    logits = model(ids).logits[0, 1:-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 2:])
    assert health.nll == pytest.approx(float(nll), rel=1e-5)


def test_padding_changes_nothing(sae, tiny):
    model, tokenizer = tiny()
    source = sae("jumprelu")
    short, long = TEXTS[0][:9], TEXTS[1]
    both = check_sae(source, model, tokenizer, [short, long])
    alone = [check_sae(source, model, tokenizer, [text]) for text in (short, long)]
    assert both.l0 == pytest.approx(sum(h.l0 * h.tokens for h in alone) / both.tokens, rel=1e-5)
    expected = sum(h.nll_spliced * (h.tokens - 1) for h in alone) / (both.tokens - 2)
    assert both.nll_spliced == pytest.approx(expected, rel=1e-4)


def test_stops_early_and_leaves_no_hooks(sae, tiny):
    model, tokenizer = tiny()
    health = check_sae(sae(), model, tokenizer, TEXTS * 100, max_tokens=500)
    assert 500 <= health.tokens < 5000
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input(sae, tiny):
    model, tokenizer = tiny(d_model=64)
    with pytest.raises(FeatclError, match="width 32"):
        check_sae(sae(), model, tokenizer, TEXTS)
    model, tokenizer = tiny(n_layers=1)
    with pytest.raises(FeatclError, match="blocks 0 to 0"):
        check_sae(sae(), model, tokenizer, TEXTS)
    model, tokenizer = tiny()
    with pytest.raises(FeatclError, match="at least two tokens"):
        check_sae(sae(), model, tokenizer, [])
