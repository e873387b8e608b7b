"""What the constraint promises, on every family, after 20 AdamW steps on norms whose gains are far from 1."""

from __future__ import annotations

import math

import pytest
import torch

from featcl.adapters import constrain
from featcl.adapters.report import feature_table
from featcl.subspace import Subspace, lowdin

POST_NORM = ("gemma2", "gemma3", "olmo2", "olmo3")
GAINED_READERS = ("gemma", "gemma2", "gemma3", "llama", "qwen3")
FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3_conditional", "olmo", "olmo2", "olmo3", "llama", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_stay_in_the_span_and_reads_in_the_row_space(zoo, family):
    adapter = zoo.train(constrain(zoo.model(family), zoo.directions(), kind="both"))
    report = adapter.leak(*zoo.batch())
    assert report.leak <= 1e-6
    assert {site.role for site in report.per_site.values()} == {"write", "read"}
    assert all(site.leak <= 1e-6 for site in report.per_site.values())
    assert report.tokens == 3 * 12 - 4 - 3  # neither padding nor start tokens


@pytest.mark.parametrize("family", POST_NORM)
def test_control_without_folding_the_write_leaks(zoo, family):
    adapter = zoo.train(constrain(zoo.model(family), zoo.directions(), kind="write", fold_norms=False))
    report = adapter.leak(*zoo.batch())
    assert report.leak > 0.2
    assert all(site.leak > 0.2 for site in report.per_site.values())


@pytest.mark.parametrize("family", ["gemma", "olmo", "llama", "qwen3"])
def test_without_post_norm_folding_changes_nothing_for_writers(zoo, family):
    folded, plain = (
        zoo.train(constrain(zoo.model(family), zoo.directions(), kind="write", fold_norms=fold))
        for fold in (True, False)
    )
    assert folded.leak(*zoo.batch()) == plain.leak(*zoo.batch())
    assert folded.leak(*zoo.batch()).rescale == 0.0


def test_plain_lora_leaks(zoo):
    adapter = zoo.train(constrain(zoo.model("llama"), zoo.directions(), kind="none"))
    report = adapter.leak(*zoo.batch())
    assert min(site.leak for site in report.per_site.values()) > 0.5


def test_post_norm_rescales_the_base_write_and_says_by_how_much(zoo):
    report = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind="write")).leak(*zoo.batch())
    assert 0.0 < report.rescale < 0.9
    assert 0.0 < report.total_change_outside < 1.0


def test_leak_of_an_update_that_is_zero_is_not_a_number(zoo):
    report = constrain(zoo.model("gemma2"), zoo.directions()).leak(*zoo.batch())
    assert math.isnan(report.leak)
    assert all(math.isnan(site.leak) for site in report.per_site.values())
    assert math.isnan(report.total_change_outside)


def reaction(adapter, site, vectors):
    """What the update makes of residuals orthogonal to `vectors`, as a share of what it makes of unrestricted ones."""
    stream = torch.randn(50, vectors.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    span = lowdin(vectors, dtype=torch.float64).basis
    orthogonal = stream - (stream @ span) @ span.T
    a, b = site.factors()
    update, norm = b.double() @ a.double(), site.plan.site.norm_name
    sizes = []
    for residual in (orthogonal, stream):
        seen = residual.float()
        seen = seen if norm is None else adapter.model.get_base_model().get_submodule(norm)(seen)
        sizes.append(float((seen.double() @ update.T).norm()))
    return sizes[0] / sizes[1]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "olmo", "olmo2", "olmo3", "llama", "qwen3"])
def test_read_reacts_to_nothing_orthogonal_to_the_features(zoo, family):
    directions = zoo.directions()
    adapter = zoo.train(constrain(zoo.model(family), directions, kind="read"))
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    assert max(reaction(adapter, site, directions.readers) for site in adapter.sites) <= 1e-6


@pytest.mark.parametrize("family", [*GAINED_READERS, "olmo"])
def test_control_without_folding_the_read_reacts(zoo, family):
    """On OLMo-1 only the mean is folded: a basis that is not orthogonal to the ones vector reacts to it."""
    directions = zoo.directions()
    adapter = zoo.train(constrain(zoo.model(family), directions, kind="read", fold_norms=False))
    assert min(reaction(adapter, site, directions.readers) for site in adapter.sites) > 0.1


