"""Long conversations: facts told at the start, other talk between, questions on the facts at the end.

What is asked can be answered only by who still knows the beginning. Training and held-out conversations share no fact:
a (person, attribute, value) belongs to one of the two by its digest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from featcl.files import digest_bytes
from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.corpus import SKILL_WEIGHTS, as_messages
from featcl.lab.items import Message
from featcl.lab.skills import SKILLS, Exchange
from featcl.lab.world import Fact

Part = Literal["train", "heldout"]
HELD_OUT = 5  # one fact in so many is held out
TALK = tuple(name for name in SKILL_WEIGHTS if name not in ("facts", "reading", "logic", "roles"))
"""Skills of which the talk between is made: none tells or asks a fact about a person."""


@dataclass(frozen=True)
class LongConversation:
    """One conversation in consecutive windows; what it asks last, it told first.

    Attributes:
        notes: The facts, as the system message.
        windows: Its exchanges; those of the first window stand after the notes, the last window asks.
    """

    notes: str
    windows: tuple[tuple[Exchange, ...], ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The right replies of the last window."""
        return tuple(exchange.assistant for exchange in self.windows[-1])

    def messages(self, windows: int | None = None) -> list[Message]:
        """The first so many windows as one conversation; None for all."""
        return as_messages([exchange for window in self.windows[:windows] for exchange in window], system=self.notes)


def long_conversations(
    seed: int | str,
    *,
    part: Part = "train",
    facts: tuple[int, int] = (1, 4),
    between: tuple[int, int] = (1, 3),
    asked: int = 2,
    together: int = 2,
) -> Iterator[LongConversation]:
    """An endless, seeded stream; all conversations of one stream that have equal `between` have as many windows.

    Args:
        seed: Of everything random in it.
        part: Whose facts are told: `train` or `heldout`.
        facts: Least and most facts told.
        between: Least and most exchanges between the notes and the questions, at least 1.
        asked: Most questions at the end, each on another fact.
        together: Exchanges in one window.
    """
    rng = random.Random(f"long/{part}/{seed}")
    while True:
        told = _facts(rng, rng.randint(*facts), part)
        talk = [_talk(rng) for _ in range(rng.randint(*between))]
        wanted = rng.sample(told, rng.randint(1, min(asked, len(told))))
        questions = tuple(
            Exchange(fact.question(rng.randrange(say.PHRASINGS)), f"{fact.statement}.") for fact in wanted
        )
        windows = [tuple(talk[:1]), *(tuple(talk[at : at + together]) for at in range(1, len(talk), together))]
        yield LongConversation(" ".join(say.fact_note(fact) for fact in told), (*windows, questions))


def part_of(fact: Fact) -> Part:
    """Which part a fact belongs to; a property of its person, attribute and value alone."""
    digest = digest_bytes(f"{fact.person}/{fact.attribute}/{fact.value}".encode())
    return "heldout" if int(digest[-8:], 16) % HELD_OUT == 0 else "train"


def _facts(rng: random.Random, count: int, part: Part) -> list[Fact]:
    """Made-up facts about different people."""
    found: list[Fact] = []
    for person in rng.sample(lex.PEOPLE, count):
        while True:
            attribute = rng.choice(list(lex.ATTRIBUTES))
            fact = Fact(person, attribute, rng.choice(lex.ATTRIBUTES[attribute][0]))
            if part_of(fact) == part and fact.value != person:
                found.append(fact)
                break
    return found


def _talk(rng: random.Random) -> Exchange:
    """One exchange of general skill, without a text of its own in front."""
    while True:
        exchange = SKILLS[rng.choice(TALK)](rng)
        if exchange.system is None:
            return exchange
