"""Selectors recover a feature that was planted, and say what they need."""

from __future__ import annotations

import random
import weakref

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import select_features
from featcl.features.activity import activity, benjamini_hochberg, compare
from featcl.features.selectors import SELECTORS
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
    for selector in SELECTORS:
        with pytest.raises(FeatclError, match="these work: none"):
            select_features(*planted, selector=selector, k=2)


def test_a_stream_with_nothing_to_spare_is_not_called_absent(planted):
    """As of a source of one or two trajectories, whose calibration split is empty."""
    for selector, more in (("rarity", {"background": ["b"]}), ("attribution", {}), ("gradient_energy", {})):
        with pytest.raises(
            FeatclError, match=r"lacks its .*stream \(a source of fewer than three trajectories"
        ) as caught:
            select_features(*planted, selector=selector, k=2, stream=[], **more)
        assert "with what is given these work: none" in str(caught.value)
        with pytest.raises(FeatclError, match="lacks its") as caught:
            select_features(*planted, selector=selector, k=2, **more)
        assert "fewer than three" not in str(caught.value), "the control: no stream is given at all"
    with pytest.raises(FeatclError, match="lacks its positive and negative; with"):
        select_features(*planted, selector="contrast", k=2, stream=[])


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


# --- attribution, persona ---------------------------------------------------------------------------------------------


def test_attribution_is_the_first_order_effect_of_ablation(planted):
    """Σ over features of −a ∂L/∂a is the derivative of the loss along x̂ − b_dec; by hand from autograd."""
    source, model, tokenizer = planted
    text = sentences("z")[0]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
    leaves: list[torch.Tensor] = []

    def leaf(_module, _inputs, output):
        leaves.append((output[0] if isinstance(output, tuple) else output).detach().requires_grad_())
        return (leaves[0], *output[1:]) if isinstance(output, tuple) else leaves[0]

    handle = model.model.layers[1].register_forward_hook(leaf)
    with torch.enable_grad():
        logits = model(ids).logits[0, 1:-1]
        [gradient] = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, ids[0, 2:], reduction="sum"), leaves)
    handle.remove()
    acts = source.encode(leaves[0][0, 1:].detach())
    expected = -(acts * (gradient[0, 1:] @ source.W_dec.T)).sum(0) / len(acts)
    best = expected.argsort(descending=True)[:3]
    found = select_features(*planted, selector="attribution", k=3, stream=[text])
    assert found.feature_ids == tuple(best.tolist())
    assert torch.allclose(torch.tensor(found.manifest["scores"]["attribution"]).float(), expected[best], rtol=1e-3)


def test_attribution_takes_a_loss_of_the_task(planted):
    """With the loss turned round, what helped before hurts now."""
    from featcl.features.selectors.gradients import next_token_nll

    texts = {"positive": sentences("z")}
    found = select_features(*planted, selector="attribution", k=3, **texts)
    turned = select_features(*planted, selector="attribution", k=3, loss=lambda *a: -next_token_nll(*a), **texts)
    assert set(found.feature_ids).isdisjoint(turned.feature_ids)


def test_persona_is_nearest_to_the_difference_of_means(planted):
    """The planted feature writes the difference of the two letters; texts of alternating letters differ by that."""
    found = select_features(*planted, selector="persona", k=2, positive=["zz z"] * 2, negative=["aa a"] * 2)
    assert found.feature_ids[0] == PLANTED
    assert found.manifest["scores"]["cosine"][0] > 0.9 > found.manifest["scores"]["cosine"][1]
    swapped = select_features(*planted, selector="persona", k=2, positive=["aa a"] * 2, negative=["zz z"] * 2)
    assert PLANTED not in swapped.feature_ids  # negative control
    with pytest.raises(FeatclError, match="same mean"):
        select_features(*planted, selector="persona", k=2, positive=["zz z"], negative=["zz z"])


# --- one's own function, a reviewed list, combinations ---------------------------------------------------------------


