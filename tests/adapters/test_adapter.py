"""The switch, the coordinates, and what is trained."""

from __future__ import annotations

import pytest
import torch

from featcl.adapters import constrain
from featcl.errors import FeatclError
from featcl.features import Directions
from featcl.models import residual_stream


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("kind", ["none", "write", "read", "both"])
@pytest.mark.parametrize("rank", [None, 2])
def test_an_untrained_adapter_changes_nothing(zoo, kind, rank):
    base = logits(zoo.model("gemma2"), *zoo.batch())
    adapter = constrain(zoo.model("gemma2"), zoo.directions(), kind=kind, rank=rank)
    assert torch.equal(logits(adapter.model, *zoo.batch()), base)
    assert adapter.delta_norm() == 0.0


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("rank", [None, 2])
def test_disabled_is_bit_equal_to_the_base_and_keeps_the_basis_frozen(zoo, kind, rank):
    base = logits(zoo.model("olmo2"), *zoo.batch())
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind=kind, rank=rank))
    flags = {name: parameter.requires_grad for name, parameter in adapter.model.named_parameters()}
    moved = logits(adapter.model, *zoo.batch())
    with adapter.disabled(), adapter.disabled():
        assert torch.equal(logits(adapter.model, *zoo.batch()), base)
    assert torch.equal(logits(adapter.model, *zoo.batch()), moved)
    assert not torch.equal(moved, base)
    assert flags == {name: parameter.requires_grad for name, parameter in adapter.model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")
    assert torch.equal(logits(adapter.model, *zoo.batch()), moved)


def test_pefts_own_switch_unfreezes_the_basis(zoo):
    """Why `disabled` exists: after PEFT's, training would leave the span."""
    adapter = constrain(zoo.model("olmo2"), zoo.directions(), kind="write")
    with adapter.model.disable_adapter():
        pass
    assert adapter.sites[0].factor("lora_B").weight.requires_grad


def test_only_coordinates_are_trained_and_they_start_at_zero(zoo):
    adapter = constrain(zoo.model("gemma2"), zoo.directions(), kind="both")
    trained = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in adapter.parameters()}
    assert not any(bool(parameter.any()) for parameter in trained)
    frozen = {site.name: site.frozen for site in adapter.sites}
    zoo.train(adapter, steps=3)
    for site in adapter.sites:
        for which, master in frozen[site.name].items():
            assert torch.equal(site.factor(which).weight, master)


def test_default_layers_are_the_hooks_block_and_a_third_before_it(zoo):
    adapter = constrain(zoo.model("olmo2"), zoo.directions(layer=3))
    assert (adapter.lowest_layer, adapter.top_layer, adapter.hook_layer) == (2, 3, 3)
    assert len(adapter.sites) == 2 * 7
    assert constrain(zoo.model("olmo2"), zoo.directions(layer=0)).lowest_layer == 0


def test_nothing_below_the_lowest_adapter_is_in_the_graph(zoo):
    adapter = constrain(zoo.model("olmo2"), zoo.directions(layer=2), kind="both")
    seen = {}
    layers = adapter.model.get_base_model().model.layers
    for index in (0, 1, 2):
        layers[index].register_forward_hook(lambda _m, _i, out, index=index: seen.update({index: out}))
    zoo.loss(adapter.model, *zoo.batch())
    assert adapter.lowest_layer == 1
    assert (seen[0].requires_grad, seen[1].requires_grad, seen[2].requires_grad) == (False, True, True)


def test_each_layer_can_have_its_own_directions(zoo):
    sets = {1: zoo.directions(layer=1, seed=1), 3: zoo.directions(layer=3, seed=3)}
    adapter = zoo.train(constrain(zoo.model("gemma2"), sets, kind="both"))
    assert {site.plan.site.layer for site in adapter.sites} == {1, 3}
    assert all(site.plan.directions is sets[site.plan.site.layer] for site in adapter.sites)
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    below = constrain(zoo.model("gemma2"), sets, layers=[0, 2])
    assert {site.plan.site.layer: site.plan.directions for site in below.sites} == {0: sets[1], 2: sets[3]}


