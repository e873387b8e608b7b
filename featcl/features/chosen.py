"""Chosen features as directions of the residual stream, and which of them are independent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from featcl.features import hooks
from featcl.features.directions import Directions
from featcl.features.encoder import FeatureEncoder

NEW_DIRECTION = 0.05
"""A unit row whose part outside the span of the rows chosen before it is shorter than this adds no direction."""


def directions_of(
    sae: Any, model: Any, feature_ids: Sequence[int], *, selector: str, manifest: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> Directions:  # fmt: skip
    """Some features as directions of the residual stream.

    At a residual-stream hook: decoder rows, encoder columns and the restricted encoder. At `mlp_out` and `hook_z` the
    decoder rows are brought to the residual stream (`hooks.to_residual`); what the encoder reads is not in it, so there
    are neither readers nor an encoder.

    Args:
        sae: A `sae_lens.SAE`.
        model: The causal LM it belongs to.
        feature_ids: SAE indices, distinct.
        selector: What to record as the way they were chosen.
        manifest: Further provenance.
        names: What people call them.
    """
    hook, ids = hooks.resolve(model, sae), list(feature_ids)
    in_stream = hook.site == "resid"
    encoder = FeatureEncoder.from_sae(sae, tuple(ids)) if in_stream else None
    return Directions.from_vectors(
        hooks.to_residual(model, hook, sae.W_dec.detach()[ids]).cpu(),
        readers=sae.W_enc.detach()[:, ids].T.cpu() if in_stream else None,
        layer=hook.layer,
        feature_ids=ids,
        hook_name=hook.hook_name,
        selector=selector,
        encoder=None if encoder is None else encoder.to("cpu"),
        names=None if names is None else tuple(names),
        manifest=dict(manifest),
    )


def sae_source(sae: Any) -> dict[str, Any]:
    """Which SAE it is: its source, and its revision and Neuronpedia id where they are known."""
    metadata = sae.cfg.metadata
    known = {name: metadata[name] for name in ("revision", "neuronpedia_id") if metadata[name] is not None}
    return {"sae": metadata["source"], **known}


def independent_features(
    sae: Any, order: Int[Tensor, " candidates"], k: int, *, model: Any = None
) -> tuple[list[int], list[int]]:
    """The first k features of `order` whose decoder rows, and whose encoder columns, are independent.

    Args:
        sae: The SAE.
        order: Candidates.
        k: How many.
        model: Where the SAE does not live in the residual stream, the rows count as they are in it.

    Returns:
        The chosen ids, and the ids passed over on the way.
    """
    hook = None if model is None else hooks.resolve(model, sae)
    bases: list[list[Tensor]] = [[], []]
    chosen: list[int] = []
    passed_over: list[int] = []
    for block in order.split(4 * k):
        for feature, *sides in zip(block.tolist(), *_sides(sae, block, model, hook), strict=True):
            if len(chosen) == k:
                return chosen, passed_over
            rests = [_outside(row, basis) for row, basis in zip(sides, bases, strict=False)]
            if any(rest is None for rest in rests):
                passed_over.append(feature)
                continue
            chosen.append(feature)
            for basis, rest in zip(bases, rests, strict=False):
                basis.append(rest)  # type: ignore[arg-type]
    return chosen, passed_over


def _sides(sae: Any, features: Tensor, model: Any, hook: hooks.Hook | None) -> list[Tensor]:
    """Rows that have to be independent: decoder rows as in the stream, and encoder columns where they read it."""
    rows, columns = (
        sae.W_dec.detach()[features.to(sae.W_dec.device)],
        sae.W_enc.detach()[:, features.to(sae.W_enc.device)],
    )
    if hook is not None and hook.site != "resid":
        return [hooks.to_residual(model, hook, rows).double().cpu()]
    return [rows.double().cpu(), columns.T.double().cpu()]


def _outside(row: Tensor, basis: list[Tensor]) -> Tensor | None:
    """The unit vector of what `row` adds to an orthonormal basis, or None where that is next to nothing."""
    length = row.norm()
    if not length > 1e-8:
        return None
    rest = row / length
    if basis:
        columns = torch.stack(basis, dim=1)
        for _ in range(2):  # twice is enough: Giraud et al. 2005
            rest = rest - columns @ (columns.T @ rest)
    return rest / rest.norm() if rest.norm() > NEW_DIRECTION else None
