"""Diversity: the buffer covers what was seen, as measured by the base model's activations.

Of n + 1 points with n to keep, one of the closest pair goes, which is the exact solution of

    min over kept sets S of  max over points x of  min over s in S of  ‖x − s‖

for that step (the radius is then the smallest distance; any other choice leaves a larger one). Of the two goes the one
whose next neighbour is nearer, and of equals the newer. Over a whole stream such steps are greedy, without guarantee.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.buffer import Entry, Look
from featcl.methods.embeddings import mean_activation
from featcl.methods.method import View
from featcl.methods.tokens import tokens_read
from featcl.objectives.experience import Experience


class KCentre:
    """Keeps records that lie far from each other; O(n² d_model) per record.

    A point is the mean of the base model's last hidden states where it predicts the record's targets: the base does
    not move, so that points of different times compare.

    Source: Sener and Savarese 2018, arXiv:1708.00489 (k-centre on activations), here one point at a time.
    """

    name = "k_centre"

    def look_(self, experience: Experience, view: View, generator: torch.Generator) -> Look:
        """Where the experience lies."""
        if not experience.batches:
            raise FeatclError(f"k_centre: {experience.trajectory.id!r} has no tokens of its own that could be placed")
        vector = mean_activation(experience.batches, view.student)
        return Look({}, vector, tokens_read(experience.batches))

    def victim_(self, entries: Sequence[Entry], generator: torch.Generator) -> int:
        """One of the closest pair."""
        return one_of_closest(torch.stack([entry.look.vector for entry in entries]))  # type: ignore[misc]

    def state(self) -> dict[str, Any]:
        """Nothing: the points are the entries'."""
        return {}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""


def one_of_closest(points: Float[Tensor, "n d_model"]) -> int:
    """The point without which the others cover all best; see the head of this module."""
    if len(points) == 1:
        return 0
    distances = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    first, second = sorted(divmod(int(distances.argmin()), len(points)))
    next_nearest = distances[[first, second]].sort(dim=1).values[:, 1:2].flatten().tolist()
    if len(points) > 2 and next_nearest[0] < next_nearest[1]:
        return first
    return second