def test_any_function_of_the_same_form_is_a_selector(planted):
    seen = {}

    def longest_rows(sae, model, tokenizer, *, positive, k, seed=0):
        seen.update(positive=positive, k=k, seed=seed)
        return sae.W_dec.norm(dim=-1).argsort(descending=True)

    found = select_features(*planted, selector=longest_rows, k=4, positive=["a"], negative=["b"], seed=3)
    norms = planted[0].W_dec.norm(dim=-1)
    assert found.feature_ids == tuple(norms.argsort(descending=True)[:4].tolist())
    assert seen == {"positive": ["a"], "k": 4, "seed": 3}
    assert found.selector.endswith("longest_rows")
    assert set(found.manifest["data"]) == {"positive"}
    with pytest.raises(FeatclError, match=r"longest_rows' lacks its positive"):
        select_features(*planted, selector=longest_rows, k=4)
    with pytest.raises(FeatclError, match="returned str"):
        select_features(*planted, selector=lambda sae, model, tokenizer: "best", k=4)
    with pytest.raises(FeatclError, match="feature 99 does not exist"):
        select_features(*planted, selector=lambda sae, model, tokenizer: [3, 99], k=1)
    whole = select_features(*planted, selector="ids", feature_ids=[1, 2])
    assert select_features(*planted, selector=lambda sae, model, tokenizer: whole).digest == whole.digest


def ordered(*features: int):
    def selector(sae, model, tokenizer):
        return list(features)

    selector.__name__ = "given_" + "_".join(map(str, features))
    return selector


@pytest.mark.parametrize(
    ("how", "k", "expected"),
    [
        ("union", 4, (1, 4, 2, 3)),  # ranks 1 1 2 3; of 1 and 4, 1 has the better mean
        ("intersection", 2, (2, 1)),  # worst ranks 2 and 3; 3 and 4 are in one list only
        ("rank", 4, (1, 2, 4, 3)),  # means 2, 2, 2.5, 3.5; absent counts as rank 4
    ],
)
def test_combinations_by_hand(planted, how, k, expected):
    from featcl.features.selectors import intersection, rank_aggregation, union

    members = [ordered(1, 2, 3), ordered(4, 2, 1)]
    found = select_features(*planted, selector={how: members}, k=k)
    assert found.feature_ids == expected
    function = {"union": union, "intersection": intersection, "rank": rank_aggregation}[how]
    assert select_features(*planted, selector=function(*members), k=k).feature_ids == expected


def test_combinations_nest_and_keep_scores(planted):
    texts = {
        "positive": sentences("z"),
        "negative": sentences("a"),
        "stream": sentences("z"),
        "background": sentences("a"),
    }
    spec = {"rank": ["contrast", {"union": ["rarity", "persona"]}]}
    found = select_features(*planted, selector=spec, k=3, **texts)
    assert found.feature_ids[0] == PLANTED
    assert found.selector == "rank(contrast, union(rarity, persona))"
    assert found.manifest["selector"] == spec
    assert {"contrast.effect", "union.rarity.tf_idf", "union.persona.cosine"} <= set(found.manifest["scores"])
    for wrong, says in (
        ({"unoin": ["contrast", "rarity"]}, "did you mean 'union'"),
        ({"union": ["contrast", "rarety"]}, "did you mean 'rarity'"),
        ({"union": ["contrast"]}, "two or more"),
        ({"union": "contrast"}, "two or more"),
        (["contrast"], "a name, a function"),
        ("contrats", "did you mean 'contrast'"),
    ):
        with pytest.raises(FeatclError, match=says):
            select_features(*planted, selector=wrong, k=3, **texts)
    with pytest.raises(FeatclError, match="lacks its stream"):
        select_features(*planted, selector={"union": ["ids", "rarity"]}, k=2, feature_ids=[1], background=["a"])


def test_config_knows_the_same_selectors():
    from featcl import config
    from featcl.features.selectors import COMBINATIONS

    assert tuple(SELECTORS) == config.SELECTORS
    assert config.COMBINATIONS == COMBINATIONS


