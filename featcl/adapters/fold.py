"""From chosen directions to the frozen basis of one linear: protect, then fold the norm's gain, then orthogonalise.

A writer's output passes a norm with gain g before it reaches the residual stream: for columns of ΔW in span(D ⊘ g),
what is written, g ⊙ ΔW a / rms, lies in span(D). A reader sees g ⊙ h / rms: rows in span(E ⊘ g) react to E h alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.models import Site
from featcl.subspace import Lowdin, lowdin, null_coordinates

GAIN_FLOOR = 0.01
"""A gain smaller than this share of the norm's median cannot be inverted: it is clamped there, its sign kept."""


@dataclass(frozen=True, eq=False)
class Fold:
    """The frozen basis of a linear layer, and the span that it stands for.

    Attributes:
        vectors: Rows D (writers) or E (readers), in residual-stream coordinates, float64.
        basis: Orthonormal columns Q in the linear's own coordinates, float64; fewer than k after protecting.
        gain: What stands between the linear and the stream, float64, or None.
        centered: Whether the mean is subtracted between the two.
        clamped: Coordinates whose gain could not be inverted; the theorem does not hold there.
    """

    vectors: Float[Tensor, "k d_model"]
    basis: Float[Tensor, "d_model k_free"]
    gain: Float[Tensor, " d_model"] | None
    centered: bool
    clamped: tuple[int, ...] = ()

    @cached_property
    def span(self) -> Lowdin:
        """Orthonormal basis of span(D) in residual-stream coordinates, and M = (D Dᵀ)^(-1/2)."""
        return lowdin(self.vectors, dtype=torch.float64)

    def to_stream(self, columns: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model n"]:
        """Columns in the linear's coordinates as the stream sees them: g ⊙ x, mean removed where the norm does."""
        columns = columns.double()
        columns = columns if self.gain is None else self.gain[:, None] * columns
        return columns - columns.mean(0) if self.centered else columns

    def in_features(self, columns: Float[Tensor, "d_model n"]) -> Float[Tensor, "k n"]:
        """Coefficients X on the features, D'ᵀ X = columns: X = (D Dᵀ)^(-1) D (g ⊙ columns) = M Q_Dᵀ (g ⊙ columns)."""
        return self.span.mixing @ (self.span.basis.T @ self.to_stream(columns))


def fold(
    vectors: Float[Tensor, "k d_model"],
    site: Site,
    *,
    protected: Float[Tensor, "d_model m"] | None = None,
    fold_norms: bool = True,
    names: Sequence[object] | None = None,
) -> Fold:
    """The basis of `site` for the given directions.

    Q = orth((Qd V) ⊘ g), Qd = orth(D), V = null(Nᵀ Qd): the part of span(D) orthogonal to N, then the gain. On OLMo-1
    the ones vector belongs to N, since its norm removes it from what a reader sees.

    Args:
        vectors: Directions in residual-stream coordinates.
        site: The linear, with the gain between it and the stream.
        protected: Orthonormal columns N that must stay untouched.
        fold_norms: False leaves gain and mean out of the basis: the control that shows what folding is for.
        names: What to call the directions in an error.

    Raises:
        FeatclError: If nothing is left after protecting, or directions are near-dependent once folded.
    """
    vectors = vectors.detach().double()
    free = _free(vectors, site, protected, fold_norms, names)
    gain = None if site.gain is None else site.gain.to(vectors)
    inverted, clamped = (gain, ()) if gain is None or not fold_norms else invertible(gain, site)
    rows = free / inverted if fold_norms and inverted is not None else free
    try:
        basis = lowdin(rows, names=names if len(rows) == len(vectors) else None, dtype=torch.float64).basis
    except FeatclError as error:
        raise FeatclError(f"{site.name}, after folding its norm: {error}") from error
    return Fold(vectors, basis, gain, site.centered, clamped)


def _free(
    vectors: Tensor, site: Site, protected: Tensor | None, fold_norms: bool, names: Sequence[object] | None
) -> Float[Tensor, "k_free d_model"]:
    """Rows that span the part of span(D) orthogonal to the protected directions; D itself where there are none."""
    blocked = [] if protected is None else [protected.double()]
    if site.centered and fold_norms:
        blocked.append(torch.ones(vectors.shape[1], 1, dtype=torch.float64, device=vectors.device))
    if not blocked:
        return vectors
    u, s, _ = torch.linalg.svd(torch.cat(blocked, dim=1), full_matrices=False)
    basis = lowdin(vectors, names=names, dtype=torch.float64).basis
    free = null_coordinates(basis, u[:, s > 1e-9 * s[0]])
    if free.shape[1] == 0:
        raise FeatclError(f"{site.name}: nothing is left of the {len(vectors)} directions after protecting")
    return (basis @ free).T


def invertible(gain: Float[Tensor, " d_model"], site: Site) -> tuple[Float[Tensor, " d_model"], tuple[int, ...]]:
    """A norm's gain with what is too near zero clamped, and the clamped coordinates.

    Raises:
        FeatclError: If the gain is not finite, or zero almost everywhere.
    """
    if not bool(torch.isfinite(gain).all()):
        raise FeatclError(f"{site.norm_name}: its gain holds NaN or infinity")
    floor = GAIN_FLOOR * float(gain.abs().median())
    if floor == 0.0:
        raise FeatclError(f"{site.norm_name}: more than half of its gain is zero, so it cannot be folded")
    small = gain.abs() < floor
    signed = torch.where(gain < 0, -floor, floor).to(gain)
    return torch.where(small, signed, gain), tuple(int(i) for i in small.nonzero().flatten())
