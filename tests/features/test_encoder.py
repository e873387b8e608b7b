"""The restricted encoder equals SAELens' own encode on the chosen columns."""

from __future__ import annotations

import pytest
import torch

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