def test_a_reviewed_list_has_a_reason_for_each_feature(planted, tmp_path):
    path = tmp_path / "reviewed.yaml"
    path.write_text("sae: test\nfeatures:\n- {id: 7, reason: fires on z, name: zed}\n- {id: 3, reason: why not}\n")
    found = select_features(*planted, selector="hand", reviewed=path)
    assert found.feature_ids == (7, 3)
    assert found.names == ("zed", "3")
    assert found.manifest["reasons"] == ["fires on z", "why not"]
    for text, says in (
        ("features: [{id: 7}]", r"entry 1: feature 7 lacks its reason"),
        ("features: [{id: 7, reason: ' '}]", "lacks its reason"),
        ("features: [{id: 7, resaon: x}]", "did you mean 'reason'"),
        ("features: [{reason: x}]", "lacks its id"),
        ("features: [{id: 48, reason: x}]", "feature 48 does not exist"),
        ("features: [{id: 1, reason: x}, {id: 1, reason: y}]", "twice"),
        ("features: []", "names no feature"),
        ("sae: other\nfeatures: [{id: 7, reason: x}]", "is of other, not of test"),
        ("[1, 2]", "expected `features:`"),
        ("features: [", "cannot read"),
    ):
        path.write_text(text)
        with pytest.raises(FeatclError, match=says) as caught:
            select_features(*planted, selector="hand", reviewed=path)
        assert "\n" not in str(caught.value)


# --- other sites, memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["hook_mlp_out", "attn.hook_z"])
def test_directions_of_other_sites_are_those_of_the_stream(sae, tiny, family, site):
    """Every selector by texts works there, and vectors are what the site's feature writes into the stream."""
    from featcl.features import hooks

    model, tokenizer = tiny(family)
    source = sae("standard", metadata={"hook_name": f"blocks.1.{site}", "prepend_bos": True, "source": "test"})
    texts = {
        "positive": sentences("z"),
        "negative": sentences("a"),
        "stream": sentences("z"),
        "background": sentences("a"),
    }
    for selector in ("contrast", "attribution", "gradient_energy", "rarity", "persona"):
        found = select_features(source, model, tokenizer, selector=selector, k=3, **texts)
        rows = hooks.to_residual(model, hooks.resolve(model, source), source.W_dec[list(found.feature_ids)])
        cosine = torch.nn.functional.cosine_similarity(found.vectors, rows, dim=-1)
        assert torch.allclose(cosine, torch.ones(3), atol=1e-5)
        assert (found.layer, found.hook_name, found.readers, found.encoder) == (1, f"blocks.1.{site}", None, None)
        assert found.manifest["hook"].startswith(f"blocks.1.{site} = model.layers.1.")
    if site == "attn.hook_z":
        raw = torch.nn.functional.cosine_similarity(found.vectors, source.W_dec[list(found.feature_ids)], dim=-1)
        assert raw.abs().max() < 0.9  # negative control: W_O turns them


def test_no_activation_is_kept(planted, monkeypatch):
    """However long the text: one batch of rows and one part of activations at a time."""
    from featcl.features import activity as module
    from featcl.features import encoder

    source, model, tokenizer = planted
    rows, parts, widest = [], [], 0
    capture, add_ = module.capture, module.WindowSums.add_

    def alive(references) -> int:
        return sum(reference() is not None for reference in references)

    def watched_capture(*args, **kwargs):
        [found] = capture(*args, **kwargs)
        rows.append(weakref.ref(found))
        assert alive(rows) <= limit
        return [found]

    def watched_add(self, feature_acts, owner):
        nonlocal widest
        parts.append(weakref.ref(feature_acts))
        widest = max(widest, feature_acts.numel() * 4)
        assert alive(parts) <= 2
        add_(self, feature_acts, owner)

    monkeypatch.setattr(module, "capture", watched_capture)
    monkeypatch.setattr(module.WindowSums, "add_", watched_add)
    monkeypatch.setattr(encoder, "CHUNK_BYTES", 4 * 48 * 100)
    limit, texts = 2, sentences("z", 1000)
    in_parts = activity(source, model, tokenizer, texts)
    assert len(rows) > 3
    assert widest <= 4 * 48 * 100
    monkeypatch.setattr(encoder, "CHUNK_BYTES", 2**24)
    at_once = activity(source, model, tokenizer, texts)
    assert torch.allclose(in_parts.mean, at_once.mean, atol=1e-6)
    assert torch.allclose(in_parts.variance, at_once.variance, atol=1e-6)
    with pytest.raises(AssertionError):  # negative control: keeping what is read is noticed
        list(module.hook_rows(source, model, tokenizer, texts))
