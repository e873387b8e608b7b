"""The restricted encoder equals SAELens' own encode on the chosen columns."""

from __future__ import annotations

import pytest
import torch

from featcl.features import encoder as encoder_module
from featcl.features.encoder import FeatureEncoder

CASES = [
    ("standard", {}),
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("jumprelu", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {"k": 6}),
    ("topk", {"k": 6, "rescale_acts_by_decoder_norm": True}),
]


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_equals_saelens(sae, architecture, config):
    source = sae(architecture, **config)
    ids = (40, 3, 17, 8)
    hidden = 3 * torch.randn(5, 11, 32, generator=torch.Generator().manual_seed(1))
    expected = source.encode(hidden)[..., list(ids)]
    encoder = FeatureEncoder.from_sae(source, ids)
    assert encoder.k == 4
    assert (encoder(hidden) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert 0 < (expected > 0).float().mean() < 1  # some fire, some do not


def test_topk_needs_all_columns(sae):
    """Negative control: competing among the chosen columns alone is not the SAE's activation."""
    source = sae("topk", k=6)
    ids = list(range(12))
    hidden = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    hidden_pre = (hidden - source.b_dec) @ source.W_enc[:, ids] + source.b_enc[ids]
    values, winners = hidden_pre.relu().topk(6)
    among_chosen = torch.zeros(50, 12).scatter(-1, winners, values)
    assert (among_chosen - source.encode(hidden)[:, ids]).abs().max() > 0.1


def test_other_architectures_have_none(sae):
    assert FeatureEncoder.from_sae(sae("gated"), (1, 2)) is None


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_chunks_equal_the_whole_and_stay_small(sae, monkeypatch, architecture, config):
    """The same numbers however few rows fit, through one buffer."""
    source = sae(architecture, **config)
    hidden = 3 * torch.randn(101, 32, generator=torch.Generator().manual_seed(1))
    encoder = FeatureEncoder.from_sae(source, tuple(range(48)))
    whole = encoder(hidden)
    monkeypatch.setattr(encoder_module, "CHUNK_BYTES", 7 * 48 * 4)
    parts = [(where, part.clone()) for where, part in encoder.chunks(hidden)]
    assert [len(part) for _, part in parts] == [7] * 14 + [3]
    assert [where.start for where, _ in parts] == list(range(0, 101, 7))
    assert torch.allclose(torch.cat([part for _, part in parts]), whole, atol=1e-5)
    assert torch.allclose(encoder(hidden), whole, atol=1e-5)


def test_gradients_flow_and_equal_those_of_saelens(sae):
    """The path with a graph is the same function."""
    source = sae("jumprelu")
    encoder = FeatureEncoder.from_sae(source, (40, 3, 17, 8))
    hidden = 3 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for encode in (encoder, lambda h: source.encode(h)[:, [40, 3, 17, 8]]):
        leaf = hidden.clone().requires_grad_()
        encode(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[0], gradients[1], atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(encoder(hidden), encoder(hidden.clone().requires_grad_()), atol=1e-5)


def test_a_negative_threshold_is_no_floor(sae):
    """relu comes first: a pre-activation between a negative threshold and zero gives nothing."""
    source = sae("jumprelu")
    source.threshold.data = -source.threshold.data
    hidden = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    encoder = FeatureEncoder.from_sae(source, tuple(range(48)))
    assert torch.allclose(encoder(hidden), source.encode(hidden), atol=1e-5)
    hidden_pre = (hidden - source.b_dec) @ source.W_enc + source.b_enc
    assert ((hidden_pre > source.threshold) & (hidden_pre < 0)).any()


@pytest.mark.parametrize("shared", [0.7, 0.0])
def test_one_threshold_for_all_as_after_batchtopk(sae, shared):
    source = sae("jumprelu")
    source.threshold.data.fill_(shared)
    hidden = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    encoder = FeatureEncoder.from_sae(source, (1, 2, 3))
    found = encoder(hidden)
    assert (found - source.encode(hidden)[:, [1, 2, 3]]).abs().max() <= 1e-5 * found.abs().max()
    assert found[found > 0].min() > shared


def test_bfloat16_activations_are_encoded_in_float32(sae):
    source = sae("jumprelu")
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    encoder = FeatureEncoder.from_sae(source, (1, 2, 3))
    assert encoder(hidden).dtype == torch.float32
    assert torch.equal(encoder(hidden), encoder(hidden.float()))
