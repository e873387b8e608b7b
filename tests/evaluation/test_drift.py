"""Drift: nothing where nothing moved, the truth against plain loops where something did, and noise told from change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import featcl
from featcl.adapters import constrain
from featcl.adapters.full import constrain_full
from featcl.adapters.mixture import constrain_mixture
from featcl.adapters.osf import constrain_osf
from featcl.errors import FeatclError
from featcl.evaluation.drift import kl_drift, scaled, token_kl, weight_drift
from featcl.evaluation.feature_drift import feature_drift, sae_validity
from featcl.features import Directions
from tests.conftest import tiny_model, tiny_tokenizer
from tests.runs import make_sae

TEXTS = [f"line {number} of a quiet text about {word}" for number in range(6) for word in ("sea", "wood", "a house")]
KINDS = ("none", "write", "read", "both", "residual", "scale")


def directions(layer: int = 2, k: int = 6, seed: int = 0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    return Directions.from_vectors(torch.randn(k, 32, generator=generator), layer=layer)


def adapted(kind: str = "both", *, moved: float = 0.0, family: str = "olmo2") -> tuple[Any, Any]:
    adapter = constrain(tiny_model(family), directions(), kind=kind)
    move(adapter, moved)
    return adapter, tiny_tokenizer(family)


@torch.no_grad()
def move(adapter: Any, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        if size:
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


# --- predictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_has_not_moved_has_no_drift(kind: str) -> None:
    found = kl_drift(*adapted(kind), TEXTS)
    assert (found.forward, found.reverse, found.flipped) == (0.0, 0.0, 0.0)
    assert set(found.per_text) == {0.0}


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_kl_equals_a_plain_loop(family: str) -> None:
    adapter, tokenizer = adapted(moved=0.3, family=family)
    found = kl_drift(adapter, tokenizer, TEXTS, batch_tokens=100)
    sums, per_text = torch.zeros(4, dtype=torch.float64), []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            q = adapter.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with adapter.disabled():
                p = adapter.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        forward = (p.exp() * (p - q)).sum(-1)
        reverse = (q.exp() * (q - p)).sum(-1)
        flips = (p.argmax(-1) != q.argmax(-1)).double()
        sums += torch.stack([forward.sum(), reverse.sum(), flips.sum(), torch.tensor(len(p), dtype=torch.float64)])
        per_text.append(float(forward.mean()))
    assert found.tokens == sums[3]
    assert found.forward == pytest.approx(float(sums[0] / sums[3]), rel=1e-4)
    assert found.reverse == pytest.approx(float(sums[1] / sums[3]), rel=1e-4)
    assert found.flipped == pytest.approx(float(sums[2] / sums[3]))
    assert found.per_text == pytest.approx(per_text, rel=1e-4)
    assert found.forward > 0.01


def test_kl_grows_with_the_update_and_a_longer_text_is_cut() -> None:
    adapter, tokenizer = adapted(moved=0.2)
    sizes = []
    for scale in (0.0, 0.5, 1.0):
        with scaled(adapter, scale):
            sizes.append(kl_drift(adapter, tokenizer, ["a text of some length " * 4], context=16).forward)
    assert sizes[0] == 0.0 < sizes[1] < sizes[2]
    with pytest.raises(FeatclError, match="no two tokens in a row"):
        kl_drift(adapter, tokenizer, ["", "a"])


def test_token_kl_is_the_same_drift_piece_by_piece() -> None:
    adapter, tokenizer = adapted(moved=0.3)
    found = token_kl(adapter, tokenizer, TEXTS[0])
    assert "".join(found.pieces) == TEXTS[0]
    assert len(found.kl) == len(found.pieces)
    assert found.kl[0] == 0.0 < max(found.kl)
    whole = kl_drift(adapter, tokenizer, TEXTS[:1])
    assert sum(found.kl) / whole.tokens == pytest.approx(whole.forward, rel=1e-5)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "write", "both"])
def test_norms_are_those_of_the_merged_weights(kind: str) -> None:
    adapter, _ = adapted(kind, moved=0.1)
    base, merged = dict(tiny_model().named_parameters()), dict(adapter.merge().named_parameters())
    found = weight_drift(adapter)
    layers: dict[int, float] = {}
    for site, norm in found.sites.items():
        change = (merged[f"{site}.weight"] - base[f"{site}.weight"]).norm()
        assert norm == pytest.approx(float(change), rel=1e-4)
        assert found.relative[site] == pytest.approx(float(change / base[f"{site}.weight"].norm()), rel=1e-4)
        layer = int(site.split(".")[2])
        layers[layer] = layers.get(layer, 0.0) + norm**2
    assert found.layers == pytest.approx({layer: square**0.5 for layer, square in layers.items()})
    assert found.total == pytest.approx(adapter.delta_norm())
    assert set(found.record()) == {f"drift/delta_norm_{layer}" for layer in layers}


def test_norms_of_a_hook_kind_and_of_one_without_directions() -> None:
    adapter, _ = adapted("residual", moved=0.1)
    found = weight_drift(adapter)
    assert found.layers == pytest.approx({2: adapter.delta_norm()})
    assert found.relative == {}
    osf = constrain_osf(tiny_model(), layers=[1])
    assert weight_drift(osf).total == pytest.approx(osf.delta_norm(), abs=1e-4)
    with pytest.raises(FeatclError, match="'mixture' is another at every token"):
        weight_drift(constrain_mixture(tiny_model(), layers=[1]))


def test_of_full_fine_tuning_the_change_is_measured_and_scaled_not_the_weights() -> None:
    model = tiny_model()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = constrain_full(model)
    assert weight_drift(adapter).total == 0.0
    move(adapter, 0.01)
    found = weight_drift(adapter)
    assert found.total == pytest.approx(adapter.delta_norm())
    name = "model.layers.1.mlp.down_proj.weight"
    change = adapter.coordinates()[name] - base[name]
    assert found.sites[name] == pytest.approx(float(change.norm()), rel=1e-4)
    assert found.relative[name] == pytest.approx(float(change.norm() / base[name].norm()), rel=1e-4)
    assert sum(norm**2 for norm in found.layers.values()) < found.total**2, "the last norm is in no block"
    with scaled(adapter, 0.0):
        assert adapter.delta_norm() == pytest.approx(0.0, abs=1e-6)
    with scaled(adapter, 2.0):
        assert adapter.delta_norm() == pytest.approx(2 * found.total, rel=1e-4)
    assert adapter.delta_norm() == pytest.approx(found.total)


@pytest.mark.parametrize("kind", ["none", "write", "read", "both", "residual", "scale"])
def test_a_scaled_update_is_scaled_exactly_and_put_back(kind: str) -> None:
    adapter, tokenizer = adapted(kind, moved=0.2)
    before, norm = adapter.coordinates(), adapter.delta_norm()
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    for factor in (0.0, 0.5, 3.0):
        with scaled(adapter, factor):
            assert adapter.delta_norm() == pytest.approx(factor * norm, rel=1e-5)
            if factor == 0.0:
                with torch.no_grad():
                    now = adapter.model(input_ids=ids).logits
                    with adapter.disabled():
                        base = adapter.model(input_ids=ids).logits
                assert torch.allclose(now, base, atol=1e-5)
    assert all(torch.equal(adapter.coordinates()[name], value) for name, value in before.items())


def test_what_is_kept_is_scaled_with_it_and_what_cannot_be_is_refused() -> None:
    for kind in ("both", "residual"):
        adapter, _ = adapted(kind, moved=0.2)
        adapter.consolidate(directions(seed=5))
        move(adapter, 0.1)
        norm = adapter.delta_norm()
        with scaled(adapter, 2.0):
            assert adapter.delta_norm() == pytest.approx(2 * norm, rel=1e-5)
        assert adapter.delta_norm() == pytest.approx(norm, rel=1e-6)
    with (
        pytest.raises(FeatclError, match="kind 'osf' cannot be scaled"),
        scaled(constrain_osf(tiny_model(), layers=[1]), 2.0),
    ):
        pass


# --- features -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sae")
    make_sae(folder, layer=2)
    return featcl.load_sae(str(folder))


def along(sae: Any, feature: int, size: float) -> tuple[Any, Any]:
    """An adapter that adds one feature's encoder column to the stream everywhere: what that feature reads most."""
    chosen = Directions.from_vectors(sae.W_enc.detach().T[[feature]], layer=2)
    adapter = constrain(tiny_model(), chosen, kind="shift")
    with torch.no_grad():
        adapter.parameters()[0].fill_(size)
    return adapter, tiny_tokenizer()


