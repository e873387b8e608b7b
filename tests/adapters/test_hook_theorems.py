"""What the hook kinds promise, on every family, after 20 AdamW steps on norms whose gains are far from 1."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from featcl.adapters import constrain
from featcl.adapters.hook_report import link_table
from featcl.adapters.hooked import activations
from featcl.features import FeatureEncoder
from featcl.subspace import Subspace, lowdin
from tests.adapters.gates import KINDS, directions_for, hooked, logits, streams

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3_conditional", "olmo", "olmo2", "olmo3", "llama", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_stays_in_the_span(zoo, family, kind):
    adapter = zoo.train(hooked(zoo, family, kind))
    report = adapter.leak(*zoo.batch())
    assert adapter.delta_norm() > 1e-3
    assert report.leak <= 1e-6
    assert report.rescale == 0.0
    assert report.tokens == 3 * 12 - 4 - 3  # neither padding nor start tokens
    roles = {name: site.role for name, site in report.per_site.items()}
    path = adapter.sites[0].name
    reads = {f"{path}.read": "read"} if kind in ("residual", "scale") else {}
    assert roles == {path: "write"} | reads
    assert report.total_change_outside < 1e-2  # float32 rounding of h + update, nothing more


@pytest.mark.parametrize("kind", KINDS)
def test_control_a_basis_that_is_not_the_chosen_one_leaks(zoo, kind):
    """The same assertion fails when Q_w spans something else."""
    adapter = zoo.train(hooked(zoo, "gemma2", kind))
    adapter.sites[0].write_basis = Subspace.random(32, 6, seed=9).basis
    report = adapter.leak(*zoo.batch())
    assert report.leak > 0.5
    assert report.total_change_outside > 0.5


def test_control_the_read_side_leaks_with_another_basis(zoo):
    adapter = zoo.train(hooked(zoo, "llama", "residual"))
    adapter.sites[0].read_basis = Subspace.random(32, 6, seed=9).basis
    report = adapter.leak(*zoo.batch())
    assert report.per_site[adapter.sites[0].name].leak <= 1e-6
    assert report.leak == report.per_site[f"{adapter.sites[0].name}.read"].leak > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_changes_nothing_at_the_hook_where_no_chosen_feature_fires(zoo, family):
    adapter = zoo.train(hooked(zoo, family, "gated"))
    ids, mask = zoo.batch()
    base, changed = streams(adapter, ids, mask)
    fires = (adapter.sites[0].encoder(base) > 0).any(-1)
    assert 0.05 < fires[mask.bool()].float().mean() < 0.6
    assert torch.equal(changed[~fires], base[~fires])
    moved = (changed[fires] != base[fires]).any(-1)
    assert moved.float().mean() > 0.5  # a feature that fired only where nothing is predicted has learned nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_leaves_sequences_alone_where_no_chosen_feature_fires(zoo, family):
    model = zoo.model(family)
    directions = directions_for(zoo, model, fires=0.03)
    adapter = zoo.train(constrain(model, directions, kind="gated"))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 64, (40, 3), generator=generator)
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    with adapter.disabled():
        before = logits(adapter.model, ids, mask)
    base, _ = streams(adapter, ids, mask)
    fires = (adapter.sites[0].encoder(base) > 0).any(-1).any(-1)
    after = logits(adapter.model, ids, mask)
    assert 2 <= int(fires.sum()) <= 38
    assert torch.equal(after[~fires], before[~fires])
    assert (after[fires] != before[fires]).flatten(1).any(-1).float().mean() > 0.5


@pytest.mark.parametrize("kind", ["residual", "shift", "scale"])
def test_control_the_other_kinds_change_tokens_where_no_feature_fires(zoo, kind):
    adapter = zoo.train(hooked(zoo, "olmo2", kind))
    base, changed = streams(adapter, *zoo.batch())
    fires = (adapter.sites[0].plan.directions.encoder(base) > 0).any(-1)
    assert not torch.equal(changed[~fires], base[~fires])


def test_residual_reacts_to_nothing_orthogonal_to_the_features(zoo):
    adapter = zoo.train(hooked(zoo, "olmo2", "residual"))
    stream = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    span = lowdin(adapter.sites[0].plan.directions.readers, dtype=torch.float64).basis
    orthogonal = stream - (stream @ span) @ span.T
    with torch.no_grad():
        moved, still = (float(adapter.sites[0](x.float()).double().norm()) for x in (stream, orthogonal))
    assert still <= 1e-6 * moved
    other = Subspace.random(32, 6, seed=9)
    with torch.no_grad():
        control = float(adapter.sites[0](other.reject(stream.float())).double().norm())
    assert control > 0.1 * moved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gemma2", "olmo"])
def test_protect_leaves_directions_unwritten_and_stays_in_the_span(zoo, family, kind):
    model = zoo.model(family)
    directions = directions_for(zoo, model)
    mixed = torch.cat([directions.vectors[:1] + directions.vectors[1:2], torch.randn(1, 32)])
    protected = Subspace.from_vectors(mixed)
    adapter = zoo.train(constrain(model, directions, kind=kind, protect={"write": protected}))
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    base, _ = streams(adapter, *zoo.batch())
    with torch.no_grad():
        written = adapter.sites[0](base).double()
    assert float(written.norm()) > 1e-3
    assert float((written @ protected.basis.double()).norm() / written.norm()) <= 1e-6
    free = zoo.train(hooked(zoo, family, kind))  # the control: without protecting, it is written onto
    with torch.no_grad():
        control = free.sites[0](base).double()
    assert float((control @ protected.basis.double()).norm() / control.norm()) > 1e-2


def test_protect_both_sides_of_residual(zoo):
    retained = Subspace.random(32, 3, seed=5)
    adapter = zoo.train(hooked(zoo, "gemma", "residual", protect=retained))
    site = adapter.sites[0]
    assert site.write_basis.shape == site.read_basis.shape == (32, 3)
    for basis in (site.write_basis, site.read_basis):
        assert float((retained.basis.double().T @ basis.double()).norm()) <= 1e-6
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


@pytest.mark.parametrize("kind", ["residual", "gated"])
def test_a_rank_below_k_keeps_every_promise_and_stays_linear(zoo, kind):
    adapter = zoo.train(hooked(zoo, "gemma2", kind, rank=2))
    site = adapter.sites[0]
    assert site.coordinates.shape == (6, 2)
    assert int(torch.linalg.matrix_rank(site.matrix(), atol=1e-6)) == 2
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    assert abs(adapter.delta_norm() - float(site.matrix().detach().norm())) <= 1e-6 * adapter.delta_norm()
    stream = torch.randn(20, 32)
    with torch.no_grad():
        whole = site(stream)
        site.coordinates /= 2
        half = site(stream)
    torch.testing.assert_close(2 * half, whole)
    other = hooked(zoo, "gemma2", kind, rank=2, seed=1)
    assert not torch.equal(other.sites[0].frame, site.frame)
    full = hooked(zoo, "gemma2", kind, rank=6)
    assert full.sites[0].frame is None


def test_residual_is_the_formula_and_the_table_is_the_update(zoo):
    """Q_w C Q_rᵀ = Dᵀ (M_w C M_r) E; raw coordinates are far off, and the norm is ‖C‖."""
    adapter = zoo.train(hooked(zoo, "qwen3", "residual"))
    site, directions = adapter.sites[0], adapter.sites[0].plan.directions
    write, read = lowdin(directions.vectors), lowdin(directions.readers)
    C = site.coordinates.detach()
    matrix = write.basis @ C @ read.basis.T
    base, changed = streams(adapter, *zoo.batch())
    torch.testing.assert_close(changed, base + base @ matrix.T, atol=1e-5, rtol=1e-5)
    table = link_table(site)
    torch.testing.assert_close(table, write.mixing @ C @ read.mixing, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(directions.vectors.T @ table @ directions.readers, matrix, atol=1e-6, rtol=1e-5)
    assert float((table - C).norm() / table.norm()) > 0.05
    assert abs(adapter.delta_norm() - float(matrix.norm())) <= 1e-5 * adapter.delta_norm()


@pytest.mark.parametrize("kind", ["gated", "shift", "scale"])
def test_the_other_kinds_are_their_formulas_and_tables(zoo, kind):
    adapter = zoo.train(hooked(zoo, "llama", kind))
    site, directions = adapter.sites[0], adapter.sites[0].plan.directions
    write = lowdin(directions.vectors)
    C = site.coordinates.detach()
    base, changed = streams(adapter, *zoo.batch())
    read = {"gated": directions.encoder(base), "shift": torch.ones(*base.shape[:2], 1)}
    table = link_table(site)
    if kind == "scale":
        update = ((base @ write.basis) * C) @ write.basis.T
        read["scale"] = base @ directions.vectors.T
        assert abs(adapter.delta_norm() - float((write.basis @ torch.diag(C) @ write.basis.T).norm())) <= 1e-5
    else:
        update = (read[kind] @ C.reshape(6, -1).T) @ write.basis.T
    torch.testing.assert_close(changed, base + update, atol=1e-5, rtol=1e-5)
    in_features = (read[kind] @ table.T) @ directions.vectors
    torch.testing.assert_close(in_features, update, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["residual", "gated", "shift", "scale"])
def test_the_table_is_exact_under_protect(zoo, kind):
    model = zoo.model("olmo3")
    directions = directions_for(zoo, model)
    protected = Subspace.from_vectors(torch.randn(2, 32, generator=torch.Generator().manual_seed(3)))
    adapter = zoo.train(constrain(model, directions, kind=kind, protect={"write": protected}))
    site, table = adapter.sites[0], link_table(adapter.sites[0])
    stream = torch.randn(20, 32)
    read = {
        "residual": stream @ directions.readers.T,
        "gated": directions.encoder(stream),
        "shift": torch.ones(20, 1),
        "scale": stream @ directions.vectors.T,
    }[kind]
    with torch.no_grad():
        update = site(stream)
    assert site.write_basis.shape == (32, 4)
    torch.testing.assert_close((read @ table.T) @ directions.vectors, update, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_gated_uses_saelens_own_activations(zoo, architecture):
    """The update is Q_w C times what SAELens' full encode gives for the chosen features, input processing included."""
    pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    from tests.features.conftest import make_sae

    options = {"k": 5, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    sae = make_sae(architecture, normalize_activations="layer_norm", **options)
    ids = (40, 3, 17, 8)
    encoder = FeatureEncoder.from_sae(sae, ids)
    directions = replace(zoo.directions(4), encoder=encoder, vectors=_unit(sae.W_dec[list(ids)]))
    adapter = constrain(zoo.model("gemma2"), directions, kind="gated")
    site = adapter.sites[0]
    with torch.no_grad():
        site.coordinates.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    base, changed = streams(adapter, *zoo.batch())
    feature_acts = sae.encode(base)[..., list(ids)]
    expected = base + feature_acts @ site.coordinates.detach().T @ site.write_basis.T
    assert 0 < (feature_acts > 0).float().mean() < 1
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-5)
    silent = (feature_acts == 0).all(-1)
    assert torch.equal(changed[silent], base[silent])


