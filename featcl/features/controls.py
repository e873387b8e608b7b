"""Control bases: directions of the same k, hook and layer as chosen ones, but not chosen. They are not selectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features import hooks
from featcl.features.activations import layer_activations
from featcl.features.chosen import directions_of, independent_features, sae_source
from featcl.features.directions import Directions
from featcl.features.tokens import Text, token_batches, token_windows
from featcl.models import max_context


def random_directions(directions: Directions, *, seed: int = 0) -> Directions:
    """Independent Gaussian directions in place of the chosen ones; they are read along as they are written.

    Args:
        directions: What they stand in for.
        seed: The same seed gives the same directions.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(directions.k, directions.d_model, generator=generator)
    return _in_place_of(directions, rows, "random", {"seed": seed})


@torch.no_grad()
def pca_directions(
    directions: Directions, model: Any, tokenizer: Any, texts: Iterable[Text], *, max_tokens: int = 100_000
) -> Directions:
    """The top k principal directions of the residual stream at the same hook; streaming covariance, float64.

    Args:
        directions: What they stand in for.
        model: The causal LM.
        tokenizer: Its tokenizer.
        texts: Strings or token ids; about `max_tokens` of them are read, BOS and padding left out.
        max_tokens: Where to stop reading.

    Raises:
        FeatclError: If the texts hold too few tokens for k directions.
    """
    d_model, tokens = directions.d_model, 0
    total, outer = torch.zeros(d_model, dtype=torch.float64), torch.zeros(d_model, d_model, dtype=torch.float64)
    windows = token_windows(tokenizer, texts, context=min(512, max_context(model)))
    for batch in token_batches(windows, tokenizer):
        rows = layer_activations(model, batch.to(model.device), layers=[directions.layer])[:, 0].double().cpu()
        total, outer, tokens = total + rows.sum(dim=0), outer + rows.T @ rows, tokens + len(rows)
        if tokens >= max_tokens:
            break
    if tokens <= directions.k:
        raise FeatclError(f"pca: {tokens} tokens are too few for {directions.k} directions")
    covariance = outer / tokens - torch.outer(total, total) / tokens**2
    _, vectors = torch.linalg.eigh(covariance)
    rows = vectors.T.flip(0)[: directions.k]
    signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    return _in_place_of(directions, rows * signs, "pca", {"tokens": tokens})


def random_features(directions: Directions, sae: Any, model: Any, *, seed: int = 0) -> Directions:
    """As many features of the same SAE, drawn uniformly from those not chosen; with their readers and encoder.

    Args:
        directions: What they stand in for.
        sae: The SAE that they came from.
        model: The causal LM it belongs to.
        seed: The same seed gives the same features.

    Raises:
        FeatclError: If the SAE is of another layer, or has too few other features.
    """
    if (hook := hooks.resolve(model, sae)) != hooks.resolve(model, directions.hook_name):
        raise FeatclError(
            f"random_features: the SAE is of {hook.hook_name} (layer {hook.layer}), "
            f"the directions of {directions.hook_name}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sae.cfg.d_sae, generator=generator)
    of_an_sae = directions.encoder is not None or "sae" in directions.manifest
    chosen = torch.tensor(directions.feature_ids if of_an_sae else [], dtype=torch.long)
    ids, _ = independent_features(sae, order[~torch.isin(order, chosen)], directions.k, model=model)
    if len(ids) < directions.k:
        raise FeatclError(f"random_features: the SAE has {len(ids)} other independent features, not {directions.k}")
    manifest = {"control": "random_features", "seed": seed, "in_place_of": directions.digest, **sae_source(sae)}
    return directions_of(sae, model, ids, selector="random_features", manifest=manifest)


def _in_place_of(directions: Directions, rows: Tensor, control: str, facts: dict[str, Any]) -> Directions:
    return Directions.from_vectors(
        rows,
        layer=directions.layer,
        hook_name=directions.hook_name,
        selector=control,
        manifest={"control": control, "in_place_of": directions.digest, **facts},
    )
