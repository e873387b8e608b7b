"""Conversations that a model writes by itself: a user's turn after the template's opening, then the reply to it.

The user's turn is what the model finds likely where a user begins to speak; with a system message in front, what it
finds likely to be asked about that. Trained on whole conversations, a model asks what it has learned to be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from featcl.errors import FeatclError
from featcl.objectives.experience import Student
from featcl.streams.chat import Chat
from featcl.streams.messages import Message
from featcl.streams.rollouts import generate


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        conversations: One exchange each; those in which one side said nothing are left out.
        places: Which system message each of them belongs to.
        tokens: Read and written for it.
    """

    conversations: tuple[tuple[Message, ...], ...]
    places: tuple[int, ...]
    tokens: int


def converse(
    student: Student,
    systems: Sequence[str | None],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator,
) -> Written:
    """One exchange after each system message, or after none.

    Args:
        student: Its present weights write both sides.
        systems: What each conversation begins with; None: nothing. The message itself is not part of what is returned.
        max_new_tokens: Longest turn.
        temperature: Of the draws.
        generator: Of the draws.

    Raises:
        FeatclError: If a system message leaves no room.
    """
    chat, causal = student.chat, student.scorer.causal
    openings = [opening(chat, system) for system in systems]
    room = student.max_length - 2 * max_new_tokens - 16  # for both turns and the template between them
    if (longest := max(len(ids) for ids in openings)) > room:
        raise FeatclError(f"a context of {longest} tokens leaves no room for two turns of {max_new_tokens}")
    stops = chat.stop_ids | {turn_end(chat)}
    asked = generate(
        causal, openings, max_new_tokens=max_new_tokens, temperature=temperature, stop_ids=stops, generator=generator
    ).token_ids
    questions = [_text(chat, ids, stops) for ids in asked]
    places = [place for place, question in enumerate(questions) if question]
    prompts = [chat.prompt(_begun(systems[place], questions[place])) for place in places]
    said: list[list[int]] = []
    if prompts:
        said = generate(
            causal, prompts, max_new_tokens=max_new_tokens, temperature=temperature, stop_ids=chat.stop_ids,
            generator=generator,
        ).token_ids  # fmt: skip
    replies = {place: chat.decode_reply(ids) for place, ids in zip(places, said, strict=True)}
    found = {place: _exchange(questions[place], reply) for place, reply in replies.items() if reply}
    tokens = sum(len(ids) for ids in [*openings, *asked, *prompts, *said])
    return Written(tuple(found.values()), tuple(found), tokens)


def opening(chat: Chat, system: str | None) -> list[int]:
    """Ids in front of the content of a user's first turn, after a system message if there is one."""
    asked = chat.encode(_begun(system, "a"), mask="environment")
    places = [place for place, target in enumerate(asked.loss_mask) if target]
    return asked.input_ids[: places[-1] if system and not chat.system_role else places[0]]


def turn_end(chat: Chat) -> int:
    """The token that the template writes after a user's content."""
    asked = chat.encode([*_begun(None, "a"), {"role": "assistant", "content": "b"}], mask="environment")
    return asked.input_ids[max(place for place, target in enumerate(asked.loss_mask) if target) + 1]


def _begun(system: str | None, question: str) -> list[Message]:
    asked: Message = {"role": "user", "content": question}
    return [asked] if system is None else [{"role": "system", "content": system}, asked]


def _exchange(question: str, reply: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": reply})


def _text(chat: Chat, ids: Sequence[int], stops: frozenset[int]) -> str:
    """The text before the first token that ends the turn."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return chat.tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