def _unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def test_topk_in_chunks_is_topk_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    encoder = FeatureEncoder(
        torch.randn(16, 40, generator=generator), torch.zeros(40), torch.zeros(16), None, "topk", 5, (3, 1, 30)
    )
    hidden = torch.randn(4, 25, 16, generator=generator, requires_grad=True)
    whole = encoder(hidden)
    (expected,) = torch.autograd.grad(whole.square().sum(), hidden)
    monkeypatch.setattr("featcl.adapters.hooked.CHUNK_ACTS", 40 * 7)
    parts = activations(encoder, hidden)
    torch.testing.assert_close(parts, whole)
    (found,) = torch.autograd.grad(parts.square().sum(), hidden)
    torch.testing.assert_close(found, expected)
    assert float(expected.norm()) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_leak_of_an_update_that_is_zero_is_not_a_number(zoo, kind):
    report = hooked(zoo, "gemma2", kind).leak(*zoo.batch())
    assert math.isnan(report.leak)
    assert math.isnan(report.rescale)
    assert math.isnan(report.total_change_outside)
    assert all(math.isnan(site.leak) for site in report.per_site.values())


@pytest.mark.parametrize("kind", KINDS)
def test_adding_and_taking_back_an_update_returns_to_the_start(zoo, kind):
    adapter = zoo.train(hooked(zoo, "olmo2", kind), steps=3)
    start = adapter.coordinates()
    zoo.train(adapter, steps=3)
    end = adapter.coordinates()
    assert adapter.linear
    assert adapter.add_(start, end, scale=-1.0) == "exact"
    for name, tensor in adapter.coordinates().items():
        assert float((tensor - start[name]).norm() / start[name].norm()) <= 1e-6
        assert float((end[name] - start[name]).norm() / start[name].norm()) > 1e-2


