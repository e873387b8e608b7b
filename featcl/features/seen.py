"""Running statistics of features for looking at them: sums, a histogram whose range doubles, the strongest windows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.features.activations import FeatureRows

BINS = 24
"""Bars of an activation histogram."""
SPAN = 24
"""Tokens shown on either side of the strongest one."""


class Seen:
    """Running statistics of k features: sums, a histogram whose range doubles, and the strongest windows."""

    def __init__(self, k: int, contexts: int) -> None:
        self.contexts = contexts
        self.tokens = 0
        self.active = torch.zeros(k, dtype=torch.long)
        self.total = torch.zeros(k, dtype=torch.float64)
        self.counts = torch.zeros(k, BINS, dtype=torch.long)
        self.top = torch.zeros(k)
        self.best: list[list[tuple[float, tuple[int, ...], tuple[Tensor, Tensor, int]]]] = [[] for _ in range(k)]

    def add_(self, rows: FeatureRows) -> None:
        """Count one batch."""
        feature_acts, owner, position = rows.feature_acts.cpu(), rows.owner.cpu(), rows.position.cpu()
        input_ids = rows.batch.input_ids.cpu()
        self.tokens += len(feature_acts)
        self.active += (feature_acts > 0).sum(dim=0)
        self.total += feature_acts.sum(dim=0, dtype=torch.float64)
        self._count_(feature_acts)
        peaks = torch.zeros(len(input_ids), feature_acts.shape[1])
        peaks.scatter_reduce_(0, owner[:, None].expand_as(feature_acts), feature_acts, "amax")
        strongest = peaks.topk(min(self.contexts, len(peaks)), dim=0)
        for row, best in enumerate(self.best):
            for strength, window in zip(
                strongest.values[:, row].tolist(), strongest.indices[:, row].tolist(), strict=True
            ):
                if strength > (best[-1][0] if len(best) == self.contexts else 0.0):
                    mine = owner == window
                    acts = torch.zeros(input_ids.shape[1]).index_copy_(0, position[mine], feature_acts[mine, row])
                    length = int(rows.batch.attention_mask[window].sum())
                    self._keep_(best, strength, input_ids[window, :length], acts[:length])

    def _keep_(self, best: list[Any], strength: float, ids: Tensor, acts: Tensor) -> None:
        peak = int(acts.argmax())
        part = slice(max(0, peak - SPAN), peak + SPAN + 1)
        key = tuple(ids[part].tolist())
        if all(key != other for _, other, _ in best):
            best.append((strength, key, (ids[part], acts[part], peak - part.start)))
            best.sort(key=lambda found: -found[0])
            del best[self.contexts :]

    def _count_(self, feature_acts: Float[Tensor, "tokens k"]) -> None:
        highest = feature_acts.max(dim=0).values
        for row in (highest > self.top).nonzero().flatten().tolist():
            if self.top[row] == 0:
                self.top[row] = highest[row]
            while self.top[row] < highest[row]:  # two bins become one
                self.top[row] *= 2
                halves = self.counts[row].reshape(BINS // 2, 2).sum(dim=1)
                self.counts[row] = torch.cat([halves, torch.zeros_like(halves)])
        bins = (feature_acts / self.top.clamp(min=1e-30) * BINS).long().clamp(max=BINS - 1)
        self.counts.T.scatter_add_(0, bins, (feature_acts > 0).long())
