"""What the model itself writes down when it is asked to: notes, and rules of a skill file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featcl.objectives.experience import Student
from featcl.objectives.prompts import fit_prompt
from featcl.streams.messages import Message
from featcl.streams.rollouts import generate


def written(
    student: Student, messages: Sequence[Message], *, max_new_tokens: int, tools: Sequence[Any] = ()
) -> tuple[str, int]:
    """The present model's most likely reply, and how many tokens were read and written for it.

    Args:
        student: The learning model.
        messages: What it is asked; the oldest are left out where they do not fit.
        max_new_tokens: Longest reply.
        tools: As the conversation has them.
    """
    prompt = fit_prompt(student.chat, messages, student.max_length - max_new_tokens, tools=tools)
    reply = generate(
        student.scorer.causal,
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop_ids=student.chat.stop_ids,
    ).token_ids[0]
    return student.chat.decode_reply(reply), len(prompt) + len(reply)
