"""Changing the chosen directions of an adapter that has learned, and freezing it to go on from zero on top."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featcl.adapters import constrain
from featcl.adapters.kept import concatenated
from featcl.errors import FeatclError
from featcl.features import Directions
from tests.adapters.gates import directions_for


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def matrices(adapter):
    return {site.name: (b @ a).double() for site in adapter.sites for a, b in [site.factors()]}


def some(directions, rows):
    return Directions.from_vectors(
        directions.vectors[rows],
        readers=directions.readers[rows],
        layer=directions.layer,
        feature_ids=[directions.feature_ids[row] for row in rows],
    )


def trained(zoo, adapter, *, steps=10):
    """The adapter after AdamW steps, and its optimizer."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    advance(zoo, adapter, optimizer, steps)
    assert min(adapter.delta_norms().values()) > 1e-3
    return adapter, optimizer


def advance(zoo, adapter, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        zoo.loss(adapter.model, *zoo.batch()).backward()
        optimizer.step()


def relative(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", ["write", "read", "both"])
@pytest.mark.parametrize(("rank", "training"), [(None, "coordinates"), (3, "coordinates"), (3, "train_both_factors")])
@pytest.mark.parametrize("k_new", [4, 6, 9])
def test_what_the_new_span_holds_is_carried_over_and_the_rest_is_kept(zoo, kind, rank, training, k_new):
    """ΔW' = Q'Q'ᵀ ΔW + the rest, so nothing the model computes changes; what goes on training is in the new span."""
    adapter = constrain(zoo.model("gemma2"), zoo.directions(), kind=kind, rank=rank, training=training)
    adapter, optimizer = trained(zoo, adapter)
    before, start = matrices(adapter), logits(adapter.model, *zoo.batch())
    change = adapter.change_directions(zoo.directions(k_new, seed=7), remainder="keep", optimizer=optimizer)
    for name, matrix in matrices(adapter).items():
        assert relative(matrix, before[name]) <= 1e-6
    assert float((logits(adapter.model, *zoo.batch()) - start).abs().max()) <= 1e-5
    for site in adapter.sites:
        a, b = (factor.double() for factor in site.moving_factors())
        basis, whole = site.plan.fold.basis, before[site.name]
        inside = basis @ basis.T @ whole if site.plan.role == "write" else whole @ basis @ basis.T
        assert relative(b @ a, inside) <= 1e-6
    assert change.kept
    assert change.before == pytest.approx((change.carried**2 + change.remainder**2) ** 0.5, rel=1e-5)
    assert min(change.carried, change.remainder) > 0.01 * change.before
    assert change.rank == max(len(site.factors()[0]) for site in adapter.sites) > adapter.rank
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    advance(zoo, adapter, optimizer, 5)
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    assert adapter.kept_norm() == pytest.approx(change.remainder, rel=1e-5)
    assert max(relative(matrix, before[name]) for name, matrix in matrices(adapter).items()) > 1e-2


@pytest.mark.parametrize("kind", ["write", "read"])
def test_dropping_leaves_only_what_the_new_span_holds(zoo, kind):
    adapter, _ = trained(zoo, constrain(zoo.model("olmo2"), zoo.directions(), kind=kind, remainder="drop"))
    before = matrices(adapter)
    change = adapter.change_directions(zoo.directions(4, seed=7))  # as the adapter was made
    assert not change.kept
    assert adapter.kept_norm() == 0.0
    for site in adapter.sites:
        basis, whole = site.plan.fold.basis, before[site.name]
        inside = basis @ basis.T @ whole if kind == "write" else whole @ basis @ basis.T
        assert relative(matrices(adapter)[site.name], inside) <= 1e-6
        assert relative(inside, whole) > 0.1


def test_a_wider_set_loses_nothing_and_going_back_is_exact(zoo):
    directions = zoo.directions(8)
    few, all_of_them = some(directions, [0, 1, 2, 3, 4]), directions
    adapter, _ = trained(zoo, constrain(zoo.model("olmo2"), few, kind="both"))
    before = matrices(adapter)
    change = adapter.change_directions(all_of_them)
    assert change.remainder <= 1e-6 * change.before
    assert adapter.kept_norm() == 0.0
    assert adapter.rank == change.rank == 8
    back = adapter.change_directions(few)
    assert back.remainder <= 1e-5 * back.before
    assert all(relative(matrix, before[name]) <= 1e-6 for name, matrix in matrices(adapter).items())
    assert adapter.changes == 2


def test_a_rank_below_k_becomes_a_full_one_where_the_new_set_is_that_small(zoo):
    adapter, optimizer = trained(zoo, constrain(zoo.model("olmo2"), zoo.directions(), kind="both", rank=4))
    before = matrices(adapter)
    adapter.change_directions(zoo.directions(3, seed=2), optimizer=optimizer)
    assert adapter.rank == 3
    assert all(relative(matrix, before[name]) <= 1e-6 for name, matrix in matrices(adapter).items())
    advance(zoo, adapter, optimizer, 3)
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


def test_nothing_of_the_old_factors_stays_on_the_layers(zoo):
    model = zoo.model("olmo2")
    adapter, _ = trained(zoo, constrain(model, zoo.directions(), kind="both", rank=3))

    def hooks():
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    assert before > 0
    adapter.change_directions(zoo.directions(5, seed=7))
    assert hooks() == before
    second = constrain(model, zoo.directions(), kind="write", name="second")
    adapter.remove()
    assert hooks() == 0
    second.remove()
    assert hooks() == 0


def test_the_first_moment_rotates_and_the_second_is_reset(zoo):
    """The bias-corrected mean gradient is carried over as C is; the next step is no larger than a usual one."""
    adapter, optimizer = trained(zoo, constrain(zoo.model("llama"), zoo.directions(), kind="write"), steps=30)
    site, parameter = adapter.sites[0], adapter.parameters()[0]
    mean = optimizer.state[parameter]["exp_avg"] / (1 - 0.9**30)
    old = site.plan.fold.basis
    adapter.change_directions(zoo.directions(4, seed=7), optimizer=optimizer)
    assert parameter is adapter.parameters()[0]
    new, state = adapter.sites[0].plan.fold.basis, optimizer.state[parameter]
    rotated = (new.T @ old @ mean.double()).float()
    assert float(state["step"]) == 1.0
    torch.testing.assert_close(state["exp_avg"] / (1 - 0.9), rotated, atol=1e-9, rtol=1e-5)
    torch.testing.assert_close(state["exp_avg_sq"], 0.001 * rotated.square(), atol=0, rtol=1e-4)
    before = parameter.detach().clone()
    advance(zoo, adapter, optimizer, 1)
    assert float((parameter.detach() - before).abs().max()) <= 1.1 * 1e-2  # Adam's own bound is about lr


def test_control_a_second_moment_of_zeros_beside_a_first_one_makes_huge_steps(zoo):
    adapter, optimizer = trained(zoo, constrain(zoo.model("llama"), zoo.directions(), kind="write"), steps=30)
    parameter = adapter.parameters()[0]
    adapter.change_directions(zoo.directions(4, seed=7), optimizer=optimizer)
    optimizer.state[parameter]["exp_avg_sq"].zero_()
    before = parameter.detach().clone()
    advance(zoo, adapter, optimizer, 1)
    assert float((parameter.detach() - before).abs().max()) > 10 * 1e-2


def test_without_the_rotation_the_moments_would_not_fit(zoo):
    adapter, optimizer = trained(zoo, constrain(zoo.model("llama"), zoo.directions(), kind="write"))
    adapter.change_directions(zoo.directions(4, seed=7))  # no optimizer given: its old moments have another shape
    with pytest.raises(RuntimeError, match="size"):
        advance(zoo, adapter, optimizer, 1)


def test_momentum_rotates_too(zoo):
    adapter = constrain(zoo.model("llama"), zoo.directions(), kind="read")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, momentum=0.9)
    advance(zoo, adapter, optimizer, 3)
    parameter, old = adapter.parameters()[0], adapter.sites[0].plan.fold.basis
    buffer = optimizer.state[parameter]["momentum_buffer"].clone()
    adapter.change_directions(zoo.directions(5, seed=7), optimizer=optimizer)
    new = adapter.sites[0].plan.fold.basis
    expected = (buffer.double() @ old.T @ new).float()
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], expected, atol=1e-9, rtol=1e-5)


