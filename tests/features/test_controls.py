"""Controls have the shape of what they stand in for, and none of its content."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import pca_directions, random_directions, random_features, select_features
from featcl.models import residual_stream
from featcl.subspace import Subspace

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs!"]


@pytest.fixture
def chosen(sae, tiny):
    source, (model, tokenizer) = sae(), tiny()
    return (
        select_features(source, model, tokenizer, selector="ids", feature_ids=[1, 5, 9, 20]),
        source,
        model,
        tokenizer,
    )


def test_same_shape_and_place(chosen):
    directions, source, model, tokenizer = chosen
    for control in (
        random_directions(directions, seed=1),
        pca_directions(directions, model, tokenizer, TEXTS),
        random_features(directions, source, model, seed=1),
    ):
        assert (control.k, control.layer, control.hook_name) == (4, directions.layer, directions.hook_name)
        assert control.selector in ("random", "pca", "random_features")
        assert control.manifest["in_place_of"] == directions.digest or control.selector == "pca"
        assert control.digest != directions.digest
        assert control.subspace().k == 4


def test_seeds(chosen):
    directions, source, model, _ = chosen
    assert random_directions(directions, seed=3).digest == random_directions(directions, seed=3).digest
    assert random_directions(directions, seed=3).digest != random_directions(directions, seed=4).digest
    first, second = (random_features(directions, source, model, seed=s) for s in (3, 4))
    assert first.feature_ids != second.feature_ids
    assert not set(first.feature_ids) & set(directions.feature_ids)
    assert first.encoder is not None


def test_pca_is_that_of_the_residual_stream(chosen):
    directions, _, model, tokenizer = chosen
    rows = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        rows.append(residual_stream(model, ids, torch.ones_like(ids), layer=1)[0])
    expected = Subspace.pca(torch.cat(rows), 4)
    found = pca_directions(directions, model, tokenizer, TEXTS)
    assert found.subspace().overlap(expected).min() > 1 - 1e-4
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(4), atol=1e-5)
    assert random_directions(directions).subspace().overlap(expected).min() < 0.9  # negative control


def test_bad_input(chosen, sae):
    directions, _, model, tokenizer = chosen
    with pytest.raises(FeatclError, match="too few"):
        pca_directions(directions, model, tokenizer, ["ab"])
    elsewhere = sae(metadata={"hook_name": "blocks.0.hook_resid_post", "source": "test"})
    with pytest.raises(FeatclError, match="layer 0"):
        random_features(directions, elsewhere, model)