# --- changing the chosen set --------------------------------------------------------------------------------------


def _matrix(site):
    """The update as a matrix: of the stream, of the features' activations, or a column."""
    M = site.write_basis.double() @ site.matrix()
    return (M if site.read_basis is None else M @ site.read_basis.double().T).detach()


@pytest.mark.parametrize(("kind", "rank"), [*((kind, None) for kind in KINDS), ("residual", 2), ("gated", 2)])
def test_a_larger_set_carries_everything_over(zoo, kind, rank):
    """Features are added, so the old span lies in the new one and the update stays what it was."""
    model = zoo.model("gemma2")
    directions = directions_for(zoo, model, k=9)
    few = _first(directions, 6)
    adapter = zoo.train(constrain(model, few, kind=kind, rank=rank))
    before, parameter = logits(model, *zoo.batch()), adapter.parameters()[0]
    change = adapter.change_directions(directions)
    assert adapter.parameters()[0] is parameter
    assert adapter.sites[0].write_basis.shape == (32, 9)
    if kind == "scale":  # diag(c) in one basis is not diagonal in the other
        assert change.remainder > 0.01 * change.before
        assert change.before**2 == pytest.approx(change.carried**2 + change.remainder**2)
    else:
        assert change.remainder <= 1e-6 * change.before
        assert not adapter.sites[0].kept
        assert change.carried == pytest.approx(change.before, rel=1e-6)
    torch.testing.assert_close(logits(model, *zoo.batch()), before, atol=1e-4, rtol=1e-4)
    zoo.train(adapter)
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