def test_modules_narrow_what_is_adapted(zoo):
    adapter = constrain(zoo.model("olmo2"), zoo.directions(), kind="both", modules=["down_proj", "q_proj"], layers=[1])
    names = [site.name for site in adapter.sites]
    assert names == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("kind", ["none", "both"])
def test_coordinates_go_out_and_come_back_bit_equal(zoo, kind):
    adapter = zoo.train(constrain(zoo.model("gemma2"), zoo.directions(), kind=kind))
    coordinates, moved = adapter.coordinates(), logits(adapter.model, *zoo.batch())
    other = constrain(zoo.model("gemma2"), zoo.directions(), kind=kind, seed=5)
    other.load_coordinates_(coordinates)
    assert torch.equal(logits(other.model, *zoo.batch()), moved)
    halves = {name: tensor / 2 for name, tensor in coordinates.items()}
    adapter.load_coordinates_(halves)
    adapter.load_coordinates_({name: tensor + halves[name] for name, tensor in halves.items()})
    assert torch.equal(logits(adapter.model, *zoo.batch()), moved)


def test_coordinates_of_another_adapter_are_refused_whole(zoo):
    adapter = zoo.train(constrain(zoo.model("gemma2"), zoo.directions()))
    before = adapter.coordinates()
    name = next(iter(before))
    for wrong, says in (
        ({}, "lack"),
        ({**before, "elsewhere": before[name]}, "unknown elsewhere"),
        ({**{key: value * 0 for key, value in before.items()}, name: before[name][:2]}, "here it is"),
    ):
        with pytest.raises(FeatclError, match=says):
            adapter.load_coordinates_(wrong)
    assert all(torch.equal(before[key], value) for key, value in adapter.coordinates().items())


def test_delta_norm_is_that_of_the_product(zoo):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind="both"))
    products = {site.name: float((b @ a).norm()) for site in adapter.sites for a, b in [site.factors()]}
    for name, norm in adapter.delta_norms().items():
        assert norm == pytest.approx(products[name], rel=1e-5)
    assert adapter.delta_norm() == pytest.approx(sum(norm**2 for norm in products.values()) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_casting_the_model_does_not_lose_the_float32_basis(zoo, rank):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind="both", rank=rank))
    for site in adapter.sites:
        for which in ("lora_A", "lora_B"):
            site.factor(which).to(torch.bfloat16)
    assert adapter.leak(*zoo.batch()).leak > 1e-4
    adapter.restore_()
    assert zoo.train(adapter, steps=2).leak(*zoo.batch()).leak <= 1e-6


def test_a_gain_that_changed_after_folding_shows_up_as_a_leak(zoo):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind="write"))
    adapter.model.get_base_model().model.layers[2].post_feedforward_layernorm.weight.data[3] *= 1.1
    assert adapter.leak(*zoo.batch()).leak > 1e-3


def test_a_bfloat16_model_keeps_float32_factors(zoo):
    adapter = zoo.train(constrain(zoo.model("gemma2").to(torch.bfloat16), zoo.directions(), kind="both"))
    assert all(factor.dtype == torch.float32 for site in adapter.sites for factor in site.factors())
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


