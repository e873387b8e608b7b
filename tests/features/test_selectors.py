"""Selectors recover a feature that was planted, and say what they need."""

from __future__ import annotations

import random

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import select_features
from featcl.features.activity import activity, benjamini_hochberg, compare
from featcl.features.selectors import NEEDS
from featcl.models import residual_stream

PLANTED = 29
WORDS = ["lamp", "door", "music", "garden", "window", "kettle", "carpet", "mirror"]


def sentences(letter: str, count: int = 12) -> list[str]:
    """Plain sentences that differ in one thing: whether the letter z stands in them."""
    return [f"the {WORDS[i % 8]} and {letter} the {WORDS[(3 * i + 1) % 8]} {letter} number {i}" for i in range(count)]


@pytest.fixture
def planted(sae, tiny):
    """A ReLU SAE with one feature that fires on the letter z; the others cannot tell z from a, but for its context."""
    model, tokenizer = tiny(n_layers=2)
    for name, parameter in model.named_parameters():  # blocks that write nothing: the stream is the embedding
        parameter.data *= 10 if "embed" in name else 0 if "o_proj" in name or "down_proj" in name else 1
    source = sae("standard")
    ids = torch.tensor(tokenizer([text[:30] for letter in "za" for text in sentences(letter)]).input_ids)
    hidden = residual_stream(model, ids, torch.ones_like(ids), layer=1).flatten(0, 1)
    is_z, is_a = (ids.flatten() == tokenizer(letter).input_ids[0] for letter in "za")
    difference = torch.nn.functional.normalize(hidden[is_z].mean(0) - hidden[is_a].mean(0), dim=0)
    probe = torch.linalg.lstsq(hidden - hidden[~is_z].mean(0), is_z.float()[:, None]).solution[:, 0]
    reading = hidden @ probe
    source.b_dec.data.zero_()
    source.W_enc.data -= torch.outer(difference, difference @ source.W_enc)
    source.W_dec.data[PLANTED], source.W_enc.data[:, PLANTED] = difference, probe
    source.b_enc.data[PLANTED] = -(reading[is_z].min() + reading[~is_z].max()) / 2
    assert reading[is_z].min() > reading[~is_z].max()
    return source, model, tokenizer


def test_contrast_finds_it(planted):
    found = select_features(*planted, selector="contrast", k=3, positive=sentences("z"), negative=sentences("a"))
    assert found.feature_ids[0] == PLANTED
    assert found.manifest["scores"]["effect"][0] > 2
    assert found.manifest["scores"]["q_value"][0] < 1e-3
    assert found.manifest["significant"] >= 1
    assert (found.layer, found.k, found.d_model) == (1, 3, 32)
    cosine = torch.nn.functional.cosine_similarity(found.vectors[0], planted[0].W_dec[PLANTED], dim=0)
    assert cosine == pytest.approx(1, abs=1e-6)


def test_contrast_of_alike_texts_finds_nothing_significant(planted):
    """Negative control: two halves of one distribution."""
    both = random.Random(0).sample(sentences("a", 40), 40)
    found = select_features(*planted, selector="contrast", k=3, positive=both[::2], negative=both[1::2])
    assert found.manifest["significant"] == 0
    assert PLANTED not in found.feature_ids


def test_rarity_finds_it(planted):
    stream, background = sentences("z"), sentences("a")
    found = select_features(*planted, selector="rarity", k=2, stream=stream, background=background)
    assert found.feature_ids[0] == PLANTED
    assert found.manifest["scores"]["on_stream"][0] > 5 * found.manifest["scores"]["on_background"][0]
    swapped = select_features(*planted, selector="rarity", k=2, stream=background, background=stream)
    assert PLANTED not in swapped.feature_ids  # negative control


def test_gradient_energy_is_that_of_the_gradient(planted):
    """Over an orthonormal set of rows the shares Σ (g · d)² / Σ ‖g‖² add up to 1; copies of rows are passed over."""
    source, model, tokenizer = planted
    source.W_dec.data = torch.eye(32).repeat(2, 1)[:48]
    source.W_enc.data[:, :32] = torch.eye(32)
    found = select_features(source, model, tokenizer, selector="gradient_energy", k=32, stream=sentences("z"))
    energies = found.manifest["scores"]["energy_share"]
    assert set(found.feature_ids) == set(range(32))
    assert sum(energies) == pytest.approx(1, rel=1e-4)
    assert energies == sorted(energies, reverse=True)
    assert energies[0] > 1.5 * found.manifest["chance"]
    assert found.manifest["chance"] == 1 / 32


