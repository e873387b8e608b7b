"""Features whose explanation fits a query; explanations are read from files, never fetched here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.features.explanations import explanation_files, neuronpedia_id, read_explanations, relevance
from featcl.features.selectors.base import Ranking


def explanations(
    sae: Any, model: Any, tokenizer: Any, *, query: str, explanations: str | Path | None = None
) -> Ranking:
    """By the relevance (BM25) of the explanation to the query; features with no word of it are left out.

    Args:
        sae: The SAE; its Neuronpedia id says which explanations are its own.
        model: Not used.
        tokenizer: Not used.
        query: Words, or several queries joined by `|`: a feature counts with the one it fits best.
        explanations: A file or folder of exported explanations; None is the cache (`explanations.cache_folder`).

    Raises:
        FeatclError: If there are no explanations of this SAE, or none fits.
    """
    source = neuronpedia_id(sae)
    files = explanation_files(explanations, source)
    found = read_explanations(files, source, d_sae=sae.cfg.d_sae)
    scores = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    best: dict[int, str] = {}
    for entry, score in zip(found, relevance(query, [entry.description for entry in found]), strict=True):
        if score > scores[entry.index]:
            scores[entry.index], best[entry.index] = score, entry.description
    if not best:
        raise FeatclError(f"no explanation in {files[0].parent} ({len(found)} read) has a word of the query {query!r}")
    order = scores.argsort(descending=True, stable=True)
    facts = {"query": query, "explained": len({entry.index for entry in found})}
    return Ranking(order[scores[order] > 0], {"relevance": scores}, names=best, facts=facts)