def test_an_optimizer_of_something_else_is_refused(zoo):
    adapter, _ = trained(zoo, constrain(zoo.model("llama"), zoo.directions(), kind="write"))
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(FeatclError, match="does not train this adapter"):
        adapter.change_directions(zoo.directions(4, seed=7), optimizer=other)


@pytest.mark.parametrize("kind", ["both", "residual", "shift"])
def test_a_loss_that_is_still_held_does_not_hold_the_old_shape(zoo, kind):
    adapter = constrain(zoo.model("llama"), zoo.directions(), kind=kind)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    advance(zoo, adapter, optimizer, 2)
    held = zoo.loss(adapter.model, *zoo.batch())
    held.backward()
    parameters = adapter.parameters()
    adapter.change_directions(zoo.directions(9, seed=7), optimizer=optimizer)
    optimizer.zero_grad()
    zoo.loss(adapter.model, *zoo.batch()).backward()
    optimizer.step()
    assert all(old is new for old, new in zip(parameters, adapter.parameters(), strict=True))
    assert all(parameter.grad.shape == parameter.shape for parameter in adapter.parameters())
    assert bool(held.isfinite())


# --- features of another encoder


def _topk(encoder):
    return replace(encoder, activation="topk", threshold=None, active=2)


@pytest.mark.parametrize("remainder", ["keep", "drop"])
@pytest.mark.parametrize(
    "other",
    [
        lambda encoder: replace(encoder, W_enc=1.5 * encoder.W_enc),
        lambda encoder: replace(encoder, b_enc=encoder.b_enc - 0.5),
        lambda encoder: replace(encoder, threshold=2 * encoder.threshold),
        lambda encoder: replace(encoder, b_dec=encoder.b_dec + 0.5),
        lambda encoder: replace(encoder, normalize="layer_norm"),
        _topk,
    ],
)
def test_the_same_id_of_another_encoder_is_another_feature(zoo, other, remainder):
    model = zoo.model("gemma2")
    directions = directions_for(zoo, model, fires=0.3)
    adapter, _ = trained(zoo, constrain(model, directions, kind="gated"))
    start = logits(model, *zoo.batch())
    change = adapter.change_directions(replace(directions, encoder=other(directions.encoder)), remainder=remainder)
    assert change.carried == 0.0
    assert change.remainder == pytest.approx(change.before, rel=1e-5)
    if remainder == "keep":
        assert float((logits(model, *zoo.batch()) - start).abs().max()) <= 1e-5
    assert adapter.delta_norm() == pytest.approx(change.before if remainder == "keep" else 0.0, rel=1e-5)