def test_ids_are_taken_as_given(planted):
    found = select_features(*planted, selector="ids", feature_ids=[7, 3, 40])
    assert found.feature_ids == (7, 3, 40)
    assert found.encoder.k == 3
    hidden = torch.randn(9, 32)
    assert torch.allclose(found.encoder(hidden), planted[0].encode(hidden)[:, [7, 3, 40]], atol=1e-5)


def test_a_repeated_direction_is_passed_over(planted):
    source = planted[0]
    twin = 30
    source.W_dec.data[twin] = 2 * source.W_dec.data[PLANTED]
    source.W_enc.data[:, twin] = source.W_enc.data[:, PLANTED]
    source.b_enc.data[twin] = source.b_enc.data[PLANTED]
    found = select_features(*planted, selector="contrast", k=3, positive=sentences("z"), negative=sentences("a"))
    assert len({PLANTED, twin} & set(found.feature_ids)) == 1
    assert len({PLANTED, twin} & set(found.manifest["passed_over"])) == 1
    assert found.subspace().k == 3


def test_the_same_texts_give_the_same_digest(planted):
    arguments = {"selector": "contrast", "k": 4, "positive": sentences("z"), "negative": sentences("a")}
    first, second = (select_features(*planted, **arguments) for _ in range(2))
    assert first.digest == second.digest
    assert first.manifest == second.manifest


def test_statistics_are_those_of_saelens_encode(planted):
    """Streamed over batches of unlike lengths = computed one text at a time."""
    source, model, tokenizer = planted
    texts = ["short z", "a somewhat longer text with z", "z", "and the longest of all these texts, without the letter"]
    seen = activity(source, model, tokenizer, texts)
    means, active, tokens = [], 0, 0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        acts = source.encode(residual_stream(model, ids, torch.ones_like(ids), layer=1)[0, 1:])
        means.append(acts.mean(0))
        active, tokens = active + (acts > 0).sum(0), tokens + len(acts)
    stacked = torch.stack(means).double()
    assert (seen.windows, seen.tokens) == (4, tokens)
    assert torch.allclose(seen.mean, stacked.mean(0), atol=1e-5)
    assert torch.allclose(seen.variance, stacked.var(0), atol=1e-4)
    assert (seen.active - active).abs().max() <= 1  # an activation within rounding of its threshold may differ


def test_benjamini_hochberg_by_hand():
    p_values = torch.tensor([0.01, 0.04, 0.03, 0.5], dtype=torch.float64)
    expected = torch.tensor([0.04, 0.16 / 3, 0.16 / 3, 0.5], dtype=torch.float64)
    assert torch.allclose(benjamini_hochberg(p_values), expected)


def test_welch_and_cohen_by_hand():
    """Two features, windows 1 2 3 against 2 4 6 and 0 0 0 against 0 0 0; scipy gives p = 0.2214 for the first."""
    from featcl.features.activity import Activity

    def side(mean, variance):
        return Activity(3, 30, torch.tensor([mean, 0.0]).double(), torch.tensor([variance, 0.0]).double(), None)

    found = compare(side(4.0, 4.0), side(2.0, 1.0))
    assert found.difference.tolist() == [2, 0]
    assert float(found.effect[0]) == pytest.approx(2 / 2.5**0.5, rel=1e-5)
    assert float(found.q_value[0]) / 2 == pytest.approx(0.2214, abs=0.003)  # m / rank = 2
    assert float(found.q_value[1]) == pytest.approx(1)
    assert not found.significant.any()


def test_a_selector_without_its_texts_names_those_that_work(planted):
    with pytest.raises(FeatclError, match="lacks its positive and negative") as caught:
        select_features(*planted, selector="contrast", k=2, stream=["a"], background=["b"])
    assert "these work: rarity, gradient_energy" in str(caught.value)
    with pytest.raises(FeatclError, match="unknown: one of ids, contrast"):
        select_features(*planted, selector="magic", k=2)
    for selector in NEEDS:
        with pytest.raises(FeatclError, match="these work: none"):
            select_features(*planted, selector=selector, k=2)


def test_bad_input(planted):
    texts = {"positive": sentences("z"), "negative": sentences("a")}
    for k in (None, 0, 33):
        with pytest.raises(FeatclError, match="k between 1 and d_model = 32"):
            select_features(*planted, selector="contrast", k=k, **texts)
    with pytest.raises(FeatclError, match="feature 48 does not exist"):
        select_features(*planted, selector="ids", feature_ids=[48])
    with pytest.raises(FeatclError, match="twice"):
        select_features(*planted, selector="ids", feature_ids=[4, 4])
    with pytest.raises(FeatclError, match="at least two"):
        select_features(*planted, selector="contrast", k=2, positive=["z"], negative=["a"])
