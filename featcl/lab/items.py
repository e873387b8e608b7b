"""A graded question of the laboratory, and its exact grader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from featcl.lab.evaluator import same_code

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One question with one right answer.

    Attributes:
        id: Unique within its stream or suite.
        task: The task or skill it measures.
        messages: The conversation up to the question, in chat form.
        answer: The reply that is right.
        grader: `exact` compares words; `code` compares syntax trees, so that spaces and brackets are free.
        context: Privileged text with which a latent task can be done by the base model.
        valid_from: Index of the first task after which the answer holds.
        valid_until: Index of the task that makes the answer obsolete, or None.
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    answer: str
    grader: Literal["exact", "code"] = "exact"
    context: str | None = None
    valid_from: int = 0
    valid_until: int | None = None


def grade(item: Item, reply: str) -> bool:
    """Whether `reply` is right; white space is normalised, nothing else is forgiven."""
    if item.grader == "code":
        return same_code(reply, item.answer)
    return " ".join(reply.split()) == " ".join(item.answer.split())
