"""Hooks: both spellings name one module in every family, and directions map to what the model really writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import hooks
from featcl.models import residual_map
from tests.adapters.conftest import build_model

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3_conditional", "olmo", "olmo2", "olmo3", "llama", "qwen3")
SANDWICH = ("gemma2", "gemma3", "gemma3_conditional", "olmo2", "olmo3")
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def seen(model: Any, hook: hooks.Hook) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    with hooks.replacing(model, hook, lambda x: kept.append(x.detach())), torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_name_one_module(family):
    model = build_model(family)
    path = residual_map(model).layers_path
    assert path == ("model.language_model.layers" if family == "gemma3_conditional" else "model.layers")
    resid = hooks.resolve(model, "blocks.2.hook_resid_post")
    assert (resid.module, resid.layer, resid.site, resid.side) == (f"{path}.2", 2, "resid", "output")
    # prefixes of the other Gemma-3 class, a bare path, the next block's input
    for name in ("model.layers.2", "model.layers.2.output", "model.language_model.layers.2.output", "layers.2",
                 "language_model.model.layers.2", "base_model.model.model.layers.2", "blocks.3.hook_resid_pre",
                 "model.layers.3.input"):  # fmt: skip
        assert hooks.resolve(model, name) == resid, name

    z = hooks.resolve(model, "blocks.1.attn.hook_z")
    assert (z.module, z.site, z.side) == (f"{path}.1.self_attn.o_proj", "attn_z", "input")
    assert hooks.resolve(model, "model.layers.1.self_attn.o_proj.input") == z

    mlp = hooks.resolve(model, "blocks.1.hook_mlp_out")
    raw = hooks.resolve(model, "model.layers.1.mlp.output")
    if family in SANDWICH:
        assert mlp.module == f"{path}.1.post_feedforward_layernorm"
        assert hooks.resolve(model, "model.layers.1.post_feedforward_layernorm.output") == mlp
        assert (raw.module, raw.before_norm) == (f"{path}.1.mlp", True)
    else:
        assert mlp == raw == hooks.resolve(model, "blocks.1.mlp.hook_out")
        assert (mlp.module, mlp.before_norm) == (f"{path}.1.mlp", False)
    assert hooks.resolve(model, "model.layers.1.mlp.down_proj.output") == raw


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_transformers_computes(family):
    """Block output = next hidden state; heads times W_O = o_proj's output; the MLP hook = what it adds."""
    model = build_model(family)
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(seen(model, hooks.resolve(model, "blocks.1.hook_resid_post")), states[2])
    z = hooks.resolve(model, "blocks.2.attn.hook_z")
    o_proj: Any = model.get_submodule(z.module)
    caught: list[torch.Tensor] = []
    handle = o_proj.register_forward_hook(lambda _m, _i, out: caught.append(out))
    heads = seen(model, z)
    handle.remove()
    assert torch.allclose(heads @ o_proj.weight.T, caught[0], atol=1e-6)
    # before + attention's write + MLP's write = after; the first two are the input of the MLP's branch
    mlp = hooks.resolve(model, "blocks.2.hook_mlp_out")
    block: Any = model.get_submodule(hooks.resolve(model, "blocks.2.hook_resid_post").module)
    middle: list[torch.Tensor] = []
    norm = {"olmo2": block.mlp, "olmo3": block.mlp}.get(family)
    if norm is None:
        norm = block.pre_feedforward_layernorm if family in SANDWICH else block.post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda _m, inputs: middle.append(inputs[0]))
    written = seen(model, mlp)
    handle.remove()
    assert torch.allclose(middle[0] + written, states[3], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_directions_map_to_what_they_write(family):
    """Adding a direction d at hook_z moves the stream, to first order per token, along to_residual(d) and nowhere else.

    The post-norm's division by the root mean square adds a multiple of the block's own write, so that multiple is
    projected out; without a post-norm nothing else is there.
    """
    model = build_model(family)
    z, resid = hooks.resolve(model, "blocks.3.attn.hook_z"), hooks.resolve(model, "blocks.3.hook_resid_post")
    o_proj: Any = model.get_submodule(z.module)
    block: Any = model.get_submodule(resid.module)
    d = torch.randn(1, hooks.width(model, z), generator=torch.Generator().manual_seed(1))
    mapped = hooks.to_residual(model, z, d)[0]
    norm = block.post_attention_layernorm if family in SANDWICH else o_proj
    outputs: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda _m, _i, out: outputs.append(out.detach()))
    eps = 1e-2
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
        with hooks.replacing(model, z, lambda x: x + eps * d):
            model(input_ids=IDS, use_cache=False)
    handle.remove()
    base, change = outputs[0], (outputs[1] - outputs[0]) / eps
    basis = (
        torch.stack([mapped.expand_as(base), base], dim=-1) if family in SANDWICH else mapped.expand_as(base)[..., None]
    )
    solution = torch.linalg.lstsq(basis, change[..., None])
    left = (basis @ solution.solution - change[..., None]).norm() / change.norm()
    assert left < 2e-2
    assert (solution.solution[..., 0, 0] > 0).all()
    # control: the vector without W_O (and without the gain, where there is one) explains little
    raw = d[0] @ o_proj.weight.T if family in SANDWICH else d[0]
    wrong = torch.stack([raw.expand_as(base), base], dim=-1)
    wrong = wrong if family in SANDWICH else wrong[..., :1]
    unexplained = (wrong @ torch.linalg.lstsq(wrong, change[..., None]).solution - change[..., None]).norm()
    assert unexplained / change.norm() > 0.2


