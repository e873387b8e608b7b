"""FLOPs from shapes against torch's own counter, which sees every product that is executed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from featcl.adapters import constrain
from featcl.errors import FeatclError
from featcl.evaluation.flops import FlopCounter, Flops
from featcl.features import Directions, FeatureEncoder
from tests.adapters.conftest import VOCAB, K, build_directions, build_model

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3_conditional", "olmo", "olmo2", "olmo3", "llama", "qwen3")
KINDS = ("none", "write", "read", "both", "residual", "gated", "shift", "scale")
BATCH, SEQ = 3, 11


def counted(model: Any, ids: torch.Tensor, *, gradient: bool) -> tuple[int, int]:
    """What torch executes forward and backward, without the angles of the rotary embedding."""
    with FlopCounterMode(display=False) as forward, torch.set_grad_enabled(gradient):
        logits = model(input_ids=ids, use_cache=False).logits
    angles = [found for name, found in forward.get_flop_counts().items() if name.endswith("rotary_emb")]
    with FlopCounterMode(display=False) as backward:
        if gradient:
            logits.float().logsumexp(-1).sum().backward()
    return forward.get_total_flops() - sum(sum(each.values()) for each in angles), backward.get_total_flops()


def eager(family: str) -> Any:
    """With attention as plain products: torch's counter knows no fused kernel of a CPU."""
    model = build_model(family)
    model.set_attn_implementation("eager")
    return model


def tokens() -> torch.Tensor:
    return torch.arange(BATCH * SEQ).reshape(BATCH, SEQ) * 7 % VOCAB


def with_encoder(directions: Directions, activation: Any = "jumprelu") -> Directions:
    """For TopK all features of the SAE are computed, here twice as many as chosen."""
    assert directions.readers is not None
    columns = K if activation == "jumprelu" else 2 * K
    encoder = FeatureEncoder(
        W_enc=directions.readers.T.contiguous().repeat(1, columns // K),
        b_enc=torch.zeros(columns),
        b_dec=torch.zeros(directions.readers.shape[1]),
        threshold=torch.zeros(columns) if activation == "jumprelu" else None,
        activation=activation,
        active=0 if activation == "jumprelu" else 4,
        chosen=tuple(range(K)),
    )
    return replace(directions, encoder=encoder)


def compared(model: Any) -> tuple[Flops, tuple[int, int]]:
    found = FlopCounter(model).full_pass(BATCH, SEQ, gradient=True)
    return found, counted(model, tokens(), gradient=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_of_every_family(family: str) -> None:
    model = eager(family)
    found = FlopCounter(model).full_pass(BATCH, SEQ)
    assert (found.forward, found.backward) == counted(model, tokens(), gradient=False)
    width = model.config.get_text_config().num_attention_heads * 8
    assert found.attention == 4 * 4 * BATCH * SEQ * SEQ * width  # 4 blocks
    assert FlopCounter(model).full_pass(BATCH, SEQ, gradient=True).backward == 0  # nothing is trained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["both", "residual"])
def test_forward_and_backward_of_every_family(family: str, kind: str) -> None:
    adapter = constrain(eager(family), build_directions(), kind=kind)
    found, expected = compared(adapter.model)
    assert (found.forward, found.backward) == expected
    assert 0 < found.backward < 2 * found.forward  # a frozen base wants no gradient of its weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [None, "lowest"])
def test_forward_and_backward_of_every_kind(kind: str, layers: str | None) -> None:
    directions = with_encoder(build_directions(layer=1 if layers else 2))
    adapter = constrain(eager("olmo2"), directions, kind=kind)
    found, expected = compared(adapter.model)
    assert (found.forward, found.backward) == expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("write", {"rank": 3}), ("read", {"rank": 3}), ("both", {"rank": 2}), ("residual", {"rank": 3}),
        ("gated", {"rank": 2}), ("none", {"rank": 3}), ("both", {"training": "train_both_factors"}),
        ("write", {"layers": [0]}), ("read", {"layers": [2]}), ("write", {"modules": ["down_proj"]}),
        ("read", {"modules": ["q_proj"]}), ("read", {"modules": ["v_proj"]}),
        ("read", {"modules": ["k_proj", "up_proj"]}),
    ],
)  # fmt: skip
def test_ranks_layers_and_modules(kind: str, options: dict[str, Any]) -> None:
    adapter = constrain(eager("gemma2"), with_encoder(build_directions()), kind=kind, **options)
    found, expected = compared(adapter.model)
    assert (found.forward, found.backward) == expected


