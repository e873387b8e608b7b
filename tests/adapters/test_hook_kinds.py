"""The hook kinds at work: the switch, generation, dtypes, folders, reports, several blocks, bad input."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import featcl
from featcl.adapters import adapters_of, constrain
from featcl.adapters.checkpointing import checkpoint_
from featcl.adapters.hook_folder import MANIFEST, TENSORS
from featcl.adapters.hooked import hooked_blocks
from featcl.errors import FeatclError
from featcl.models import residual_stream
from featcl.subspace import Subspace
from tests.adapters.gates import KINDS, directions_for, hooked, logits, streams

# --- the start, the switch, taking it off -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_changes_nothing(zoo, kind):
    base = logits(zoo.model("gemma2"), *zoo.batch())
    adapter = hooked(zoo, "gemma2", kind)
    assert torch.equal(logits(adapter.model, *zoo.batch()), base)
    assert adapter.delta_norm() == 0.0
    assert (adapter.lowest_layer, adapter.top_layer, adapter.hook_layer) == (2, 2, 2)


@pytest.mark.parametrize("family", ["olmo2", "gemma2", "gemma3_conditional"])
@pytest.mark.parametrize("kind", KINDS)
def test_disabled_is_bit_equal_to_the_base(zoo, family, kind):
    base = logits(zoo.model(family), *zoo.batch())
    adapter = zoo.train(hooked(zoo, family, kind))
    moved = logits(adapter.model, *zoo.batch())
    with adapter.disabled(), torch.no_grad(), adapter.disabled():
        assert torch.equal(logits(adapter.model, *zoo.batch()), base)
    assert torch.equal(logits(adapter.model, *zoo.batch()), moved)
    assert not torch.equal(moved, base)
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")
    assert torch.equal(logits(adapter.model, *zoo.batch()), moved)


def test_two_hook_adapters_coexist(zoo):
    """As a teacher's and a student's version do; each can be off alone, and `disabled` of either is the base."""
    model = zoo.model("olmo2")
    base = logits(model, *zoo.batch())
    first = zoo.train(constrain(model, directions_for(zoo, model), kind="gated", name="teacher"))
    alone = logits(model, *zoo.batch())
    second = zoo.train(constrain(model, zoo.directions(seed=4), kind="residual", name="student"))
    both = logits(model, *zoo.batch())
    with second.disabled(only_this=True):
        assert torch.equal(logits(model, *zoo.batch()), alone)
    for adapter in (first, second):
        with adapter.disabled():
            assert torch.equal(logits(model, *zoo.batch()), base)
    assert torch.equal(logits(model, *zoo.batch()), both)
    assert not torch.equal(both, alone)
    assert first.leak(*zoo.batch()).leak <= 1e-6
    assert second.leak(*zoo.batch()).leak <= 1e-6
    second.remove()
    assert torch.equal(logits(model, *zoo.batch()), alone)
    assert hooked_blocks(model) == list(first.sites)
    first.remove()
    assert torch.equal(logits(model, *zoo.batch()), base)
    assert hooked_blocks(model) == []


def test_adapters_at_one_block_act_in_the_order_of_attachment(zoo):
    model = zoo.model("llama")
    first, second = (constrain(model, zoo.directions(seed=s), kind="residual", name=f"n{s}") for s in (1, 2))
    for adapter in (first, second):
        with torch.no_grad():
            adapter.sites[0].coordinates.normal_()
    with first.disabled():
        base = residual_stream(model, *zoo.batch(), layer=2)
    with torch.no_grad():
        once = base + first.sites[0](base)
        expected = once + second.sites[0](once)
    torch.testing.assert_close(residual_stream(model, *zoo.batch(), layer=2), expected)


def test_a_hook_adapter_beside_a_lora(zoo):
    model = zoo.model("gemma2")
    base = logits(model, *zoo.batch())
    lora = zoo.train(constrain(model, zoo.directions(), kind="both", name="weights"))
    directions = directions_for(zoo, zoo.model("gemma2"))
    gated = constrain(lora.model, directions, kind="gated", name="stream")
    assert all(parameter.requires_grad for parameter in lora.parameters())
    zoo.train(gated)
    for adapter in (lora, gated):
        with adapter.disabled():
            assert torch.equal(logits(adapter.model, *zoo.batch()), base)
    assert gated.leak(*zoo.batch()).leak <= 1e-6


def test_removing_leaves_the_base_and_the_model_can_be_constrained_anew(zoo):
    base = logits(zoo.model("qwen3"), *zoo.batch())
    adapter = zoo.train(hooked(zoo, "qwen3", "residual"))
    model = adapter.remove()
    assert torch.equal(logits(model, *zoo.batch()), base)
    again = constrain(model, zoo.directions(), kind="shift")
    assert torch.equal(logits(again.model, *zoo.batch()), base)


def test_the_models_own_state_is_left_alone(zoo):
    model = zoo.model("olmo2")
    names = list(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    weights = featcl.models.model_digest(model)
    adapter = zoo.train(constrain(model, zoo.directions(), kind="residual"), steps=3)
    assert adapter.model is model
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == modules
    assert featcl.models.model_digest(model) == weights
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_of_the_model_is_its_own(zoo):
    adapter = zoo.train(hooked(zoo, "olmo2", "residual"))
    twin = copy.deepcopy(adapter.model)
    moved = logits(adapter.model, *zoo.batch())
    with torch.no_grad():
        adapter.sites[0].coordinates.zero_()
    assert torch.equal(logits(twin, *zoo.batch()), moved)
    (copied,) = adapters_of(twin).values()
    assert copied is not adapter
    assert torch.equal(logits(copied.remove(), *zoo.batch()), logits(zoo.model("olmo2"), *zoo.batch()))


# --- the graph, the forward pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_coordinates_are_trained_and_nothing_at_or_below_the_hook_is_in_the_graph(zoo, kind):
    model = zoo.model("olmo2").requires_grad_(True)
    adapter = constrain(model, directions_for(zoo, model), kind=kind)
    seen, inner = {}, model.model.layers
    inner[3].register_forward_pre_hook(lambda _m, inputs: seen.update({"above": inputs[0]}))
    inner[2].mlp.register_forward_hook(lambda _m, _i, output: seen.update({"inside": output}))
    zoo.loss(adapter.model, *zoo.batch()).backward()
    assert (seen["inside"].requires_grad, seen["above"].requires_grad) == (False, True)
    assert all(float(parameter.grad.norm()) > 0 for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(adapter.parameters()) == 1


@pytest.mark.parametrize("family", ["gemma2", "gemma3_conditional", "olmo2", "qwen3"])
@pytest.mark.parametrize("kind", ["gated", "residual"])
def test_generation_with_a_cache_equals_whole_forward_passes(zoo, family, kind):
    """Also under padding: the left-padded row continues as it does alone."""
    adapter = zoo.train(hooked(zoo, family, kind), lr=0.1)
    ids, mask = zoo.batch()
    with torch.no_grad():
        found = adapter.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
        row, greedy = ids[-1:, 4:], []
        for _ in range(6):
            scores = adapter.model(input_ids=row, use_cache=False).logits[0, -1]
            scores[2] = -torch.inf  # min_new_tokens forbids the end token
            greedy.append(int(scores.argmax()))
            row = torch.cat([row, torch.tensor([[greedy[-1]]])], dim=1)
    assert found[-1, 12:].tolist() == greedy
    with adapter.disabled():
        base = adapter.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
    assert not torch.equal(base, found)


def test_hidden_states_asked_of_the_model_are_the_changed_ones(zoo):
    """Also where transformers' own recorder was on the block first."""
    model = zoo.model("gemma2")
    ids, mask = zoo.batch()
    model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    adapter = zoo.train(constrain(model, zoo.directions(layer=1), kind="residual"))
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    _, changed = streams(adapter, ids, mask, layer=1)
    assert torch.equal(states[2], changed)