def test_a_low_rank_product_is_never_stale(zoo):
    """First touched without gradients, twice backward, after a step: the weight follows the coordinates."""
    adapter = constrain(zoo.model("olmo2"), zoo.directions(), kind="both", rank=2)
    logits(adapter.model, *zoo.batch())
    zoo.loss(adapter.model, *zoo.batch()).backward()
    once = [parameter.grad.clone() for parameter in adapter.parameters()]
    assert min(float(gradient.abs().max()) for gradient in once) > 0
    zoo.loss(adapter.model, *zoo.batch()).backward()
    for parameter, gradient in zip(adapter.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    torch.optim.SGD(adapter.parameters(), lr=1.0).step()
    site = adapter.sites[0]
    a, b = site.factors()
    torch.testing.assert_close(site.factor("lora_A").weight, a)
    torch.testing.assert_close(site.factor("lora_B").weight, b)


def test_the_same_seed_gives_the_same_plain_lora_and_leaves_global_randomness_alone(zoo):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two, three = (constrain(zoo.model("olmo2"), zoo.directions(), kind="none", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    first, same, other = (next(iter(adapter.coordinates().values())) for adapter in (one, two, three))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_remove_gives_the_base_back_and_the_model_can_be_constrained_again(zoo):
    model = zoo.model("olmo2")
    base = logits(model, *zoo.batch())
    adapter = zoo.train(constrain(model, zoo.directions()))
    with pytest.raises(FeatclError, match="already holds an adapter 'default'"):
        constrain(model, zoo.directions())
    plain = adapter.remove()
    assert torch.equal(logits(plain, *zoo.batch()), base)
    assert constrain(plain, zoo.directions(), kind="write").delta_norm() == 0.0


def test_the_report_names_the_features_that_moved_most(zoo):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), kind="both"))
    report = adapter.report(top=3)
    assert [row.role for row in report.rows] == ["write"] * 3 + ["read"] * 3
    strengths = [row.strength for row in report.rows[:3]]
    assert strengths == sorted(strengths, reverse=True)
    assert min(strengths) > 0
    assert {row.feature for row in report.rows} <= set(range(100, 106))
    assert sum(row.share for row in adapter.report(top=6).rows) == pytest.approx(2.0)
    assert str(report.rows[0].feature) in str(report)
    assert set(report.to_dicts()[0]) == {"feature", "name", "role", "strength", "share", "site"}
    assert "<table>" in report._repr_html_()


def test_stopped_forward_runs_through_the_adapter(zoo):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions()))
    ids, mask = zoo.batch()
    moved = residual_stream(adapter.model, ids, mask, layer=2)
    with adapter.disabled():
        base = residual_stream(adapter.model, ids, mask, layer=2)
    assert float((moved - base).norm()) > 1e-3


def test_leak_needs_a_token_and_an_adapter_that_is_on(zoo):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions()))
    ids, mask = zoo.batch()
    with pytest.raises(FeatclError, match="no token to measure"):
        adapter.leak(ids, torch.zeros_like(mask))
    with pytest.raises(FeatclError, match="switched off"), adapter.disabled():
        adapter.leak(ids, mask)


@pytest.mark.parametrize("kind", ["both", "residual"])
def test_leak_names_a_bad_batch(zoo, kind):
    adapter = constrain(zoo.model("olmo2"), zoo.directions(), kind=kind)
    ids, mask = zoo.batch()
    for wrong, says in (
        ((ids[:, :0], None), "no token to measure"),
        ((ids[0], None), r"input_ids must be \[batch, seq\]"),
        ((ids.tolist(), None), "not list"),
        ((ids, mask[:, 1:]), "attention_mask must be"),
        ((ids, mask[0]), "attention_mask must be"),
    ):
        with pytest.raises(FeatclError, match=says):
            adapter.leak(*wrong)


