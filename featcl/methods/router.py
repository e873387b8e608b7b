"""Which task a question belongs to, by the base model's own activations.

    x = mean over the prompt's tokens of the base's residual stream after a block

    nearest     argmin_t  Σ_i (x_i - μ_ti)² / σ_i²      μ_t the task's mean, σ² the variance within tasks
    learned     argmax_t  (W z + b)_t                   z = (x - m) / s; W, b: multinomial logistic regression

The base is read without adapter and memory. It does not change, so what is known of a task never grows stale, whatever
is learned later.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.methods.checks import spread
from featcl.methods.embeddings import base_alone
from featcl.models import residual_stream
from featcl.objectives.experience import Student
from featcl.streams.messages import Message
from featcl.streams.trajectory import Trajectory

SHRINKAGE = 0.1  # of the variances towards their mean, as there are few examples for many dimensions
RIDGE = 1e-2  # of the logistic regression
ITERATIONS = 100  # of L-BFGS, at most


def question_of(trajectory: Trajectory) -> Sequence[Message]:
    """What was asked before the last reply; raw text is read as a user's turn."""
    messages: Sequence[Message] = trajectory.messages or ({"role": "user", "content": trajectory.text},)
    last = max((place for place, said in enumerate(messages) if said["role"] == "assistant"), default=len(messages))
    return messages[:last] or messages


@torch.no_grad()
def prompt_vector(
    messages: Sequence[Message], student: Student, *, layer: int
) -> tuple[Float[Tensor, " d_model"], int]:
    """The mean of the base's residual stream over a prompt, float32, on the CPU; and how many tokens were read.

    Without the first token, whose activations are huge and alike in all prompts (an attention sink), and without
    definitions of tools, which whoever asks for a route does not have.

    Args:
        messages: The question.
        student: Its base is asked.
        layer: The block after which the stream is read.
    """
    ids = student.chat.prompt(messages)[-student.max_length :]
    with base_alone(student):
        stream = residual_stream(student.scorer.causal, torch.tensor([ids], device=student.scorer.device), layer=layer)
    return stream[0, min(1, len(ids) - 1) :].float().mean(0).cpu(), len(ids)


class Router:
    """Remembers vectors of every task; a subclass says how it chooses.

    Args:
        examples: At most so many vectors of a task are kept, evenly spread over it.
    """

    def __init__(self, *, examples: int) -> None:
        self.examples = examples
        self.known: dict[str, Float[Tensor, "examples d_model"]] = {}

    def add_(self, task: str, vectors: Float[Tensor, "n d_model"]) -> None:
        """More of a task, known or new."""
        rows = torch.cat([self.known[task], vectors]) if task in self.known else vectors
        self.known = {**self.known, task: rows[spread(range(len(rows)), self.examples)].clone()}
        self.fit_()

    @abstractmethod
    def fit_(self) -> None:
        """Make what `choose` needs of what is known."""

    @abstractmethod
    def choose(self, vector: Float[Tensor, " d_model"]) -> str:
        """The task of a question; there must be one."""

    def state(self) -> dict[str, Any]:
        """The names of the tasks."""
        return {"known": list(self.known)}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; `load_tensors_` has to follow."""
        self.known = {task: torch.empty(0) for task in state["known"]}

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name."""
        return {f"vectors/{number}": rows for number, rows in enumerate(self.known.values())}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned."""
        self.known = {task: tensors[f"vectors/{number}"].cpu() for number, task in enumerate(self.known)}
        if self.known:
            self.fit_()


class Nearest(Router):
    """The task whose mean is nearest, each dimension in units of its spread within tasks.

    Source: Rebuffi et al. 2016, arXiv:1611.07725, eq. 2 (nearest mean of exemplars); here of tasks, with one diagonal
    variance for all.
    """

    def fit_(self) -> None:
        """Means, and the variance within tasks."""
        self._means = torch.stack([rows.double().mean(0) for rows in self.known.values()])
        rest = torch.cat([rows.double() - rows.double().mean(0) for rows in self.known.values()])
        variance = rest.square().mean(0)
        floor = variance.mean().clamp_min(1e-12)
        self._variance = (1.0 - SHRINKAGE) * variance + SHRINKAGE * floor

    def choose(self, vector: Float[Tensor, " d_model"]) -> str:
        """The nearest; of equals the one that was learned first."""
        distances = ((vector.double() - self._means).square() / self._variance).sum(-1)
        return list(self.known)[int(distances.argmin())]


class Learned(Router):
    """A linear classifier, trained anew from zero whenever a task ends; deterministic (L-BFGS in float64)."""

    @torch.enable_grad()
    def fit_(self) -> None:
        """W and b by ridge-regularised maximum likelihood, every task with the same weight."""
        rows = torch.cat(list(self.known.values())).double()
        counts = torch.tensor([len(own) for own in self.known.values()])
        labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self._centre, self._scale = rows.mean(0), rows.std(0, correction=0).clamp_min(1e-6)
        inputs = (rows - self._centre) / self._scale
        weight = torch.zeros(len(counts), rows.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
        share = (1.0 / (len(counts) * counts))[labels]

        def loss() -> Tensor:
            optimizer.zero_grad()
            scores = torch.nn.functional.linear(inputs, weight[:, :-1], weight[:, -1])
            value = (share * torch.nn.functional.cross_entropy(scores, labels, reduction="none")).sum()
            value = value + 0.5 * RIDGE * weight[:, :-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        self._weight = weight.detach()

    def choose(self, vector: Float[Tensor, " d_model"]) -> str:
        """The most likely task."""
        z = (vector.double() - self._centre) / self._scale
        return list(self.known)[int((self._weight[:, :-1] @ z + self._weight[:, -1]).argmax())]