@pytest.mark.parametrize("competing", [False, True])
def test_a_copy_of_the_encoder_is_the_same_one(zoo, competing):
    model = zoo.model("gemma2")
    directions = directions_for(zoo, model, fires=0.3)
    if competing:
        directions = replace(directions, encoder=_topk(directions.encoder))
    adapter, _ = trained(zoo, constrain(model, directions, kind="gated"))
    encoder = replace(directions.encoder, W_enc=directions.encoder.W_enc.clone())
    change = adapter.change_directions(replace(directions, encoder=encoder))
    assert change.carried == pytest.approx(change.before, rel=1e-5)
    assert change.remainder <= 1e-5 * change.before


# --- the frozen part


def test_everything_knows_the_kept_part(zoo, tmp_path):
    """Disabled, merged, saved, restored: the second LoRA belongs to the adapter."""
    from peft import PeftModel

    base = logits(zoo.model("olmo2"), *zoo.batch())
    adapter, _ = trained(zoo, constrain(zoo.model("olmo2"), zoo.directions(), kind="both"))
    adapter.change_directions(zoo.directions(4, seed=7))
    zoo.train(adapter, steps=3)
    live = logits(adapter.model, *zoo.batch())
    with adapter.disabled():
        assert torch.equal(logits(adapter.model, *zoo.batch()), base)
    assert torch.equal(logits(adapter.model, *zoo.batch()), live)
    assert float((logits(adapter.merge(), *zoo.batch()) - live).abs().max()) <= 1e-5
    adapter.save(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.model("olmo2"), str(tmp_path))
    assert float((logits(loaded, *zoo.batch()) - live).abs().max()) <= 1e-5
    assert loaded.peft_config["default"].r == max(len(site.factors()[0]) for site in adapter.sites) == 4 + 6
    trainable = {id(tensor) for tensor in adapter.model.parameters() if tensor.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter.parameters()}
    coordinates = adapter.coordinates()
    for site in adapter.sites:
        for which in ("lora_A", "lora_B"):
            getattr(site.module, which).to(torch.bfloat16)
    assert not torch.equal(logits(adapter.model, *zoo.batch()), live)
    adapter.restore_()
    adapter.load_coordinates_(coordinates)  # what is trained has no master: it was rounded
    assert torch.equal(logits(adapter.model, *zoo.batch()), live)
    plain = adapter.remove()
    assert torch.equal(logits(plain, *zoo.batch()), base)