def test_mlp_directions_get_the_gain_only_before_the_norm():
    model = build_model("gemma2")
    d = torch.randn(3, 32)
    after, before = hooks.resolve(model, "blocks.1.hook_mlp_out"), hooks.resolve(model, "model.layers.1.mlp.output")
    gain = 1 + model.get_submodule("model.layers.1.post_feedforward_layernorm").weight
    assert torch.equal(hooks.to_residual(model, after, d), d)
    assert torch.allclose(hooks.to_residual(model, before, d), d * gain)
    assert torch.equal(hooks.to_residual(model, hooks.resolve(model, "model.layers.1"), d), d)
    with pytest.raises(FeatclError, match="directions of width 31, the model has 32 there"):
        hooks.to_residual(model, after, d[:, :31])


def test_an_adapted_model_is_mapped_with_its_base_weights(zoo_adapter):
    adapter, plain = zoo_adapter
    d = torch.randn(2, 32)
    z = hooks.resolve(adapter.model, "blocks.2.attn.hook_z")
    assert z == hooks.resolve(plain, "blocks.2.attn.hook_z")
    assert torch.equal(hooks.to_residual(adapter.model, z, d), hooks.to_residual(plain, z, d))
    assert not torch.equal(seen(adapter.model, hooks.resolve(adapter.model, "blocks.2.hook_resid_post")),
                           seen(plain, hooks.resolve(plain, "blocks.2.hook_resid_post")))  # fmt: skip


@pytest.fixture
def zoo_adapter():
    from featcl.adapters import constrain
    from tests.adapters.conftest import build_directions, train

    return train(constrain(build_model("gemma2"), build_directions(), kind="both"), steps=3), build_model("gemma2")


def test_replacing_changes_what_flows_on_and_ends_with_the_block():
    model = build_model("llama")
    hook, after = hooks.resolve(model, "blocks.1.attn.hook_z"), hooks.resolve(model, "blocks.1.hook_resid_post")
    before = seen(model, after)
    with hooks.replacing(model, hook, torch.zeros_like):
        assert not torch.allclose(seen(model, after), before, atol=1e-3)
    assert torch.equal(seen(model, after), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "says"), [
    ("blocks.9.attn.hook_z", "blocks 0 to 3"), ("blocks.9.hook_mlp_out", "blocks 0 to 3"),
    ("blocks.4.hook_resid_post", "blocks 0 to 3"), ("blocks.0.hook_resid_pre", "blocks 0 to 3"),
    ("blocks.1.hook_resid_mid", "no hook that SAEs are read at"), ("hook_embed", "no hook that SAEs are read at"),
    ("model.layers.1.self_attn.o_proj", "no hook that SAEs are read at"),
    ("model.vision_tower.encoder.layers.1", "no hook that SAEs are read at"),
    ("model.layers.1.post_feedforward_layernorm.output", "no such norm after its MLP"),
])  # fmt: skip
def test_other_names_are_refused(name, says):
    with pytest.raises(FeatclError, match=says):
        hooks.resolve(build_model("llama"), name)


def test_an_sae_whose_names_disagree_is_refused(sae):
    model = build_model("gemma2")

    def resolve(**metadata: Any) -> hooks.Hook:
        return hooks.resolve(model, sae("jumprelu", metadata={"source": "made", **metadata}))

    good = {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "model.layers.1.output"}
    assert resolve(**good).module == "model.layers.1"
    assert resolve(hf_hook_name="model.layers.1.output") == resolve(**good)
    with pytest.raises(FeatclError, match=r"hook_name blocks.1.hook_resid_post is model.layers.1.output, but its "
                       r"hf_hook_name says model.layers.2.output"):  # fmt: skip
        resolve(**good | {"hf_hook_name": "model.layers.2.output"})
    with pytest.raises(FeatclError, match="does not say where it was trained"):
        resolve()
    with pytest.raises(FeatclError, match="transcoder"):
        resolve(**good, hook_name_out="blocks.1.hook_mlp_out")
    with pytest.raises(FeatclError, match="head 3 alone"):
        resolve(**good, hook_head_index=3)
    with pytest.raises(FeatclError, match="width 24, the model has 32 there"):
        hooks.resolve(model, sae("jumprelu", d_model=24))


def test_the_resolution_reads_as_a_sentence():
    model = build_model("gemma2")
    texts = {name: str(hooks.resolve(model, name)) for name in
             ("model.layers.1", "blocks.1.attn.hook_z", "model.layers.1.mlp.output")}  # fmt: skip
    assert texts["model.layers.1"] == (
        "blocks.1.hook_resid_post = model.layers.1.output (the residual stream after block 1)"
    )
    assert "model.layers.1.self_attn.o_proj.input (the heads of block 1" in texts["blocks.1.attn.hook_z"]
    assert "before its norm" in texts["model.layers.1.mlp.output"]


def test_names_without_a_model():
    assert hooks.tl_name("model.layers.3.output") == "blocks.3.hook_resid_post"
    assert hooks.tl_name("model.layers.3.post_feedforward_layernorm.output") == "blocks.3.hook_mlp_out"
    assert hooks.tl_name("model.layers.3.self_attn.o_proj.input") == "blocks.3.attn.hook_z"
    assert hooks.tl_name("model.layers.3.mlp.output") == "model.layers.3.mlp.output"  # depends on the model
    assert hooks.hf_name("blocks.3.hook_mlp_out") is None
    assert hooks.hf_name("blocks.3.attn.hook_z") == "model.layers.3.self_attn.o_proj.input"
    assert hooks.tl_name("lm_head") is None