def test_a_block_that_returns_a_tuple(zoo):
    model = zoo.model("llama")
    block = model.model.layers[2]
    plain = zoo.train(constrain(zoo.model("llama"), zoo.directions(), kind="residual"))
    adapter = constrain(model, zoo.directions(), kind="residual")
    adapter.load_coordinates_(plain.coordinates())
    own = block.forward
    block.forward = lambda *args, **kwargs: (own(*args, **kwargs), "beside")
    seen = []
    block.register_forward_hook(lambda _m, _i, output: seen.append(output) or output[0])
    assert torch.equal(logits(model, *zoo.batch()), logits(plain.model, *zoo.batch()))
    assert seen[0][1] == "beside"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_and_products_are_float32_in_a_half_precision_model(zoo, kind, dtype):
    model = zoo.model("gemma2").to(dtype)
    adapter = constrain(model, directions_for(zoo, model), kind=kind)
    assert adapter.sites[0].write_basis.dtype == adapter.parameters()[0].dtype == torch.float32
    with torch.no_grad():
        adapter.parameters()[0].normal_(generator=torch.Generator().manual_seed(0))
    base, changed = streams(adapter, *zoo.batch())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        update = adapter.sites[0](base)
    assert update.dtype == torch.float32
    assert changed.dtype == dtype
    assert torch.equal(changed, (base.float() + update).to(dtype))
    assert adapter.leak(*zoo.batch()).leak <= 1e-6
    with adapter.disabled():
        again = logits(adapter.model, *zoo.batch())
    assert torch.equal(again, logits(zoo.model("gemma2").to(dtype), *zoo.batch()))


