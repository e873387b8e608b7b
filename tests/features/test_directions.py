"""Directions: unit rows, exact save and load, a digest of the content, faults named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import Directions, FeatureEncoder


@pytest.fixture
def directions(sae) -> Directions:
    source = sae()
    ids = (3, 40, 7)
    return Directions.from_vectors(
        source.W_dec[list(ids)],
        readers=source.W_enc[:, list(ids)].T,
        layer=1,
        feature_ids=ids,
        selector="ids",
        encoder=FeatureEncoder.from_sae(source, ids),
        manifest={"sae": "test", "scores": {"effect": [1.5, 1.0, 0.5]}},
    )


def test_rows_are_unit_and_parallel_to_what_was_given(sae, directions):
    rows = sae().W_dec[[3, 40, 7]]
    cosines = (directions.vectors * rows).sum(-1) / rows.norm(dim=-1)
    assert torch.allclose(cosines, torch.ones(3), atol=1e-6)
    assert torch.allclose(directions.readers.norm(dim=-1), torch.ones(3), atol=1e-6)
    assert directions.hook_name == "blocks.1.hook_resid_post"


def test_save_load_is_exact(directions, tmp_path):
    directions.save(tmp_path / "d")
    loaded = Directions.load(tmp_path / "d")
    assert torch.equal(loaded.vectors, directions.vectors)
    assert torch.equal(loaded.readers, directions.readers)
    assert (loaded.feature_ids, loaded.layer, loaded.hook_name, loaded.selector, loaded.manifest) == (
        directions.feature_ids,
        directions.layer,
        directions.hook_name,
        directions.selector,
        directions.manifest,
    )
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.encoder(hidden), directions.encoder(hidden))
    assert loaded.digest == directions.digest
    before = (tmp_path / "d" / "directions.safetensors").read_bytes()
    loaded.save(tmp_path / "d")
    assert (tmp_path / "d" / "directions.safetensors").read_bytes() == before


def test_without_readers(tmp_path):
    plain = Directions.from_vectors(torch.eye(8)[:3], layer=2, hook_name="model.layers.2")
    plain.save(tmp_path)
    loaded = Directions.load(tmp_path)
    assert loaded.readers is None
    assert loaded.encoder is None
    assert loaded.feature_ids == (0, 1, 2)
    assert loaded.digest == plain.digest


def test_digest_is_of_the_content(directions):
    same = dataclasses.replace(directions, selector="contrast", manifest={})
    assert same.digest == directions.digest
    turned = directions.vectors.flip(0)
    assert dataclasses.replace(directions, vectors=turned).digest != directions.digest
    assert dataclasses.replace(directions, layer=2).digest != directions.digest


def test_tampering_is_noticed(directions, tmp_path):
    directions.save(tmp_path)
    manifest = json.loads((tmp_path / "directions.json").read_text())
    manifest["layer"] = 0
    (tmp_path / "directions.json").write_text(json.dumps(manifest))
    with pytest.raises(FeatclError, match="digest"):
        Directions.load(tmp_path)
    with pytest.raises(FeatclError, match="does not hold saved directions"):
        Directions.load(tmp_path / "nowhere")


def test_subspace_spans_the_vectors(directions):
    subspace = directions.subspace()
    assert subspace.basis.shape == (32, 3)
    assert torch.allclose(subspace.project(directions.vectors), directions.vectors, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (torch.stack([torch.ones(4), torch.zeros(4)]), "feature 11 is zero"),
        (torch.full((2, 4), float("nan")), "feature 10 is zero or not finite"),
        (torch.eye(4), r"\[k=2"),
    ],
)
def test_bad_rows(rows, says):
    with pytest.raises(FeatclError, match=says):
        Directions.from_vectors(rows, layer=0, feature_ids=[10, 11])


def test_bad_counts():
    with pytest.raises(FeatclError, match="twice"):
        Directions.from_vectors(torch.eye(4)[:2], layer=0, feature_ids=[1, 1])
    with pytest.raises(FeatclError, match="names"):
        Directions.from_vectors(torch.eye(4)[:2], layer=0, names=("one",))
    with pytest.raises(FeatclError, match="unit rows"):
        Directions(2 * torch.eye(4)[:2], None, (0, 1), "blocks.0.hook_resid_post", 0, "ids")


def test_a_negative_feature_id_is_refused():
    with pytest.raises(FeatclError, match="feature id -1 is negative"):
        Directions.from_vectors(torch.eye(8)[:2], layer=0, feature_ids=[-1, 3])
