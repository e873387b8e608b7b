"""From the objectives of a learner to one gradient in coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.learning.trust import Reference
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import TokenBatch


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward and backward pass over everything the objectives read.

    Attributes:
        loss: Σ weight · mean over tokens (or penalty).
        losses: Each objective's mean over tokens, in nats, under its logged name.
        grad_norm: Euclidean norm of the gradient in coordinates.
        tokens: Targets read.
        reference: The model's predictions at this point on the tokens learned from.
        measures: What the objectives' batches say of themselves, under the names that are logged.
    """

    loss: float
    losses: Mapping[str, float]
    grad_norm: float
    tokens: int
    reference: Reference
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Reading:
    """One forward pass, and the objectives that it serves, each with its number of targets over all batches."""

    batch: TokenBatch
    terms: list[tuple[Term, int]]

    def means(self, hidden: Tensor, student: Student) -> list[Tensor]:
        """What this batch adds to each objective's mean over all its tokens."""
        return [term.objective.loss(hidden, self.batch, student) / count for term, count in self.terms]

    def weighted(self, means: Sequence[Tensor], *, trust: Mapping[int, float] | None = None) -> Tensor:
        """Σ trust · weight · mean; the trust by the identity of the term, 1 where it is not named."""
        factors = [(trust or {}).get(id(term), 1.0) * term.weight for term, _ in self.terms]
        return torch.stack([factor * mean for factor, mean in zip(factors, means, strict=True)]).sum()


@torch.enable_grad()
def accumulate_gradient_(
    terms: Sequence[Term],
    experience: Experience,
    student: Student,
    *,
    added: Sequence[Term] = (),
    beside: Sequence[Experience] = (),
) -> Pass:
    """Add the gradient of the loss to the adapter's parameters, batch by batch.

    The loss is Σ weight · mean over tokens: of the objectives on the experience times its own weight, of those that
    read an experience on what is beside it, each with its own weight; and of what methods add, which does not count
    less because the experience at hand is trusted less.

    Args:
        terms: The objectives; those that read the same batches share a forward pass.
        experience: What is learned from.
        student: The learning model.
        added: Terms of methods; what they read of their own is neither counted as tokens nor part of the reference.
        beside: What else is learned from in the same update.
    """
    losses = {term.metric: 0.0 for term in (*terms, *added)}
    measures: dict[str, float] = {}
    found = readings([*terms, *added], experience, student)
    if not found and all(term.on_tokens for term in terms):
        names = ", ".join(term.name for term in terms)
        raise FeatclError(f"trajectory {experience.trajectory.id!r}: nothing to learn from, skipped by {names}")
    trust, foreign = {id(term): experience.weight for term in terms}, {id(term) for term in added}
    loss, passes = _backward_(found, student, trust, losses)
    passes = [pair for pair in passes if any(id(term) not in foreign for term, _ in pair[0].terms)]
    tokens = sum(reading.batch.tokens for reading, _ in passes)
    for term in (*terms, *added):
        if not term.on_tokens:
            value = term.objective.penalty(student)
            (term.weight * value).backward()
            losses[term.metric] += value.item()
            loss += term.weight * value.item()
    outside = student.adapter.penalty()
    if outside is not None:
        outside.backward()
        losses["anchor/outside_span"] = outside.item()
        loss += outside.item()
    if beside:
        more, others = _beside_(terms, beside, student)
        passes, loss = [*passes, *others], loss + more
        measures = {"beside/experiences": float(len(beside)), "beside/loss": more}
    student.adapter.project_gradients_()
    return Pass(
        loss,
        losses,
        _norm(parameter.grad for parameter in student.adapter.parameters()),
        tokens,
        _reference(passes, experience, student),
        {name: value for reading in found for name, value in getattr(reading.batch, "measures", {}).items()} | measures,
    )


def _backward_(
    found: Sequence[Reading], student: Student, trust: Mapping[int, float], losses: dict[str, float]
) -> tuple[float, list[tuple[Reading, Tensor]]]:
    """The gradient of these readings, each term with its trust; Σ weight · mean, and each reading's hidden states."""
    loss, passes = 0.0, []
    for reading in found:
        hidden = student.scorer.hidden(reading.batch)
        passes.append((reading, hidden.detach()))
        means = reading.means(hidden, student)
        reading.weighted(means, trust=trust).backward()
        for (term, _), mean in zip(reading.terms, torch.stack(means).tolist(), strict=True):
            losses[term.metric] = losses.get(term.metric, 0.0) + mean
            loss += term.weight * mean
    return loss, passes


def _beside_(
    terms: Sequence[Term], beside: Sequence[Experience], student: Student
) -> tuple[float, list[tuple[Reading, Tensor]]]:
    """The gradient of the objectives that read an experience on each of these; Σ weight · loss, and what was read."""
    of_experience = [term for term in terms if term.on_tokens and term.name != "recover"]
    total, passes = 0.0, []
    for each in beside:
        trust = {id(term): each.weight for term in of_experience}
        loss, mine = _backward_(readings(of_experience, each, student), student, trust, {})
        total, passes = total + each.weight * loss, passes + mine
    return total, passes


def readings(terms: Sequence[Term], experience: Experience, student: Student) -> list[Reading]:
    """The forward passes that the objectives need; those that read the same batches share one."""
    found: dict[int, Reading] = {}
    for term in terms:
        if not term.on_tokens:
            continue
        batches = list(term.objective.read(experience, student))
        count = sum(batch.tokens for batch in batches)
        for batch in batches:
            found.setdefault(id(batch), Reading(batch, [])).terms.append((term, count))
    return list(found.values())


@torch.no_grad()
def _reference(passes: Sequence[tuple[Reading, Tensor]], experience: Experience, student: Student) -> Reference:
    """The predictions on what was learned from, which is not the background text of `recover`.

    Where nothing else was read, those on the trajectory's own tokens, if it has any, so that every update is bounded.
    """
    pairs = [(each.batch, hidden) for each, hidden in passes if any(term.name != "recover" for term, _ in each.terms)]
    pairs = pairs or [(batch, student.scorer.hidden(batch)) for batch in experience.batches]
    pairs = pairs or [(each.batch, hidden) for each, hidden in passes]
    return Reference([batch for batch, _ in pairs], [hidden for _, hidden in pairs])


def _norm(gradients: Iterable[Tensor | None]) -> float:
    present = [gradient for gradient in gradients if gradient is not None]
    return float(torch.nn.utils.get_total_norm(present)) if present else 0.0