def test_changing_the_models_dtype_does_not_reach_the_bases(zoo):
    adapter = zoo.train(hooked(zoo, "olmo2", "gated"))
    before = adapter.coordinates()
    adapter.model.to(torch.bfloat16)
    adapter.restore_()
    assert adapter.sites[0].write_basis.dtype == torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.coordinates().items())
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


@pytest.mark.parametrize("kind", ["residual", "gated"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(zoo, kind, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = zoo.model("olmo2")
        sets = {1: directions_for(zoo, model, layer=1), 2: directions_for(zoo, model)}
        adapter = constrain(model, sets, kind=kind)
        for number, parameter in enumerate(adapter.parameters()):
            with torch.no_grad():
                parameter.normal_(generator=torch.Generator().manual_seed(number)).mul_(0.1)
        if checkpointing:
            checkpoint_(model, use_reentrant=use_reentrant)
            model.train()
        zoo.loss(model, *zoo.batch()).backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
        assert float(plain.norm()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_runs_the_hook_and_its_switch(zoo, kind):
    adapter = zoo.train(hooked(zoo, "llama", kind))
    eager = logits(adapter.model, *zoo.batch())
    torch._dynamo.reset()
    compiled = torch.compile(adapter.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, *zoo.batch()), eager)
    with adapter.disabled():
        base = logits(adapter.model, *zoo.batch())
        torch.testing.assert_close(logits(compiled, *zoo.batch()), base)
    with torch.no_grad():
        adapter.parameters()[0].mul_(2)
    torch.testing.assert_close(logits(compiled, *zoo.batch()), logits(adapter.model, *zoo.batch()))
    assert not torch.allclose(eager, base)
    gradients = []
    for model in (adapter.model, compiled):
        adapter.parameters()[0].grad = None
        zoo.loss(model, *zoo.batch()).backward()
        gradients.append(adapter.parameters()[0].grad)
    torch.testing.assert_close(*gradients)


# --- several blocks, control bases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_has_its_own_directions_at_its_own_hook(zoo, kind):
    model = zoo.model("gemma2")
    sets = {layer: directions_for(zoo, model, layer=layer, seed=layer, fires=0.2) for layer in (3, 1)}
    adapter = zoo.train(constrain(model, sets, kind=kind))
    assert [site.name for site in adapter.sites] == ["model.layers.1", "model.layers.3"]
    assert (adapter.lowest_layer, adapter.top_layer) == (1, 3)
    report = adapter.leak(*zoo.batch())
    assert report.leak <= 1e-6
    assert report.total_change_outside > 0.1  # block 2 and 3 react to what was written at block 1
    only = constrain(zoo.model("gemma2"), sets, kind=kind, layers=[3])
    assert [site.plan.layer for site in only.sites] == [3]


def test_a_hook_before_a_block_is_the_output_of_the_one_before_it(zoo):
    directions = replace(zoo.directions(), hook_name="blocks.3.hook_resid_pre")
    assert constrain(zoo.model("olmo2"), directions, kind="residual").sites[0].name == "model.layers.2"


@pytest.mark.parametrize("keyed", [False, True])
def test_a_control_basis_replaces_only_what_is_written(zoo, keyed):
    from featcl.features import random_directions

    model = zoo.model("olmo2")
    chosen = directions_for(zoo, model)
    control = random_directions(chosen, seed=3)
    gate = {2: chosen} if keyed else chosen
    adapter = zoo.train(constrain(model, control, kind="gated", gate=gate))
    site = adapter.sites[0]
    assert float(Subspace(site.write_basis).overlap(control.subspace()).min()) > 0.999
    assert torch.equal(site.encoder.W_enc, chosen.encoder.W_enc)
    assert {row.reads for row in adapter.report().rows} <= set(chosen.feature_ids)
    assert {row.writes for row in adapter.report().rows} <= set(control.feature_ids)
    base, changed = streams(adapter, *zoo.batch())
    silent = ~(chosen.encoder(base) > 0).any(-1)
    assert torch.equal(changed[silent], base[silent])
    assert adapter.leak(*zoo.batch()).leak <= 1e-6


def test_a_gate_of_another_block_is_an_error(zoo):
    model = zoo.model("olmo2")
    sets = {1: zoo.directions(layer=1), 2: zoo.directions()}
    with pytest.raises(FeatclError, match="layer 1: the gate's features are those of block 2"):
        constrain(model, sets, kind="gated", gate=directions_for(zoo, model))


@pytest.mark.parametrize(
    ("layers", "says"), [([], "layer 1: the mapping"), ([1], "layer 3: the mapping"), ([1, 3, 2], "layer 2: it has a")]
)
def test_a_mapping_of_gates_names_the_adapted_layers_and_no_others(zoo, layers, says):
    model = zoo.model("llama")
    sets = {layer: directions_for(zoo, model, layer=layer) for layer in (1, 3)}
    gates = {layer: directions_for(zoo, model, layer=layer, seed=5, k=4) for layer in layers}
    with pytest.raises(FeatclError, match=says):
        constrain(model, sets, kind="gated", gate=gates)


def test_gates_of_layers_that_are_left_out_are_left_out_too(zoo):
    model = zoo.model("llama")
    sets = {layer: directions_for(zoo, model, layer=layer) for layer in (1, 3)}
    gates = {layer: directions_for(zoo, model, layer=layer, seed=5, k=4) for layer in (1, 3)}
    adapter = constrain(model, sets, kind="gated", gate=gates, layers=[3])
    assert [site.plan.gate for site in adapter.sites] == [gates[3]]


def test_spans_tell_what_is_written_and_read(zoo):
    adapter = hooked(zoo, "olmo2", "residual")
    directions = adapter.sites[0].plan.directions
    spans = adapter.spans()
    assert set(spans) == {("write", 2), ("read", 2)}
    assert float(spans["write", 2].overlap(directions.subspace()).min()) > 0.9999
    assert float(spans["read", 2].overlap(Subspace.from_vectors(directions.readers)).min()) > 0.9999
    assert set(hooked(zoo, "olmo2", "gated").spans()) == {("write", 2)}


# --- the report ----------------------------------------------------------------------------------------------------


def test_the_report_names_the_link_that_was_planted(zoo):
    model = zoo.model("olmo2")
    directions = directions_for(zoo, model)
    adapter = constrain(model, directions, kind="residual")
    site = adapter.sites[0]
    # feature 103 is written +0.8 when feature 101 is active: Dᵀ X E with one entry, back in coordinates
    X = torch.zeros(6, 6)
    X[3, 1] = 0.8
    update = directions.vectors.T @ X @ directions.readers
    with torch.no_grad():
        site.coordinates.copy_(site.write_basis.T @ update @ site.read_basis)
    report = adapter.report(top=3)
    first = report.rows[0]
    assert (first.writes, first.reads, first.writes_name, first.reads_name) == (103, 101, "name 3", "name 1")
    assert first.strength == pytest.approx(0.8, abs=1e-5)
    assert first.share == pytest.approx(1.0, abs=1e-5)
    assert str(first) == "writes feature 103 (name 3) +0.8 when feature 101 (name 1) is active"
    assert str(first) in str(report)
    assert "<td>103 (name 3)</td><td>+0.8</td>" in report._repr_html_()
    assert report.to_dicts()[0]["writes"] == 103
    assert len(report.rows) == 3
    raw = site.coordinates.detach()
    assert float((raw - X).norm() / X.norm()) > 0.1, "raw coordinates would say something else"


def test_a_report_escapes_names_and_shift_writes_always(zoo):
    model = zoo.model("olmo2")
    directions = replace(zoo.directions(), names=tuple("<b>&" for _ in range(6)))
    adapter = constrain(model, directions, kind="shift")
    assert adapter.report().rows == ()
    zoo.train(adapter, steps=2)
    report = adapter.report(2)
    assert report.rows[0].reads is None
    assert str(report.rows[0]).endswith(" always")
    assert "<b>" not in report._repr_html_()
    assert "&lt;b&gt;&amp;" in report._repr_html_()


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rank"), [*((kind, None) for kind in KINDS), ("residual", 2), ("gated", 2)])
def test_saved_and_loaded_gives_the_same_bits(zoo, tmp_path, kind, rank):
    adapter = zoo.train(hooked(zoo, "gemma2", kind, rank=rank))
    adapter.save(tmp_path / "one")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {MANIFEST, TENSORS}
    loaded = featcl.load_adapter(tmp_path / "one", zoo.model("gemma2"))
    assert torch.equal(logits(loaded.model, *zoo.batch()), logits(adapter.model, *zoo.batch()))
    assert (loaded.kind, loaded.rank, loaded.delta_norm()) == (kind, adapter.rank, adapter.delta_norm())
    assert loaded.report(5).to_dicts() == adapter.report(5).to_dicts()
    assert loaded.leak(*zoo.batch()) == adapter.leak(*zoo.batch())
    loaded.save(tmp_path / "two")
    for name in (MANIFEST, TENSORS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    zoo.train(loaded, steps=1)
    assert loaded.leak(*zoo.batch()).leak <= 1e-6


def test_a_gate_that_is_not_the_directions_own_is_saved_too(zoo, tmp_path):
    model = zoo.model("olmo2")
    chosen = directions_for(zoo, model)
    adapter = zoo.train(constrain(model, zoo.directions(4, seed=8), kind="gated", gate=chosen, protect=None))
    adapter.save(tmp_path)
    loaded = featcl.load_adapter(tmp_path, zoo.model("olmo2"))
    assert torch.equal(logits(loaded.model, *zoo.batch()), logits(adapter.model, *zoo.batch()))
    assert loaded.report(4) == adapter.report(4)


def test_saving_gives_the_same_bytes_in_every_process(tmp_path, root):
    import subprocess
    import sys

    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from conftest import build_directions, build_model\n"
        "from featcl.adapters import constrain\n"
        "constrain(build_model('olmo2'), build_directions(), kind='residual', seed=3, rank=2).save(sys.argv[1])\n"
    )
    for seed in (0, 1):
        command = [sys.executable, "-c", script, str(tmp_path / str(seed)), str(root / "tests" / "adapters")]
        environment = {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
    for name in (MANIFEST, TENSORS):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_with_the_reason(zoo, kind):
    adapter = hooked(zoo, "olmo2", kind)
    with pytest.raises(FeatclError, match=f"kind '{kind}' has no PEFT form and cannot be merged: it ") as caught:
        adapter.merge()
    assert "\n" not in str(caught.value)


def test_bad_folders_are_one_clear_error(zoo, tmp_path):
    adapter = zoo.train(hooked(zoo, "olmo2", "residual"), steps=1)
    adapter.save(tmp_path / "good")
    with pytest.raises(FeatclError, match="does not hold a saved hook adapter"):
        featcl.load_adapter(tmp_path, zoo.model("olmo2"))
    constrain(zoo.model("olmo2"), zoo.directions()).save(tmp_path / "peft")
    with pytest.raises(FeatclError, match="is a plain PEFT adapter"):
        featcl.load_adapter(tmp_path / "peft", zoo.model("olmo2"))
    manifest = json.loads((tmp_path / "good" / MANIFEST).read_text())
    for change, says in (
        ({"format": 7}, "format 7 is unknown"),
        ({"kind": "write"}, "kind 'write' in format 1 is unknown"),
        ({"digest": "0"}, "does not match its digest"),
        ({"d_model": 64}, "was learned on olmo2 of width 64, the model is olmo2 of 32"),
        ({"family": "gemma2"}, "was learned on gemma2 of width 32, the model is olmo2 of 32"),
        ({"sites": [{}]}, "lacks 'layer'"),
    ):
        (tmp_path / "good" / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(FeatclError, match=says) as caught:
            featcl.load_adapter(tmp_path / "good", zoo.model("olmo2"))
        assert "\n" not in str(caught.value)
    (tmp_path / "good" / MANIFEST).write_text("{")
    with pytest.raises(FeatclError, match="does not hold a saved hook adapter"):
        featcl.load_adapter(tmp_path / "good", zoo.model("olmo2"))


# --- coordinates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_go_out_and_come_back_bit_equal(zoo, kind):
    adapter = zoo.train(hooked(zoo, "gemma2", kind))
    moved = logits(adapter.model, *zoo.batch())
    other = hooked(zoo, "gemma2", kind)
    other.load_coordinates_(adapter.coordinates())
    assert torch.equal(logits(other.model, *zoo.batch()), moved)
    assert list(adapter.coordinates()) == [f"model.layers.2.{'C' if kind in ('residual', 'gated') else 'c'}"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_from_the_base_has_its_gradient(zoo, kind):
    adapter = zoo.train(hooked(zoo, "olmo2", kind))
    distance = adapter.distance_squared()
    assert float(distance.detach()) == pytest.approx(adapter.delta_norm() ** 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(distance, adapter.parameters())
    torch.testing.assert_close(gradient, 2 * adapter.parameters()[0].detach())


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "gated"}, "kind 'gated' needs the SAE's own encoder"),
        ({"kind": "residual", "layers": [1]}, "layer 1: a hook adapter acts where its directions live, at block 2"),
        ({"kind": "residual", "layers": []}, "the list is empty"),
        ({"kind": "residual", "modules": ["o_proj"]}, "has no modules to choose"),
        ({"kind": "residual", "rank": 7}, "rank 7 is not between 1 and 6"),
        ({"kind": "residual", "rank": 0}, "rank 0 is not between 1 and 6"),
        ({"kind": "shift", "rank": 2}, "kind 'shift' trains one number per direction, so it has no rank"),
        ({"kind": "scale", "protect": {"read": torch.eye(32)[:2]}}, "kind 'scale' has no read side of its own"),
        ({"kind": "residual", "protect": {"both": torch.eye(32)[:2]}}, "unknown role 'both'"),
        ({"kind": "shift", "protect": torch.eye(32)}, "nothing is left of the 6 directions after protecting"),
        ({"kind": "residual", "gate": 1}, "kind 'residual' takes no gate"),
        ({"kind": "steer"}, "there is none, write, read, both, residual, gated, shift, scale"),
    ],
)
def test_bad_arguments_are_one_clear_error_and_leave_the_model_alone(zoo, arguments, says):
    model = zoo.model("olmo2")
    with pytest.raises(FeatclError, match=says) as caught:
        constrain(model, zoo.directions(), **arguments)
    assert "\n" not in str(caught.value)
    assert hooked_blocks(model) == []


def loose(vectors, layer=2, hook_name=None, readers=None):
    from types import SimpleNamespace

    return SimpleNamespace(
        vectors=vectors, readers=readers, feature_ids=None, hook_name=hook_name, layer=layer, names=None
    )


@pytest.mark.parametrize(
    ("directions", "says"),
    [
        (loose(torch.randn(33, 32)), "k = 33 directions do not fit into d_model = 32"),
        (loose(torch.zeros(0, 32)), "k >= 1"),
        (loose(torch.randn(3, 16)), "width 16, the model has d_model = 32"),
        (loose(torch.randn(3, 32), layer=9), "the model has blocks 0 to 3"),
        (loose(torch.randn(3, 32), hook_name="blocks.0.hook_resid_pre"), "the model has blocks 0 to 3"),
        (loose(torch.randn(3, 32), hook_name="blocks.2.hook_mlp_out"), "no residual-stream hook"),
        (loose(torch.eye(32)[[0, 1, 0]]), "near-dependent directions feature 2"),
        (loose(torch.eye(32)[:3], readers=torch.eye(32)[[0, 0, 1]]), "near-dependent directions feature 1"),
        (loose(torch.full((2, 32), float("inf"))), "NaN or infinity"),
        ({}, "the mapping from layer to directions is empty"),
        ({3: loose(torch.randn(3, 32), layer=2)}, "layer 3: its directions live at the output of block 2, not there"),
    ],
)
def test_bad_directions_are_one_clear_error(zoo, directions, says):
    with pytest.raises(FeatclError, match=says):
        constrain(zoo.model("olmo2"), directions, kind="residual")


def test_an_encoder_of_another_width_is_an_error(zoo):
    directions = directions_for(zoo, zoo.model("olmo2"))
    narrow = replace(directions.encoder, W_enc=directions.encoder.W_enc[:16])
    with pytest.raises(FeatclError, match="the SAE's encoder reads width 16, the model has d_model = 32"):
        constrain(zoo.model("olmo2"), replace(directions, encoder=narrow), kind="gated")


def test_the_leak_of_an_adapter_that_is_off_is_an_error(zoo):
    adapter = zoo.train(hooked(zoo, "olmo2", "residual"), steps=1)
    with adapter.disabled(), pytest.raises(FeatclError, match="is it switched off or removed"):
        adapter.leak(*zoo.batch())
    adapter.remove()
    with pytest.raises(FeatclError, match="is it switched off or removed"):
        adapter.leak(*zoo.batch())


def test_an_unknown_family_is_refused(zoo):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=32))
    with pytest.raises(FeatclError, match="unknown architecture 'gpt2'"):
        constrain(model, zoo.directions(), kind="residual")