def test_coordinates_carry_the_kept_part_along(zoo):
    """So that versions and checkpoints restore all of the update, and never half of it."""
    adapter, optimizer = trained(zoo, constrain(zoo.model("olmo2"), zoo.directions(), kind="both"))
    fresh = adapter.coordinates()
    adapter.consolidate(optimizer=optimizer)
    advance(zoo, adapter, optimizer, 3)
    on_top, live = adapter.coordinates(), logits(adapter.model, *zoo.batch())
    adapter.load_coordinates_(fresh)
    assert adapter.kept_norm() == 0.0
    assert not torch.equal(logits(adapter.model, *zoo.batch()), live)
    adapter.load_coordinates_(on_top)
    assert torch.equal(logits(adapter.model, *zoo.batch()), live)
    broken = {name: tensor for name, tensor in on_top.items() if not name.endswith("kept_lora_A")}
    with pytest.raises(FeatclError, match="lack one of"):
        adapter.load_coordinates_(broken)
    assert torch.equal(logits(adapter.model, *zoo.batch()), live)


# --- consolidation


@pytest.mark.parametrize("training", ["coordinates", "train_both_factors"])
@pytest.mark.parametrize("new", [None, 7])
def test_a_finished_adapter_is_frozen_and_a_new_one_starts_on_top(zoo, training, new):
    adapter = constrain(zoo.model("gemma2"), zoo.directions(), kind="both", training=training)
    adapter, optimizer = trained(zoo, adapter)
    finished, live = matrices(adapter), logits(adapter.model, *zoo.batch())
    directions = None if new is None else zoo.directions(4, seed=new)
    change = adapter.consolidate(directions, optimizer=optimizer)
    assert (change.carried, change.kept) == (0.0, True)
    assert change.remainder == pytest.approx(change.before, rel=1e-5)
    assert float((logits(adapter.model, *zoo.batch()) - live).abs().max()) <= 1e-5
    assert not any(bool((b @ a).any()) for site in adapter.sites for a, b in [site.moving_factors()])
    advance(zoo, adapter, optimizer, 5)
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    for site in adapter.sites:
        assert relative(site.kept["lora_B"].double() @ site.kept["lora_A"].double(), finished[site.name]) <= 1e-6
    again = adapter.consolidate()
    assert again.before == pytest.approx(again.remainder, rel=1e-5)
    assert again.before != pytest.approx(change.before, rel=1e-3)


def test_concatenated_factors_have_the_smallest_rank():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 10, generator=generator), torch.randn(8, 3, generator=generator)
    both = concatenated([(a, b), (a[:2], 2 * b[:, :2])])
    assert len(both[0]) == 3
    torch.testing.assert_close(both[1] @ both[0], b @ a + 2 * b[:, :2] @ a[:2], atol=1e-5, rtol=0)
    assert len(concatenated([(a, b), (-a, b)], scale=1.0)[0]) == 0
    assert len(concatenated([(0 * a, b)])[0]) == 0


# --- bad input


@pytest.mark.parametrize(
    ("made", "changed", "says"),
    [
        ({"kind": "none"}, {}, "kind 'none' has no coordinates"),
        ({"training": "penalty"}, {}, "training 'penalty' has no coordinates"),
        ({}, {"remainder": "forget"}, "remainder 'forget' is not available"),
        ({}, {"layer": 1}, "layer 2 lies above the hook"),
        ({}, {"width": 16}, "width 16"),
    ],
)
def test_what_cannot_be_changed_is_refused_and_leaves_the_adapter_alone(zoo, made, changed, says):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), **made), steps=5)
    before = logits(adapter.model, *zoo.batch())
    arguments = dict(changed)
    directions = zoo.directions(4, layer=arguments.pop("layer", 2), d_model=arguments.pop("width", 32), seed=3)
    with pytest.raises(FeatclError, match=says):
        adapter.change_directions(directions, **arguments)
    assert torch.equal(logits(adapter.model, *zoo.batch()), before)