def _first(directions, k):
    encoder = directions.encoder
    fewer = replace(
        encoder,
        W_enc=encoder.W_enc[:, :k].contiguous(),
        b_enc=encoder.b_enc[:k],
        threshold=encoder.threshold[:k],
        chosen=tuple(range(k)),
    )
    return replace(
        directions,
        vectors=directions.vectors[:k],
        readers=directions.readers[:k],
        feature_ids=directions.feature_ids[:k],
        names=directions.names[:k],
        encoder=fewer,
    )


@pytest.mark.parametrize(("kind", "rank"), [("residual", None), ("residual", 2), ("shift", None)])
@pytest.mark.parametrize("remainder", ["keep", "drop"])
def test_another_set_holds_the_projection_and_says_what_is_left(zoo, kind, rank, remainder):
    model = zoo.model("olmo2")
    protected = Subspace.random(32, 2, seed=6)
    adapter = constrain(
        model, directions_for(zoo, model), kind=kind, rank=rank, protect={"write": protected}, remainder=remainder
    )
    site = zoo.train(adapter).sites[0]
    old, before = _matrix(site), logits(model, *zoo.batch())
    change = adapter.change_directions(directions_for(zoo, model, seed=5))
    write, read = site.write_basis.double(), site.read_basis
    expected = write @ (write.T @ old)
    expected = expected if read is None else (expected @ read.double()) @ read.double().T
    torch.testing.assert_close(_matrix(site), expected, atol=1e-6, rtol=1e-5)
    assert change.remainder == pytest.approx(float((old - expected).norm()), rel=1e-4)
    assert 0.05 * change.before < change.carried < change.before
    assert (change.kept, adapter.changes) == (remainder == "keep", 1)
    after = logits(model, *zoo.batch())
    if remainder == "keep":
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
        assert adapter.delta_norm() == pytest.approx(change.before, rel=1e-5)
        assert adapter.kept_norm() == pytest.approx(change.remainder, rel=1e-5)
    else:
        assert float((after - before).abs().max()) > 1e-2
        assert adapter.delta_norm() == pytest.approx(change.carried, rel=1e-5)
        assert adapter.kept_norm() == 0.0
    assert float((protected.basis.double().T @ write).norm()) <= 1e-6, "what was protected stays so"
    zoo.train(adapter)
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_consolidating_freezes_what_was_learned_and_starts_from_zero(zoo, kind):
    adapter = zoo.train(hooked(zoo, "gemma2", kind))
    site, before, norm = adapter.sites[0], logits(adapter.model, *zoo.batch()), adapter.delta_norm()
    change = adapter.consolidate(directions_for(zoo, adapter.model, seed=8))
    assert not bool(site.coordinates.any())
    assert (change.before, change.carried, change.kept) == (norm, 0.0, True)
    torch.testing.assert_close(logits(adapter.model, *zoo.batch()), before, atol=1e-5, rtol=1e-5)
    assert adapter.parameters() == [site.coordinates]
    frozen = site.kept[0].coordinates.detach().clone()
    zoo.train(adapter)
    assert torch.equal(site.kept[0].coordinates, frozen)
    assert float(site.coordinates.detach().norm()) > 1e-3
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    assert float(adapter.distance_squared().detach()) == pytest.approx(adapter.delta_norm() ** 2, rel=1e-4)
    with adapter.disabled():
        assert torch.equal(logits(adapter.model, *zoo.batch()), logits(zoo.model("gemma2"), *zoo.batch()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_saved_and_loaded_and_enters_the_coordinates(zoo, tmp_path, kind):
    from featcl.adapters import load_adapter

    adapter = zoo.train(hooked(zoo, "olmo2", kind))
    adapter.change_directions(directions_for(zoo, adapter.model, seed=5))
    zoo.train(adapter)
    adapter.consolidate()
    zoo.train(adapter, steps=3)
    assert len(adapter.sites[0].kept) == 3
    adapter.save(tmp_path)
    loaded = load_adapter(tmp_path, zoo.model("olmo2"))
    moved = logits(adapter.model, *zoo.batch())
    assert torch.equal(logits(loaded.model, *zoo.batch()), moved)
    assert (loaded.changes, loaded.delta_norm()) == (2, adapter.delta_norm())
    assert not any(earlier.coordinates.requires_grad for earlier in loaded.sites[0].kept)
    coordinates = adapter.coordinates()
    assert len(coordinates) == 4
    zeros = {name: torch.zeros_like(tensor) for name, tensor in coordinates.items()}
    adapter.load_coordinates_(zeros)
    assert adapter.delta_norm() == 0.0
    adapter.load_coordinates_(coordinates)
    assert torch.equal(logits(adapter.model, *zoo.batch()), moved)


def test_gated_columns_follow_their_features(zoo):
    model = zoo.model("olmo2")
    directions = directions_for(zoo, model)
    adapter = zoo.train(constrain(model, directions, kind="gated"))
    site = adapter.sites[0]
    C = site.coordinates.detach().clone()
    order = [5, 3, 1]
    kept = replace(
        directions,
        vectors=directions.vectors[order],
        readers=directions.readers[order],
        feature_ids=tuple(directions.feature_ids[i] for i in order),
        names=None,
        encoder=replace(
            directions.encoder,
            W_enc=directions.encoder.W_enc[:, order].contiguous(),
            b_enc=directions.encoder.b_enc[order],
            threshold=directions.encoder.threshold[order],
            chosen=(0, 1, 2),
        ),
    )
    old_basis = lowdin(directions.vectors).basis
    change = adapter.change_directions(kept)
    expected = lowdin(kept.vectors).basis.T @ old_basis @ C[:, order]
    torch.testing.assert_close(site.coordinates.detach(), expected, atol=1e-6, rtol=1e-5)
    assert change.remainder > 0


def test_a_change_turns_the_first_moment_and_resets_the_second(zoo):
    model = zoo.model("olmo2")
    adapter = constrain(model, zoo.directions(), kind="residual")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        zoo.loss(model, *zoo.batch()).backward()
        optimizer.step()
    site, parameter = adapter.sites[0], adapter.parameters()[0]
    moment = optimizer.state[parameter]["exp_avg"].clone()
    left, right = site.write_basis.clone(), site.read_basis.clone()
    adapter.change_directions(zoo.directions(8, seed=2), optimizer=optimizer)
    found = optimizer.state[parameter]["exp_avg"]
    expected = (site.write_basis.T @ left) @ moment @ (right.T @ site.read_basis)
    scale = (found * expected).sum() / expected.square().sum()  # the bias correction
    torch.testing.assert_close(found, scale * expected, atol=1e-7, rtol=1e-4)
    assert float(optimizer.state[parameter]["step"]) == 1.0  # a first step, whose gradient was the turned mean
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], 0.001 * (found / 0.1).square())
    optimizer.zero_grad()
    zoo.loss(model, *zoo.batch()).backward()
    optimizer.step()
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