def test_no_feature_of_an_unmoved_model_has_drifted(sae: Any) -> None:
    found = feature_drift(sae, *along(sae, 3, 0.0), TEXTS)
    assert (found.n_changed, found.features, found.relative) == (0, (), 0.0)
    assert found.windows == len(TEXTS)


def test_the_sizes_are_those_of_a_plain_loop_and_the_largest_is_named(sae: Any) -> None:
    adapter, tokenizer = along(sae, 3, 8.0)
    found = feature_drift(sae, adapter, tokenizer, TEXTS, names={3: "sea"}, top=5)
    means = []
    for off in (True, False):
        rows = []
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
            ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)  # as this SAE was trained
            with torch.no_grad():
                if off:
                    with adapter.disabled():
                        hidden = featcl.models.residual_stream(adapter.model, ids, layer=2)
                else:
                    hidden = featcl.models.residual_stream(adapter.model, ids, layer=2)
                rows.append(sae.encode(hidden[0, 1:]).double().mean(0))
        means.append(torch.stack(rows).mean(0))
    for change in found.features:
        assert change.base == pytest.approx(float(means[0][change.feature_id]), rel=1e-4, abs=1e-6)
        assert change.now == pytest.approx(float(means[1][change.feature_id]), rel=1e-4, abs=1e-6)
        assert change.low <= change.difference <= change.high
    assert len(found.features) == 5
    pushed = next(change for change in found.features if change.feature_id == 3)
    assert pushed.changed
    assert (pushed.name, pushed.difference > 0) == ("sea", True)
    assert found.n_changed >= 1
    assert found.record()["drift/features_relative"] > 0.05
    assert found.to_dicts()[0]["difference"] == found.features[0].difference