@pytest.mark.parametrize("family", ["gemma2", "olmo", "olmo2"])
def test_protect_leaves_directions_unwritten_and_stays_in_the_span(zoo, family):
    directions = zoo.directions()
    mixed = torch.cat([directions.vectors[:1] + directions.vectors[1:2], torch.randn(1, 32)])
    protected = Subspace.from_vectors(mixed)
    adapter = zoo.train(constrain(zoo.model(family), directions, kind="both", protect={"write": protected}))
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    for site in adapter.sites:
        if site.plan.role == "write":
            written = site.plan.fold.to_stream(site.factors()[1])  # g ⊙ Q
            assert written.shape[1] == 6
            assert float((protected.basis.double().T @ written).norm() / written.norm()) <= 1e-6


def test_protected_reads_do_not_react_to_what_is_retained(zoo):
    retained = Subspace.random(32, 3, seed=5)
    adapter = zoo.train(constrain(zoo.model("gemma"), zoo.directions(), kind="read", protect=retained))
    for site in adapter.sites:
        read = site.plan.fold.to_stream(site.factors()[0].T)
        assert float((retained.basis.double().T @ read).norm() / read.norm()) <= 1e-6


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "olmo"])
@pytest.mark.parametrize("kind", ["write", "read", "both"])
def test_a_rank_below_k_keeps_every_promise(zoo, family, kind):
    adapter = zoo.train(constrain(zoo.model(family), zoo.directions(), kind=kind, rank=2))
    assert all(site.factors()[0].shape[0] == 2 for site in adapter.sites)
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


def test_the_feature_table_is_the_update(zoo):
    """D'ᵀ (M_w C) = ΔW with D' = D ⊘ g, and (C M_r) E' = ΔW; raw coordinates are far off."""
    directions = zoo.directions()
    adapter = zoo.train(constrain(zoo.model("gemma2"), directions, kind="both"))
    for site in adapter.sites:
        a, b = site.factors()
        table, gain = feature_table(site), site.plan.site.gain
        rows = directions.vectors if site.plan.role == "write" else directions.readers
        rebuilt = (rows / gain).T @ table if site.plan.role == "write" else table.T @ (rows / gain)
        torch.testing.assert_close(rebuilt, b @ a, atol=1e-6, rtol=1e-5)
        folded = lowdin(rows / gain)
        raw = a if site.plan.role == "write" else b.T
        torch.testing.assert_close(table, folded.mixing @ raw, atol=1e-6, rtol=1e-5)
        assert float((table - raw).norm() / table.norm()) > 0.1


def test_all_of_the_stream_reproduces_full_fine_tuning(zoo):
    """k = d_model with Q = I: coordinates are the matrix, so AdamW takes the same steps."""
    from featcl.features import Directions

    everything = Directions.from_vectors(torch.eye(32), layer=2)
    adapter = constrain(zoo.model("llama"), everything, kind="write")
    full = zoo.model("llama")
    names = [site.name for site in adapter.sites]
    weights = [full.get_submodule(name).weight.requires_grad_(True) for name in names]
    start = [weight.detach().clone() for weight in weights]
    zoo.train(adapter, steps=5, lr=1e-3)
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        zoo.loss(full, *zoo.batch()).backward()
        optimizer.step()
    for site, weight, before in zip(adapter.sites, weights, start, strict=True):
        a, b = site.factors()
        assert float((b @ a - (weight.detach() - before)).norm() / (b @ a).norm()) <= 1e-3


def test_a_gain_that_cannot_be_inverted_is_clamped_named_and_exempt(zoo):
    model = zoo.model("olmo2")
    norm = "model.layers.2.post_attention_layernorm"
    model.get_submodule(norm).weight.data[7] = 0.0
    adapter = zoo.train(constrain(model, zoo.directions(), kind="write"))
    exempt = "model.layers.2.self_attn.o_proj"
    report = adapter.leak(*zoo.batch())
    assert adapter.exempt == report.exempt == (exempt,)
    assert report.leak <= 1e-6 < report.per_site[exempt].leak
    assert report.per_site[exempt].clamped == (7,)
