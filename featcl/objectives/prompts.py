"""The prompts of a trajectory: what stands before each of the assistant's turns, for student and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featcl.errors import FeatclError
from featcl.streams.chat import Chat
from featcl.streams.texts import message_text
from featcl.streams.trajectory import Message, Trajectory


@dataclass(frozen=True)
class Prompt:
    """One assistant turn.

    Attributes:
        student: Ids up to the assistant's header.
        teacher: The same with the privileged context in front.
        reply: What the assistant said in the trajectory, with the token that ends the turn.
    """

    student: list[int]
    teacher: list[int]
    reply: list[int]


def privileged_context(trajectory: Trajectory) -> str:
    """What the teacher may know: `meta["context"]`, else the feedback, else the trajectory as a demonstration."""
    context = trajectory.meta.get("context")
    if context is not None and not isinstance(context, str):
        raise FeatclError(f"trajectory {trajectory.id!r}: meta.context must be a string, got {context!r:.60}")
    if context or trajectory.feedback:
        return context or trajectory.feedback or ""
    return "\n".join(f"{message['role']}: {message_text(message)}" for message in trajectory.messages)


def reply_prompts(
    trajectory: Trajectory,
    chat: Chat,
    *,
    context: str | None,
    max_length: int,
    max_new_tokens: int,
    max_turns: int,
) -> list[Prompt]:
    """The prompts of a trajectory's assistant turns, short enough for replies of `max_new_tokens`.

    Where a prompt is too long its oldest messages are left out, then its oldest tokens.

    Args:
        trajectory: A conversation.
        chat: The model's chat form.
        context: Privileged text for the teacher; None: the teacher reads what the student reads.
        max_length: Longest sequence in tokens.
        max_new_tokens: Tokens kept free for a reply; at most half of `max_length`.
        max_turns: At most so many turns, evenly spread.

    Raises:
        FeatclError: If the trajectory is raw text or no assistant turn follows a prompt.
    """
    messages = trajectory.messages
    turns = [
        index
        for index in range(1, len(messages))
        if messages[index]["role"] == "assistant" and messages[index - 1]["role"] != "assistant"
    ]
    if not turns:
        what = "is raw text" if trajectory.text is not None else "has no assistant turn after a prompt"
        raise FeatclError(f"trajectory {trajectory.id!r} {what}: distillation needs prompts to reply to; use sft")
    if len(turns) > max_turns:
        last = max(max_turns - 1, 1)
        turns = [turns[round(place * (len(turns) - 1) / last)] for place in range(max_turns)]
    room = max_length - min(max_new_tokens, max_length // 2)
    prompts = []
    for turn in turns:
        reply = chat.reply_ids(message_text(messages[turn]))[: max_length - room]
        student = _fit(chat, messages[:turn], None, room)
        teacher = student if context is None else _fit(chat, messages[:turn], context, room)
        prompts.append(Prompt(student, teacher, reply))
    return prompts


def _fit(chat: Chat, messages: Sequence[Message], context: str | None, room: int) -> list[int]:
    """Ids of a prompt of at most `room` tokens: without its oldest messages, then without its oldest tokens."""
    while True:
        ids = chat.prompt(messages if context is None else chat.with_context(messages, context))
        if len(ids) <= room:
            return ids
        if len(messages) == 1:
            return ids[len(ids) - room :]
        messages = messages[1:]
        while len(messages) > 1 and messages[0]["role"] == "assistant":
            messages = messages[1:]
