"""Several named adapters on one model: together, apart, off, and in each other's way."""

from __future__ import annotations

import copy

import pytest
import torch

from featcl.adapters import adapters_of, constrain, interference, routed
from featcl.errors import FeatclError
from featcl.features import Directions

PAIRS = [("both", "both"), ("none", "write"), ("write", "residual"), ("shift", "read")]


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def two(zoo, family, kinds=("both", "both")):
    """`home` (features 100 to 105) and `work` (others), each trained alone."""
    model = zoo.model(family)
    adapters = []
    for name, kind, seed in zip(("home", "work"), kinds, (0, 5), strict=True):
        adapter = constrain(model, zoo.directions(seed=seed), kind=kind, name=name)
        with routed(model, name):
            zoo.train(adapter, steps=5)
        adapters.append(adapter)
    return model, *adapters


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
@pytest.mark.parametrize("kinds", PAIRS)
def test_each_and_both_are_switched_and_the_base_is_bit_equal(zoo, family, kinds):
    base = logits(zoo.model(family), *zoo.batch())
    model, home, work = two(zoo, family, kinds)
    together = logits(model, *zoo.batch())
    alone = {}
    for adapter, other in ((home, work), (work, home)):
        single = constrain(zoo.model(family), directions_of(zoo, adapter), kind=adapter.kind)
        single.load_coordinates_(adapter.coordinates())
        alone[adapter.name] = logits(single.model, *zoo.batch())
        with other.disabled(only_this=True):
            assert torch.equal(logits(model, *zoo.batch()), alone[adapter.name])
        with routed(model, adapter.name):
            assert torch.equal(logits(model, *zoo.batch()), alone[adapter.name])
        with adapter.disabled():
            assert torch.equal(logits(model, *zoo.batch()), base)
    with routed(model), torch.no_grad():
        assert torch.equal(logits(model, *zoo.batch()), base)
    assert torch.equal(logits(model, *zoo.batch()), together)
    assert not torch.equal(together, alone["home"])
    assert not torch.equal(together, alone["work"])
    assert torch.equal(logits(home.model, *zoo.batch()), logits(work.model, *zoo.batch()))


def directions_of(zoo, adapter):
    return zoo.directions(seed={"home": 0, "work": 5}[adapter.name])


def test_a_second_adapter_unfreezes_nothing_and_trains_alone(zoo):
    model = zoo.model("olmo2")
    first = zoo.train(constrain(model, zoo.directions(), kind="both", name="teacher"))
    kept = first.coordinates()
    second = constrain(model, zoo.directions(seed=5), kind="both", name="student")
    moved = logits(model, *zoo.batch())
    trainable = {id(tensor) for tensor in second.model.parameters() if tensor.requires_grad}
    assert trainable == {id(tensor) for tensor in [*first.parameters(), *second.parameters()]}
    with second.disabled(only_this=True):
        assert torch.equal(logits(model, *zoo.batch()), moved)  # a zero start
    zoo.train(second, steps=5)
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.coordinates().items())
    assert first.leak(*zoo.batch()).leak <= 1e-6
    assert second.leak(*zoo.batch()).leak <= 1e-6
    assert set(first.coordinates()) == set(second.coordinates())


def test_off_inside_off_and_gradients_only_where_it_is_on(zoo):
    model, home, work = two(zoo, "llama")
    with home.disabled(only_this=True), work.disabled(), home.disabled():
        zoo.loss(home.model, *zoo.batch())
    for adapter in (home, work):
        assert all(parameter.requires_grad for parameter in adapter.parameters())
    for parameter in [*home.parameters(), *work.parameters()]:
        parameter.grad = None
    with routed(model, "work"):
        zoo.loss(work.model, *zoo.batch()).backward()
    assert all(parameter.grad is None for parameter in home.parameters())
    assert all(bool(parameter.grad.any()) for parameter in work.parameters())


def test_one_is_removed_and_the_other_stays(zoo):
    base = logits(zoo.model("olmo2"), *zoo.batch())
    model, home, work = two(zoo, "olmo2")
    with home.disabled(only_this=True):
        expected = logits(model, *zoo.batch())
    home.remove()
    assert list(adapters_of(model)) == ["work"]
    assert torch.equal(logits(model, *zoo.batch()), expected)
    assert torch.equal(logits(work.model, *zoo.batch()), expected)
    assert work.leak(*zoo.batch()).leak <= 1e-6
    constrain(model, zoo.directions(), kind="write", name="home")
    assert set(adapters_of(model)) == {"work", "home"}
    adapters_of(model)["home"].remove()
    plain = work.remove()
    assert plain is model
    assert torch.equal(logits(plain, *zoo.batch()), base)
    assert not adapters_of(plain)
    assert not any("lora" in name for name, _ in plain.named_modules())