def test_a_feature_changes_where_it_leaves_the_noise_and_not_before(sae: Any) -> None:
    counts = [feature_drift(sae, *along(sae, 3, size), TEXTS).n_changed for size in (1e-3, 8.0)]
    assert counts[0] == 0 < counts[1]


def test_other_text_of_the_same_kind_is_noise(sae: Any) -> None:
    """The floor's promise: of comparisons where nothing but the text differs, about one in twenty shows a change."""
    from featcl.evaluation.feature_drift import _noise_floor

    generator = torch.Generator().manual_seed(0)
    false = 0
    for _ in range(40):
        rows = torch.randn(2 * 24, 30, generator=generator, dtype=torch.float64).exp()
        rows *= torch.rand(rows.shape, generator=generator, dtype=torch.float64) < 0.5  # skewed and sparse, as features
        difference = rows[:24].mean(0) - rows[24:].mean(0)
        false += bool((difference.abs() > _noise_floor(rows, 24, generator)).any())
        rows[:24, 0] += 6.0  # control: a real change is found
        difference = rows[:24].mean(0) - rows[24:].mean(0)
        assert (difference.abs() > _noise_floor(rows, 24, generator))[0]
    assert false <= 7  # P(more | 5 %) < 0.001


def test_the_same_seed_gives_the_same_drift(sae: Any) -> None:
    found = [feature_drift(sae, *along(sae, 3, 4.0), TEXTS, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]
    with pytest.raises(FeatclError, match="3 windows of background text say too little"):
        feature_drift(sae, *along(sae, 3, 4.0), TEXTS[:3])


def test_an_sae_fits_worse_as_the_update_grows() -> None:
    """The laboratory's SAE, which fits its base model, on an update that has nothing to do with its features."""
    model, tokenizer = featcl.load_model("lab/olmo2")
    sae = featcl.load_sae("lab/olmo2/resid_post_3")
    generator = torch.Generator().manual_seed(0)
    adapter = constrain(model, Directions.from_vectors(torch.randn(8, 160, generator=generator), layer=3), kind="write")
    move(adapter, 0.5)
    texts = ["lena likes red.", "what is 3 plus 4?", "the lamp in the kitchen is on.", "oscar has a parrot."] * 4
    found = sae_validity(sae, adapter, tokenizer, texts, scales=(0.0, 1.0, 4.0), max_tokens=200)
    assert [each.scale for each in found] == [0.0, 1.0, 4.0]
    norms = [each.delta_norm for each in found]
    assert norms == pytest.approx([0.0, norms[1], 4 * norms[1]], rel=1e-5)
    fvu = [each.health.fvu for each in found]
    assert fvu[0] < fvu[1] < fvu[2]
    assert found[2].health.loss_recovered < found[0].health.loss_recovered
    with adapter.disabled():
        base = featcl.check_sae(sae, model, tokenizer, texts, max_tokens=200, strict=False)
    assert found[0].health.fvu == pytest.approx(base.fvu, rel=1e-5)
