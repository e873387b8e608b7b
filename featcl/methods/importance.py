"""Importance: a record stays the more likely, the more the learner has left to learn from it.

    key = ln(u) / w        the n largest keys stay (the same order as u^(1/w)); u uniform on (0, 1)

which draws records one after the other without replacement, each time with probability w / Σ w of those left. The
weight w is the loss or the norm of its gradient, right after the record was learned from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.buffer import Entry, Look
from featcl.methods.method import View
from featcl.methods.reservoir import smallest_key, uniform
from featcl.methods.tokens import tokens_read
from featcl.objectives.experience import Experience

SCORES = ("loss", "gradient_norm")
SMALLEST = 1e-12  # of a weight: what is known perfectly is still kept where there is room


class Importance:
    """Keeps records with probabilities in proportion to their scores.

    Args:
        score: `loss`: mean of the learner's objectives over tokens; `gradient_norm`: norm of their mean gradient.
        power: w = score^power; 0 is the reservoir.

    Raises:
        FeatclError: For another score, or a negative power.

    Source: Efraimidis and Spirakis 2006, Information Processing Letters 97, algorithm A-Res; importance by loss or
    gradient norm, Katharopoulos and Fleuret 2018, arXiv:1803.00942, section 3.
    """

    name = "importance"

    def __init__(self, *, score: str = "loss", power: float = 1.0) -> None:
        checks.choice(self.name, SCORES, score=score)
        if not (math.isfinite(power) and power >= 0):
            raise FeatclError(f"importance: power must be a finite number, at least 0, got {power!r}")
        self.score, self.power = score, power

    def look_(self, experience: Experience, view: View, generator: torch.Generator) -> Look:
        """Score the experience and draw its key; its own tokens stand for those that an objective samples."""
        read = tokens_read(experience.batches)
        if self.score == "loss":
            score, backward = mean_loss(experience, view), 0
        else:
            score, backward = gradient_norm(experience, view), read
        if not math.isfinite(score):
            raise FeatclError(f"importance: the {self.score} of {experience.trajectory.id!r} is {score}")
        weight = max(max(score, 0.0) ** self.power, SMALLEST)
        return Look({"key": math.log(uniform(generator)) / weight, "score": score}, None, read, backward)

    def victim_(self, entries: Sequence[Entry], generator: torch.Generator) -> int:
        """The smallest key."""
        return smallest_key(entries)

    def state(self) -> dict[str, Any]:
        """Nothing: the keys are the entries'."""
        return {}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""


@torch.no_grad()
def mean_loss(experience: Experience, view: View) -> float:
    """Σ weight · mean over tokens of the learner's objectives on an experience, penalties left out."""
    total = 0.0
    for term in view.terms:
        if not term.on_tokens:
            continue
        batches = list(term.objective.read(experience, view.student))
        count = sum(batch.tokens for batch in batches)
        for batch in batches:
            hidden = view.student.scorer.hidden(batch)
            total += term.weight * float(term.objective.loss(hidden, batch, view.student)) / count
    return total


def gradient_norm(experience: Experience, view: View) -> float:
    """Euclidean norm of the gradient of the learner's objectives in coordinates."""
    return sum(float(part.double().square().sum()) for part in view.gradient(experience).values()) ** 0.5
