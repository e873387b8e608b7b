"""Theorems of the basis: orthonormal, nearest, idempotent, refusing what has no span."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.subspace import Subspace, independent_rows, lowdin


def rows(k: int = 5, d_model: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, d_model, generator=torch.Generator().manual_seed(seed))


def test_lowdin_is_orthonormal_and_spans_the_rows():
    basis, mixing = lowdin(rows())
    assert basis.dtype == mixing.dtype == torch.float32
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows().T @ mixing, basis, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixing, mixing.T)


def test_lowdin_is_the_nearest_orthonormal_basis():
    """No rotation of the basis comes nearer to the rows (orthogonal Procrustes), QR does worse."""
    vectors = rows()
    basis, _ = lowdin(vectors)
    distance = (basis.T - vectors).norm()
    other, _ = torch.linalg.qr(vectors.T)
    assert distance < (other.T * other.T.mul(vectors).sum(1, keepdim=True).sign() - vectors).norm()
    for seed in range(20):
        turn, _ = torch.linalg.qr(torch.eye(5) + 0.1 * rows(5, 5, seed))
        turn = turn * turn.diagonal().sign()
        assert distance <= ((basis @ turn).T - vectors).norm() + 1e-6


def test_lowdin_follows_a_permutation_of_the_rows():
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(lowdin(rows()[order]).basis, lowdin(rows()).basis[:, order], atol=1e-6, rtol=0)


def test_near_dependent_rows_are_refused_by_name():
    twin = torch.cat([rows(), 3.0 * rows()[1:2] + 1e-6 * rows(1, seed=9)])
    with pytest.raises(FeatclError, match="near-dependent directions feature 77"):
        lowdin(twin, names=[*range(5), "feature 77"])
    assert independent_rows(twin) == [0, 1, 2, 3, 4]
    assert Subspace.from_vectors(twin, near_dependent="drop").k == 5
    assert len(independent_rows(twin, tolerance=1e-9)) == 6


def test_short_rows_are_not_mistaken_for_dependent_ones():
    scaled = rows() * torch.tensor([1e-6, 1.0, 1e3, 1.0, 1.0])[:, None]
    assert Subspace.from_vectors(scaled).k == 5


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (torch.zeros(0, 8), "k >= 1"),
        (torch.ones(8), "k >= 1"),
        (torch.eye(8).repeat(2, 1), "k must be at most d_model"),
        (torch.zeros(2, 8), "zero vector"),
        (torch.full((1, 8), float("nan")), "NaN"),
    ],
)
def test_bad_rows_are_one_clear_error(vectors, says):
    with pytest.raises(FeatclError, match=says):
        Subspace.from_vectors(vectors)


def test_project_and_reject_split_every_vector():
    space, x = Subspace.from_vectors(rows()), rows(40, seed=3)
    inside, outside = space.project(x), space.reject(x)
    torch.testing.assert_close(inside + outside, x, atol=1e-6, rtol=0)
    torch.testing.assert_close(space.project(inside), inside, atol=1e-6, rtol=0)
    assert float(space.project(outside).norm() / x.norm()) < 1e-6
    assert float(space.reject(rows()).norm()) < 1e-5
    assert float(outside.norm() / x.norm()) > 0.5  # the control: random vectors do lie outside


def test_low_precision_inputs_keep_their_dtype():
    x = rows(3).to(torch.bfloat16)
    assert Subspace.from_vectors(rows()).project(x).dtype == torch.bfloat16


def test_overlap_is_the_cosines_of_the_principal_angles():
    eye = torch.eye(6)
    angle = torch.tensor(0.3)
    turned = torch.stack([eye[0], angle.cos() * eye[1] + angle.sin() * eye[4]])
    cosines = Subspace.from_vectors(eye[:2]).overlap(Subspace.from_vectors(turned))
    torch.testing.assert_close(cosines, torch.stack([torch.tensor(1.0), angle.cos()]))
    assert float(Subspace.from_vectors(eye[:2]).overlap(Subspace.from_vectors(eye[2:])).max()) == 0.0


def test_protect_keeps_the_part_inside_that_is_orthogonal():
    space = Subspace.from_vectors(rows())
    protected = Subspace.from_vectors(torch.cat([rows()[:1] + rows()[1:2], rows(1, seed=4)]))
    free = space.protect(protected)
    assert free.k == 3
    assert float(free.overlap(protected).max()) < 1e-6
    assert float(free.overlap(space).min()) > 1 - 1e-6
    with pytest.raises(FeatclError, match="nothing is left"):
        space.protect(space)


def test_rotate_carries_coordinates_over_exactly_where_the_new_span_holds_them():
    space, c = Subspace.from_vectors(rows()), rows(5, 7, seed=2)
    wider = Subspace.from_vectors(torch.cat([rows(2, seed=6), rows()]))
    torch.testing.assert_close(wider.basis @ space.rotate(c, wider), space.basis @ c, atol=1e-5, rtol=0)


def test_random_repeats_and_pca_finds_the_planted_directions():
    assert Subspace.random(16, 4, seed=1).digest == Subspace.random(16, 4, seed=1).digest
    assert Subspace.random(16, 4, seed=1).digest != Subspace.random(16, 4, seed=2).digest
    planted = Subspace.random(16, 3, seed=7)
    scales = torch.tensor([5.0, 3.0, 2.0])
    x = (rows(400, 3) * scales) @ planted.basis.T + 0.01 * rows(400, 16, seed=8) + 100.0
    found = Subspace.pca(x, 3)
    assert float(found.overlap(planted).min()) > 0.999
    with pytest.raises(FeatclError, match="fewer than k"):
        Subspace.pca(torch.ones(10, 16), 2)


def test_save_and_load_are_bit_equal(tmp_path):
    space = Subspace.from_vectors(rows())
    space.save(tmp_path / "space.safetensors")
    assert torch.equal(Subspace.load(tmp_path / "space.safetensors").basis, space.basis)
    (tmp_path / "broken").write_bytes(b"no tensors")
    for missing in ("broken", "nothing"):
        with pytest.raises(FeatclError, match="not a saved subspace"):
            Subspace.load(tmp_path / missing)


def test_a_basis_must_be_orthonormal_and_widths_must_agree():
    with pytest.raises(FeatclError, match="not orthonormal"):
        Subspace(rows().T)
    with pytest.raises(FeatclError, match="width 7 in a space of width 24"):
        Subspace.from_vectors(rows()).project(torch.ones(2, 7))
    with pytest.raises(FeatclError, match="different widths"):
        Subspace.random(8, 2).overlap(Subspace.random(9, 2))


def test_intersect_is_what_both_hold():
    shared = rows(2, seed=11)
    one = Subspace.from_vectors(torch.cat([shared, rows(3, seed=12)]))
    other = Subspace.from_vectors(torch.cat([rows(4, seed=13), shared @ torch.eye(24)]))
    both = one.intersect(other)
    assert both.k == 2
    assert float(both.reject(shared).norm() / shared.norm()) < 1e-5
    torch.testing.assert_close(both.overlap(other.intersect(one)), torch.ones(2), atol=1e-6, rtol=0)
    assert one.intersect(one).k == one.k
    nearly = Subspace.from_vectors(shared + 1e-3 * rows(2, seed=14))
    with pytest.raises(FeatclError, match="intersection is empty"):
        one.intersect(nearly)  # the control: an angle of 1e-3, whose cosine differs from 1 by less than 1e-6
    assert one.intersect(nearly, tolerance=1e-2).k == 2
    with pytest.raises(FeatclError, match="different widths"):
        one.intersect(Subspace.random(9, 2))