def test_topk_computes_all_features_of_the_sae() -> None:
    adapter = constrain(eager("olmo2"), with_encoder(build_directions(), "topk"), kind="gated")
    found, expected = compared(adapter.model)
    assert (found.forward, found.backward) == expected


def test_several_adapters_and_one_that_is_off() -> None:
    model = eager("olmo2")
    first = constrain(model, build_directions(), kind="both", name="first")
    second = constrain(model, build_directions(seed=1), kind="residual", name="second")
    both, expected = compared(second.model)
    assert (both.forward, both.backward) == expected
    with second.disabled(only_this=True):
        one, expected = compared(second.model)
        assert (one.forward, one.backward) == expected
    with first.disabled():
        none = FlopCounter(second.model).full_pass(BATCH, SEQ)
        assert (none.forward, none.backward) == counted(second.model, tokens(), gradient=False)
        assert none == FlopCounter(eager("olmo2")).full_pass(BATCH, SEQ)
    assert both.forward > one.forward > none.forward


@pytest.mark.parametrize("kind", ["both", "residual"])
def test_what_is_kept_from_earlier_directions_costs_too(kind: str) -> None:
    adapter: Any = constrain(eager("olmo2"), build_directions(), kind=kind)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    before = FlopCounter(adapter.model).full_pass(BATCH, SEQ).forward
    adapter.consolidate(build_directions(seed=3))
    found, expected = compared(adapter.model)
    assert (found.forward, found.backward) == expected
    assert found.forward > before


def test_fused_attention_costs_the_same_products() -> None:
    model = build_model("olmo2")
    assert model.config._attn_implementation == "sdpa"
    adapter = constrain(model, build_directions(), kind="both")
    found, expected = compared(adapter.model)
    assert found.forward - found.attention == expected[0]  # torch counts nothing of this kernel on a CPU
    assert found == FlopCounter(constrain(eager("olmo2"), build_directions(), kind="both").model).full_pass(
        BATCH, SEQ, gradient=True
    )


def test_a_cache_leaves_the_new_tokens_with_all_keys() -> None:
    model = eager("olmo2")
    ids = tokens()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True)
    angles = [found for name, found in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    expected = counter.get_total_flops() - sum(sum(each.values()) for each in angles)
    found = FlopCounter(model).full_pass(BATCH, 3, past=8)
    assert found.forward == expected
    assert found.forward > FlopCounter(model).full_pass(BATCH, 3).forward  # control: keys cost something


def test_trained_weights_of_the_base_cost_their_gradient() -> None:
    model = eager("olmo2")
    model.requires_grad_(True)
    found, expected = compared(model)
    assert (found.forward, found.backward) == expected
    assert found.backward == 2 * found.forward  # the embeddings' gradient is no product


def test_costs_add_and_grow_with_length_as_they_should() -> None:
    counter = FlopCounter(eager("olmo2"))
    one, two = counter.full_pass(1, 8), counter.full_pass(1, 16)
    assert two.attention == 4 * one.attention
    assert two.forward - two.attention == 2 * (one.forward - one.attention)
    assert counter.full_pass(2, 8) == one + one
    assert one.forward - counter.full_pass(1, 8, predictions=1).forward == 2 * 7 * 32 * VOCAB
    assert counter.blocks_pass(1, 8, first=1).forward * 4 == counter.blocks_pass(1, 8).forward * 3


def test_an_architecture_without_these_projections_is_an_error() -> None:
    model = eager("olmo2")
    model.config.model_type = "mamba"
    with pytest.raises(FeatclError, match="unknown architecture 'mamba'"):
        FlopCounter(model)