def test_padding_does_not_enter_the_leak(zoo):
    adapter = zoo.train(constrain(zoo.model("olmo2"), zoo.directions(), fold_norms=False))
    ids, mask = zoo.batch()
    alone = adapter.leak(ids[-1:, 4:], mask[-1:, 4:])
    padded = adapter.leak(ids[-1:], mask[-1:])
    assert padded.tokens == alone.tokens == 7
    assert padded.leak == pytest.approx(alone.leak, rel=1e-4)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "sideways"}, "'sideways' is not available: there is none, write, read, both"),
        ({"kind": "gated"}, "'gated' needs the SAE's own encoder"),
        ({"name": "two words"}, "name 'two words' cannot be used"),
        ({"training": "backwards"}, "training 'backwards' is not available: there is coordinates"),
        ({"kind": "none", "training": "penalty"}, "'none' has no span to train in"),
        ({"kind": "shift", "training": "penalty"}, "'shift' trains coordinates only"),
        ({"alpha": 8.0}, "only kind 'none' and train_both_factors have it"),
        ({"kind": "none", "alpha": 0.0}, "alpha must be a positive number"),
        ({"training": "penalty", "penalty": -1.0}, "strength must be a positive number"),
        ({"layers": [4]}, "layer 4 is out of range: the model has blocks 0 to 3"),
        ({"layers": [-1]}, "layer -1 is out of range"),
        ({"layers": [3]}, "layer 3 lies above the hook, at the output of block 2"),
        ({"layers": []}, "no layers to adapt"),
        ({"modules": ["out_proj"]}, "no module 'out_proj': it adapts down_proj"),
        ({"kind": "write", "modules": ["q_proj"]}, "'write' has no module 'q_proj'"),
        ({"modules": []}, "no modules to adapt"),
        ({"rank": 7}, "rank 7 is not between 1 and k = 6"),
        ({"rank": 0}, "rank 0 is not between 1"),
        ({"protect": torch.eye(32)}, "nothing is left of the 6 directions after protecting"),
        ({"protect": torch.ones(1, 8)}, "width 8"),
        ({"protect": {"think": torch.ones(1, 32)}}, "unknown role 'think'"),
        ({"kind": "none", "protect": torch.ones(1, 32)}, "cannot protect"),
        ({"protect": {}}, "nothing would be protected"),
        ({"kind": "shift", "protect": {}}, "nothing would be protected"),
        ({"kind": "write", "protect": {"read": torch.ones(1, 32)}}, "names read, but kind 'write' adapts what writes"),
        ({"kind": "read", "protect": {"write": torch.ones(1, 32)}}, "nothing would be protected"),
        ({"protect": {"write": None}}, "nothing would be protected"),
        ({"protect": {"read": torch.ones(1, 32)}, "modules": ["down_proj"]}, "nothing would be protected"),
        ({"protect": [1, 2]}, "protect must be a Subspace, rows .* not a list"),
        ({"protect": torch.ones(32)}, "protect must be .* not a Tensor"),
        ({"protect": "x"}, "protect must be .* not 'x'"),
        ({"rank": 2.5}, "rank must be a whole number, or None for k, not 2.5"),
        ({"rank": True}, "rank must be a whole number"),
        ({"kind": "residual", "rank": True}, "rank must be a whole number"),
        ({"layers": 1}, "layers must be a list of blocks such as .* not 1"),
        ({"layers": "12"}, "layers must be a list"),
        ({"layers": [1.7]}, "a block must be a whole number, not 1.7"),
        ({"layers": [True]}, "a block must be a whole number, not True"),
        ({"near_dependent": "x"}, "near_dependent 'x' is not available: there is refuse and drop"),
        ({"remainder": "x"}, "remainder 'x' is not available: there is keep and drop"),
        ({"name": "training"}, "name 'training' cannot be used"),
        ({"name": "forward"}, "name 'forward' cannot be used"),
        ({"name": "keys"}, "name 'keys' cannot be used"),
        ({"name": "items"}, "name 'items' cannot be used"),
        ({"name": 3}, "name 3 cannot be used"),
    ],
)
def test_bad_arguments_are_one_clear_error_and_leave_the_model_alone(zoo, arguments, says):
    model = zoo.model("olmo2")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(FeatclError, match=says) as caught:
        constrain(model, zoo.directions(), **arguments)
    assert "\n" not in str(caught.value)
    assert names == [name for name, _ in model.named_modules()]


def loose(vectors, layer=2):
    from types import SimpleNamespace

    return SimpleNamespace(vectors=vectors, readers=None, feature_ids=None, hook_name=None, layer=layer, names=None)


def at_hook(hook_name, layer):
    return Directions.from_vectors(torch.eye(32)[:2], layer=layer, hook_name=hook_name)


@pytest.mark.parametrize(
    ("directions", "says"),
    [
        (loose(torch.randn(33, 32)), "k = 33 directions do not fit into d_model = 32"),
        (loose(torch.zeros(0, 32)), "k >= 1"),
        (loose(torch.randn(3, 16)), "width 16, the model has d_model = 32"),
        (loose(torch.randn(3, 32), layer=9), "layer 9 is out of range"),
        (loose(torch.eye(32)[[0, 1, 0]]), "near-dependent directions feature 2"),
        (loose(torch.full((2, 32), float("inf"))), "NaN or infinity"),
        ({}, "the mapping from layer to directions is empty"),
        ({3: loose(torch.randn(3, 32), layer=2)}, "layer 3 lies above the hook of its directions"),
        (None, "directions must be featcl.Directions"),
        ({2: None}, "directions must be featcl.Directions"),
        ({"2": loose(torch.randn(3, 32))}, "a layer must be a whole number, not '2'"),
        (at_hook("blub", 3), "'blub' is no hook"),
        (at_hook("model.layers.9.output", 3), "the model has blocks 0 to 3"),
        (at_hook("model.layers.1.output", 3), "hook 'model.layers.1.output' lies at block 1, but their layer is 3"),
        (at_hook("blocks.1.hook_resid_post", 3), "lies at block 1, but their layer is 3"),
        (at_hook("blocks.1.hook_mlp_out", 3), "lies at block 1, but their layer is 3"),
    ],
)
def test_bad_directions_are_one_clear_error(zoo, directions, says):
    with pytest.raises(FeatclError, match=says):
        constrain(zoo.model("olmo2"), directions)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