def test_each_is_saved_and_merged_alone(zoo, tmp_path):
    from peft import PeftModel

    model, home, work = two(zoo, "gemma2")
    for adapter, other in ((home, work), (work, home)):
        with other.disabled(only_this=True):
            alone = logits(model, *zoo.batch())
        assert float((logits(adapter.merge(), *zoo.batch()) - alone).abs().max()) <= 1e-5
        adapter.save(tmp_path / adapter.name)
        loaded = PeftModel.from_pretrained(zoo.model("gemma2"), str(tmp_path / adapter.name))
        assert float((logits(loaded, *zoo.batch()) - alone).abs().max()) <= 1e-5


def test_one_changes_its_directions_and_the_other_does_not_notice(zoo):
    model, home, work = two(zoo, "olmo2")
    with home.disabled(only_this=True):
        expected, coordinates = logits(model, *zoo.batch()), work.coordinates()
    together = logits(model, *zoo.batch())
    home.change_directions(zoo.directions(4, seed=9))
    assert float((logits(model, *zoo.batch()) - together).abs().max()) <= 1e-5
    with home.disabled(only_this=True):
        assert torch.equal(logits(model, *zoo.batch()), expected)
    assert all(torch.equal(coordinates[name], tensor) for name, tensor in work.coordinates().items())


def test_a_copy_of_the_model_has_adapters_of_its_own(zoo):
    model, home, _ = two(zoo, "llama")
    twin = copy.deepcopy(model)
    before = logits(model, *zoo.batch())
    assert adapters_of(twin)["home"] is not home
    zoo.train(adapters_of(twin)["home"], steps=2)
    assert torch.equal(logits(model, *zoo.batch()), before)
    assert not torch.equal(logits(twin, *zoo.batch()), before)


# --- interference


def test_the_report_shows_shared_directions_and_effects(zoo):
    """Two of six directions are shared by construction; the effects are the differences of the scores."""
    model, mine = zoo.model("olmo2"), zoo.directions()
    rows = torch.cat([mine.vectors[:2], torch.randn(4, 32, generator=torch.Generator().manual_seed(3))])
    one = constrain(model, mine, kind="write", name="one")
    two_ = constrain(model, Directions.from_vectors(rows, layer=2), kind="both", name="two")
    for name, adapter in (("one", one), ("two", two_)):
        with routed(model, name):
            zoo.train(adapter, steps=5)

    def score():
        with torch.no_grad():
            return -float(zoo.loss(model, *zoo.batch()))

    report = interference(model, {"one": score})
    (overlap,) = report.overlaps  # `one` reads nothing
    assert (overlap.one, overlap.other, overlap.role, overlap.layer) == ("one", "two", "write", 2)
    assert overlap.largest == pytest.approx(1.0, abs=1e-5)
    assert 2.0 <= overlap.shared < 5.0
    assert overlap.chance == pytest.approx(36 / 32)
    (effect,) = report.effects
    with routed(model):
        assert effect.base == score()
    with routed(model, "one"):
        assert effect.alone == score()
    assert effect.together == score()
    assert effect.change == pytest.approx(effect.together - effect.alone)
    assert effect.alone > effect.base
    assert "one, two" in str(report)
    assert report.to_dicts()["effects"][0]["change"] == effect.change


def test_orthogonal_spans_share_nothing_and_three_are_also_taken_together(zoo):
    model, eye = zoo.model("llama"), torch.eye(32)
    for number, name in enumerate(("one", "two", "three")):
        constrain(model, Directions.from_vectors(eye[4 * number : 4 * number + 4], layer=2), kind="write", name=name)
    report = interference(model, {"one": lambda: 1.0})
    assert [(row.one, row.other) for row in report.overlaps] == [("one", "two"), ("one", "three"), ("two", "three")]
    assert max(row.shared for row in report.overlaps) < 1e-9
    assert [effect.by for effect in report.effects] == ["two", "three", "all"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: interference(model), "needs two adapters on the model; there is home"),
        (lambda model: routed(model, "away").__enter__(), "no adapter 'away' on the model: there is home"),
    ],
)
def test_bad_requests_are_one_clear_error(zoo, call, says):
    model = zoo.model("llama")
    constrain(model, zoo.directions(), name="home")
    with pytest.raises(FeatclError, match=says):
        call(model)
    with pytest.raises(FeatclError, match="already holds an adapter 'home'"):
        constrain(model, zoo.directions(), name="home")
    for name in ("home_kept", "two words", "lora"):  # the first and the last mean something to PEFT
        with pytest.raises(FeatclError, match=f"'{name}' cannot be used"):
            constrain(model, zoo.directions(), name=name)


def test_a_foreign_peft_adapter_is_refused(zoo):
    from peft import LoraConfig, get_peft_model

    model = zoo.model("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(FeatclError, match="already holds an adapter that featcl did not make"):
        constrain(model, zoo.directions())
