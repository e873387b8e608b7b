"""An orthonormal basis of the span of some directions: project, reject, rotate, overlap, and control spans.

Axis names: `k` is the dimension of the subspace, `d_model` the width of the residual stream. Directions are rows
`D [k, d_model]`; a basis holds columns `Q [d_model, k]`. Everything is computed in float64 and kept in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from featcl import files
from featcl.errors import FeatclError

DEPENDENCE_TOLERANCE = 1e-4
"""A unit row whose part outside the span of the others is shorter than this is called near-dependent."""

NULL_TOLERANCE = 5e-7
"""Cosine to a protected direction below which a direction counts as orthogonal to it (float32 inputs)."""

SHARED_TOLERANCE = 1e-5
"""Sine of an angle below which a direction counts as lying in another subspace too (float32 bases)."""


class Lowdin(NamedTuple):
    """Symmetric orthogonalisation of rows D: `basis = Dᵀ @ mixing`, `mixing = (D Dᵀ)^(-1/2)`."""

    basis: Float[Tensor, "d_model k"]
    mixing: Float[Tensor, "k k"]


def lowdin(
    vectors: Float[Tensor, "k d_model"], *, names: Sequence[object] | None = None, dtype: torch.dtype = torch.float32
) -> Lowdin:
    """The orthonormal basis nearest to the given rows, one column per row.

    Q = Dᵀ M, M = (D Dᵀ)^(-1/2). With the thin SVD D = U S Vᵀ: Q = V Uᵀ and M = U S⁻¹ Uᵀ.

    Args:
        vectors: Rows D, any length above zero, any float dtype.
        names: What to call the rows in an error; their positions by default.
        dtype: Of the result; the computation is float64.

    Returns:
        `basis [d_model, k]` with orthonormal columns, and `mixing [k, k]`.

    Raises:
        FeatclError: If there are no rows, more rows than dimensions, a non-finite or zero row, or near-dependent rows.

    Source: Löwdin 1950, J. Chem. Phys. 18, 365; nearest in Frobenius norm: Carlson & Keller 1957.
    """
    names = _names(vectors, names)
    if len(kept := independent_rows(vectors, names=names)) < len(names):
        lost = [names[row] for row in range(len(names)) if row not in set(kept)]
        raise FeatclError(
            f"near-dependent directions {_listed(lost)}: each lies in the span of the others to within "
            f"{DEPENDENCE_TOLERANCE:g}; leave them out, or ask for them to be dropped"
        )
    u, s, vt = torch.linalg.svd(vectors.detach().double(), full_matrices=False)
    return Lowdin((u @ vt).T.contiguous().to(dtype), ((u / s) @ u.T).to(dtype))


def independent_rows(
    vectors: Float[Tensor, "k d_model"],
    *,
    names: Sequence[object] | None = None,
    tolerance: float = DEPENDENCE_TOLERANCE,
) -> list[int]:
    """Positions of the rows to keep so that none is near-dependent, in ascending order.

    Pivoted Gram-Schmidt on the unit-normalised rows: the row with the longest remainder goes next (of nearly equal
    ones the first, so that of two twins the earlier stays); when none reaches `tolerance`, the rest are dependent.

    Args:
        vectors: Rows, any length above zero.
        names: What to call the rows in an error; their positions by default.
        tolerance: Shortest remainder of a unit row that counts as new.

    Returns:
        The kept positions; all of them where the rows are well independent.

    Raises:
        FeatclError: If there are no rows, more rows than dimensions, or a non-finite or zero row.
    """
    names = _names(vectors, names)
    rows = vectors.detach().double()
    lengths = rows.norm(dim=1)
    if bool((lengths == 0).any()):
        raise FeatclError(f"direction {names[int(lengths.argmin())]} is the zero vector: a direction needs a length")
    rest = rows / lengths[:, None]
    kept: list[int] = []
    for _ in range(len(names)):
        remainder = rest.norm(dim=1)
        remainder[kept] = 0.0
        longest = remainder.max()
        if longest < tolerance:
            break
        pivot = int((remainder >= 0.999 * longest).int().argmax())
        kept.append(pivot)
        unit = rest[pivot] / remainder[pivot]
        rest = rest - torch.outer(rest @ unit, unit)
        rest = rest - torch.outer(rest @ unit, unit)  # twice is enough: Giraud et al. 2005
    return sorted(kept)


def null_coordinates(basis: Float[Tensor, "d_model k"], protected: Float[Tensor, "d_model m"]) -> Tensor:
    """Orthonormal V [k, k'] such that `basis @ V` spans the part of span(basis) orthogonal to span(protected).

    V = null(NᵀQ), the right singular vectors whose singular value (a cosine) is below `NULL_TOLERANCE`; k' may be 0.
    """
    _, cosines, vt = torch.linalg.svd(protected.double().T @ basis.double(), full_matrices=True)
    padded = torch.zeros(basis.shape[1], dtype=torch.float64, device=basis.device)
    padded[: cosines.shape[0]] = cosines
    return vt[padded < NULL_TOLERANCE].T.contiguous()


@dataclass(frozen=True, eq=False)
class Subspace:
    """A linear subspace of the residual stream, held as an orthonormal float32 basis.

    Attributes:
        basis: Columns span the subspace; `basis.T @ basis = I`.
    """

    basis: Float[Tensor, "d_model k"]

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or not 1 <= self.basis.shape[1] <= self.basis.shape[0]:
            raise FeatclError(f"a basis is [d_model, k] with 1 <= k <= d_model, not {list(self.basis.shape)}")
        basis = self.basis.detach().double()
        error = (basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)).abs().max()
        if not error < 1e-5:
            raise FeatclError(f"the basis is not orthonormal (off by {error:.1e}): use Subspace.from_vectors")
        object.__setattr__(self, "basis", basis.float().contiguous())

    @classmethod
    def from_vectors(
        cls,
        vectors: Float[Tensor, "k d_model"],
        *,
        names: Sequence[object] | None = None,
        near_dependent: Literal["refuse", "drop"] = "refuse",
    ) -> Subspace:
        """The span of the given rows, with the Löwdin basis: column i is the one nearest to row i.

        Args:
            vectors: Rows, any length above zero.
            names: What to call the rows in an error; their positions by default.
            near_dependent: `refuse` raises and names such rows, `drop` leaves them out.

        Raises:
            FeatclError: As `lowdin`.
        """
        names = _names(vectors, names)
        if near_dependent == "drop":
            kept = independent_rows(vectors, names=names)
            vectors, names = vectors[kept], [names[row] for row in kept]
        return cls(lowdin(vectors, names=names).basis)

    @classmethod
    def random(cls, d_model: int, k: int, seed: int = 0) -> Subspace:
        """A uniformly random subspace, the same for the same seed on every machine."""
        if not 1 <= k <= d_model:
            raise FeatclError(f"a random subspace needs 1 <= k <= d_model = {d_model}, not k = {k}")
        generator = torch.Generator().manual_seed(seed)
        return cls(lowdin(torch.randn(k, d_model, generator=generator, dtype=torch.float64)).basis)

    @classmethod
    def pca(cls, x: Float[Tensor, "*batch d_model"], k: int) -> Subspace:
        """The top `k` principal directions of `x` (its mean removed), largest first; the largest entry is positive.

        Raises:
            FeatclError: If `x` varies in fewer than `k` dimensions.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        if not 1 <= k <= min(rows.shape):
            raise FeatclError(f"pca of {list(rows.shape)} values has no {k} directions")
        _, scales, vt = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        if scales[k - 1] <= 1e-10 * scales[0] or scales[0] == 0:
            raise FeatclError(f"pca: the data vary in fewer than k = {k} dimensions")
        top = vt[:k]
        signs = top.gather(1, top.abs().argmax(1, keepdim=True)).sign()
        return cls((top * signs).T.float())

    @property
    def k(self) -> int:
        """Dimension of the subspace."""
        return self.basis.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the space that it lies in."""
        return self.basis.shape[0]

    def project(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Q Qᵀ x: the part of `x` inside, in the dtype of `x` (products in at least float32)."""
        basis = self._basis_like(x)
        return ((x.to(basis.dtype) @ basis) @ basis.T).to(x.dtype)

    def reject(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x - Q Qᵀ x: the part of `x` outside, in the dtype of `x`."""
        basis = self._basis_like(x)
        wide = x.to(basis.dtype)
        return (wide - (wide @ basis) @ basis.T).to(x.dtype)

    def overlap(self, other: Subspace) -> Float[Tensor, " k_min"]:
        """Cosines of the principal angles to `other`, largest first: 1 where a direction is shared, 0 where none is.

        Source: Björck & Golub 1973, Math. Comp. 27, 579.
        """
        self._check_width(other)
        product = self.basis.double().T @ other.basis.double().to(self.basis.device)
        return torch.linalg.svdvals(product).clamp(0.0, 1.0).float()

    def rotate(self, coordinates: Float[Tensor, "k n"], onto: Subspace) -> Float[Tensor, "k_new n"]:
        """Coordinates in `onto` of what `coordinates` describe here: C' = Q'ᵀ Q C; what `onto` cannot hold is lost."""
        self._check_width(onto)
        return ((onto.basis.double().T @ self.basis.double()) @ coordinates.double()).to(coordinates.dtype)

    def protect(self, protected: Subspace) -> Subspace:
        """The part of this subspace that is orthogonal to `protected`: basis Q·null(NᵀQ).

        Raises:
            FeatclError: If nothing is left.
        """
        self._check_width(protected)
        free = null_coordinates(self.basis, protected.basis)
        if free.shape[1] == 0:
            raise FeatclError(f"nothing is left of {self.k} directions after protecting {protected.k}")
        return Subspace((self.basis.double() @ free).float())

    def intersect(self, other: Subspace, *, tolerance: float = SHARED_TOLERANCE) -> Subspace:
        """The directions that both hold: basis Q·null((I - Q'Q'ᵀ) Q).

        The singular values of (I - Q'Q'ᵀ) Q are the sines of the principal angles, which tell small angles apart where
        cosines cannot.

        Args:
            other: Of the same width.
            tolerance: Largest sine of an angle that counts as none.

        Raises:
            FeatclError: If they share no direction.
        """
        self._check_width(other)
        basis, onto = self.basis.double(), other.basis.double().to(self.basis.device)
        _, sines, vt = torch.linalg.svd(basis - onto @ (onto.T @ basis), full_matrices=False)
        shared = vt[sines <= tolerance]
        if len(shared) == 0:
            raise FeatclError(
                f"the intersection is empty: subspaces of {self.k} and {other.k} directions share none "
                f"(smallest angle {float(sines.min().clamp(max=1.0).asin()):.2g})"
            )
        return Subspace((basis @ shared.T).float())

    @property
    def digest(self) -> str:
        """SHA-256 of shape and content."""
        data = self.basis.cpu().numpy().tobytes()
        return files.digest_bytes(f"{list(self.basis.shape)}".encode() + data)

    def save(self, path: str | Path) -> None:
        """Write the basis as one safetensors file."""
        from safetensors.torch import save

        files.write_bytes(path, save({"basis": self.basis.cpu()}))

    @classmethod
    def load(cls, path: str | Path) -> Subspace:
        """Read what `save` wrote; bit-equal.

        Raises:
            FeatclError: If the file is missing or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls(load_file(Path(path))["basis"])
        except (OSError, SafetensorError, KeyError) as error:
            raise FeatclError(f"{path} is not a saved subspace: {error}") from error

    def __repr__(self) -> str:
        return f"Subspace(k={self.k}, d_model={self.d_model}, digest={self.digest[:8]})"

    def _basis_like(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise FeatclError(f"vectors of width {x.shape[-1]} in a space of width {self.d_model}")
        return self.basis.to(x.device, torch.promote_types(x.dtype, torch.float32))

    def _check_width(self, other: Subspace) -> None:
        if other.d_model != self.d_model:
            raise FeatclError(f"subspaces of different widths: {self.d_model} and {other.d_model}")


def _names(vectors: Tensor, names: Sequence[object] | None) -> list[object]:
    if vectors.ndim != 2 or vectors.shape[0] == 0:
        raise FeatclError(f"directions must be rows [k, d_model] with k >= 1, not {list(vectors.shape)}")
    k, d_model = vectors.shape
    if k > d_model:
        raise FeatclError(f"{k} directions do not fit into d_model = {d_model} dimensions: k must be at most d_model")
    named: list[object] = [*(range(k) if names is None else names)]
    if len(named) != k:
        raise FeatclError(f"{len(named)} names for {k} directions")
    finite = torch.isfinite(vectors).all(dim=1)
    if not bool(finite.all()):
        raise FeatclError(f"direction {named[int((~finite).int().argmax())]} holds NaN or infinity")
    return named


def _listed(names: Sequence[object], limit: int = 8) -> str:
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
