"""Learning without forgetting: on the new task's tokens, answer as the model did when the task began.

    logits      T² KL(p_old ‖ p) per target token, with p ∝ exp(logits / T)
    features    ½ ‖h - h_old‖² / d_model per target token, with h the last hidden state

The paper's cross-entropy differs from the KL by a constant, but is not 0 where nothing has changed. Its temperature is
2; T² keeps the size of the gradient (Hinton et al. 2015, section 2.1), so that the strength means the same at every T.
The old model is the adapter with the coordinates that it had; in the first task that is the base model.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.checks import choice, positive
from featcl.methods.method import Cost, Method, View
from featcl.methods.quadratic import nbytes
from featcl.objectives.build import Term
from featcl.objectives.divergence import chunk_limit, token_divergence
from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import Scorer, TokenBatch, sum_in_chunks
from featcl.objectives.teachers import Teacher, borrowed


class LwF(Method):
    """Distils the model of the task's beginning into the learning one, on the tokens that are learned from.

    Args:
        strength: λ_o.
        match: `logits` or `features`.
        temperature: T, for logits.

    Raises:
        FeatclError: If an argument is out of range.

    Source: Li & Hoiem 2016, arXiv:1606.09282, eqs. 2 and 3; features: Jung et al. 2016, arXiv:1607.00122, eq. 3.
    """

    name = "lwf"

    def __init__(self, *, strength: float = 1.0, match: str = "logits", temperature: float = 2.0) -> None:
        positive(self.name, strength=strength, temperature=temperature)
        choice(self.name, ("logits", "features"), match=match)
        self._kept = Kept(match, temperature)
        self._term = Term(self.name, strength, self._kept)

    def terms(self) -> Sequence[Term]:
        """The distillation."""
        return (self._term,)

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """The model of now is the old one from here on."""
        self._kept.hold_(view.student.adapter.coordinates(), changes=view.student.adapter.changes)

    def cost(self) -> Cost:
        """The coordinates of the old model, which reads everything that is learned from once more."""
        return Cost(nbytes(self._kept.coordinates), self._kept.tokens)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"tokens": self._kept.tokens, "changes": self._kept.changes}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._kept.tokens, self._kept.changes = int(state["tokens"]), int(state["changes"])

    def tensors(self) -> dict[str, Tensor]:
        """Coordinates of the old model."""
        return dict(self._kept.coordinates)

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self._kept.hold_(tensors, changes=self._kept.changes)


class Kept:
    """An `Objective`: distance from what the old model says on the experience's own tokens.

    Attributes:
        coordinates: Of the old model.
        changes: How often the adapter's directions had been changed then.
        tokens: Tokens that the old model has read.
    """

    def __init__(self, match: str, temperature: float) -> None:
        self.match, self.temperature = match, temperature
        self.metric = f"lwf/{match}"
        self.coordinates: Mapping[str, Tensor] = {}
        self.changes = self.tokens = 0
        self._seen: weakref.WeakKeyDictionary[TokenBatch, Tensor] = weakref.WeakKeyDictionary()

    def hold_(self, coordinates: Mapping[str, Tensor], *, changes: int) -> None:
        """Another old model."""
        self.coordinates, self.changes = dict(coordinates), changes
        self._seen.clear()

    def read(self, experience: Experience, student: Student) -> Sequence[TokenBatch]:
        """The experience's own windows; the old model reads them now, before the student's graph is there.

        Raises:
            FeatclError: If there are none, no task has begun, or the directions were changed since.
        """
        if not experience.batches:
            raise FeatclError(f"lwf: trajectory {experience.trajectory.id!r} has no targets on which to stay the same")
        if not self.coordinates or self.changes != student.adapter.changes:
            why = "no task has begun" if not self.coordinates else "the directions were changed within the task"
            raise FeatclError(f"lwf: there is no old model to learn from: {why}")
        old = Teacher(student.scorer, partial(borrowed, student.adapter, self.coordinates))
        for batch in experience.batches:
            if batch not in self._seen:
                self._seen[batch] = old.hidden(batch)
                self.tokens += batch.input_ids.numel()
        return experience.batches

    def loss(self, hidden: Float[Tensor, "targets d_model"], batch: TokenBatch, student: Student) -> Float[Tensor, ""]:
        """Sum over the batch's targets."""
        old = self._seen[batch]
        if self.match == "features":
            return 0.5 * (hidden.float() - old.float()).square().mean(-1).sum()
        return softened_kl(hidden, old, student.scorer, temperature=self.temperature)


def softened_kl(
    hidden: Float[Tensor, "targets d_model"],
    old: Float[Tensor, "targets d_model"],
    scorer: Scorer,
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """T² Σ KL(softmax(old logits / T) ‖ softmax(logits / T)) over targets, chunk by chunk."""

    def total(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = scorer.head(other).float() / temperature
        return token_divergence(scorer.head(own).float() / temperature, fixed, alpha=0.0).sum()

    kl = sum_in_chunks(total, hidden, old, width=scorer.logit_width, limit=chunk_limit(0.0))
    return temperature**2 * kl