@pytest.mark.parametrize("kind", ["write", "read", "both"])
def test_near_dependent_directions_are_refused_by_name_or_dropped_on_request(zoo, family, kind):
    """Feature 106 doubles 101, and 107 the encoder column of 103: each goes, at every site, with its name."""
    good = zoo.directions()
    vectors = torch.cat([good.vectors, good.vectors[1:2] + 1e-6, torch.randn(1, 32)])
    readers = torch.cat([good.readers, torch.randn(1, 32), good.readers[3:4] + 1e-6])
    names = [f"name {number}" for number in range(8)]
    twins = Directions.from_vectors(vectors, readers=readers, layer=2, feature_ids=range(100, 108), names=tuple(names))
    with pytest.raises(FeatclError, match=r"near-dependent directions feature 10[67]"):
        constrain(zoo.model(family), twins, kind=kind)
    adapter = zoo.train(constrain(zoo.model(family), twins, kind=kind, near_dependent="drop"))
    dropped = {"write": {106}, "read": {107}, "both": {106, 107}}[kind]
    rows = adapter.report(top=20).rows
    assert {row.feature for row in rows} == set(range(100, 108)) - dropped
    assert all(row.name == f"name {row.feature - 100}" for row in rows)
    assert adapter.rank == 8 - len(dropped)
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    same = constrain(zoo.model(family), zoo.directions(), kind=kind, near_dependent="drop")
    assert same.rank == 6


@pytest.mark.parametrize("hook_name", ["model.layers.1.output", "blocks.1.hook_resid_post"])
def test_a_hook_kind_refuses_a_hook_that_is_not_its_layers(zoo, hook_name):
    with pytest.raises(FeatclError, match="lies at block 1, but their layer is 3"):
        constrain(zoo.model("olmo2"), at_hook(hook_name, 3), kind="residual")


@pytest.mark.parametrize(
    "hook_name",
    [
        "model.layers.1.output",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_pre",
        "blocks.1.hook_mlp_out",
        "blocks.1.attn.hook_z",
    ],
)
def test_every_spelling_of_a_hook_adapts_the_blocks_up_to_it(zoo, hook_name):
    adapter = constrain(zoo.model("olmo2"), at_hook(hook_name, 1))
    assert (adapter.lowest_layer, adapter.top_layer, adapter.hook_layer) == (0, 1, 1)


def test_near_dependence_is_judged_after_folding(zoo):
    """Independent in the stream, all but parallel behind a norm whose gain is nearly gone where they differ."""
    model = zoo.model("llama")
    for block in model.model.layers:
        block.input_layernorm.weight.data.fill_(1.0)
        block.input_layernorm.weight.data[0] = 1e-3
    rows = torch.zeros(2, 32)
    rows[0, 0], rows[0, 1], rows[1, 0], rows[1, 2] = 1.0, 1e-3, 1.0, 1e-3  # after folding both point along axis 0
    with pytest.raises(FeatclError, match="after folding its norm: near-dependent"):
        constrain(model, Directions.from_vectors(rows, layer=2), kind="read", modules=["q_proj"])
    adapter = constrain(
        model, Directions.from_vectors(rows, layer=2), kind="read", modules=["q_proj"], near_dependent="drop"
    )
    assert adapter.rank == 1
    unfolded = constrain(
        zoo.model("llama"), Directions.from_vectors(rows, layer=2), kind="read", modules=["q_proj"], fold_norms=False
    )
    assert unfolded.rank == 2


def test_an_unknown_family_is_refused(zoo):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=32))
    with pytest.raises(FeatclError, match="unknown architecture 'gpt2'"):
        constrain(model, zoo.directions())