def test_a_change_to_other_blocks_is_an_error_and_changes_nothing(zoo):
    from featcl.errors import FeatclError

    adapter = zoo.train(hooked(zoo, "olmo2", "residual"), steps=2)
    before = adapter.coordinates()
    with pytest.raises(FeatclError, match=r"at the output of block \[1\], the adapter is at \[2\]"):
        adapter.change_directions(zoo.directions(layer=1))
    with pytest.raises(FeatclError, match="remainder 'lose' is not available"):
        adapter.change_directions(zoo.directions(), remainder="lose")
    assert adapter.changes == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.coordinates().items())


@pytest.mark.parametrize("kind", KINDS)
def test_near_dependent_features_are_dropped_on_request(zoo, kind):
    model = zoo.model("olmo2")
    directions = directions_for(zoo, model)
    twin = directions.vectors.clone()
    twin[4] = twin[1]
    directions = replace(directions, vectors=twin)
    adapter = zoo.train(constrain(model, directions, kind=kind, near_dependent="drop"))
    site = adapter.sites[0]
    assert site.write_basis.shape == (32, 5)
    assert 104 not in {row.writes for row in adapter.report(50).rows}
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    if kind == "gated":
        assert site.encoder.k == 6
        assert site.plan.gate.feature_ids[4] == 104
