"""The general suite: what the base model can do, and what learning must not destroy."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from featcl.errors import FeatclError
from featcl.lab import phrases as say
from featcl.lab.corpus import IGNORANCE, Conversation, as_messages
from featcl.lab.items import Item
from featcl.lab.skills import SKILLS, Exchange
from featcl.lab.world import base_facts, make_world

SUITES = ("lab/general",)
ITEMS_PER_SKILL = 24


def load_suite(name: str = "lab/general", *, skills: Sequence[str] | None = None, items: int = ITEMS_PER_SKILL,
               seed: int = 7) -> tuple[Item, ...]:  # fmt: skip
    """The items of a suite; `item.task` is the skill.

    What a world changes (facts, functions, names in a project, replies to a speaker) is left out: it should change.

    Args:
        name: `lab/general`.
        skills: Which of `SKILLS`; None for all.
        items: How many of each skill.
        seed: Another seed draws other items; canaries need fresh ones.

    Raises:
        FeatclError: If the suite or a skill is unknown.
    """
    if name not in SUITES:
        raise FeatclError(f"evaluation suite {name!r} does not exist; there is {', '.join(SUITES)}")
    chosen = tuple(SKILLS) if skills is None else tuple(skills)
    unknown = [skill for skill in chosen if skill not in SKILLS]
    if unknown:
        raise FeatclError(f"skill {unknown[0]!r} is not in {name}; there are {', '.join(SKILLS)}")
    return tuple(item for skill in chosen for item in _items(skill, items, seed))


@cache
def _items(skill: str, count: int, seed: int) -> tuple[Item, ...]:
    rng = random.Random(f"{seed}/{skill}")
    unique: dict[tuple[str | None, str], Exchange] = {}
    for _ in range(100 * count):
        exchange = SKILLS[skill](rng)
        if not superseded(exchange):
            unique[exchange.system, exchange.user] = exchange
        if len(unique) == count:
            break
    return tuple(
        Item(
            id=f"{skill}/{seed}/{index}",
            task=skill,
            messages=tuple(as_messages([exchange])[:-1]),
            answer=exchange.assistant,
            grader="code" if exchange.code else "exact",
        )
        for index, exchange in enumerate(unique.values())
    )


@dataclass(frozen=True)
class _Obsolete:
    """What the worlds change of what the base model does: replies, calls, and openings of requests."""

    replies: frozenset[str]
    calls: tuple[str, ...]
    openings: dict[str, tuple[str, ...]]


@cache
def _obsolete() -> _Obsolete:
    worlds = [make_world("development"), make_world("unseen")]
    projects = [project for world in worlds for project in world.conventions]
    speakers = [person for world in worlds for person in world.styles]
    return _Obsolete(
        replies=frozenset(f"{base_facts()[m.person, m.attribute].statement}." for world in worlds for m in world.moves),
        calls=tuple(f"core{sign}{operation}" for world in worlds for operation in world.renamed for sign in ". "),
        openings={project: (f"in project {project}, ",) for project in projects}
        | {person: tuple(opening.format(p=person) for opening in say.SPEAKERS) for person in speakers},
    )


def superseded(exchange: Exchange) -> bool:
    """Whether one of the worlds makes this reply obsolete.

    That is so for a fact that has moved, a function of `core` that was renamed (also where one is repaired or
    reviewed), and a project with naming conventions or a speaker with a style, unless a note in front says how they
    have it there.
    """
    old = _obsolete()
    text = f"{exchange.user} {exchange.assistant}"
    if exchange.assistant in old.replies or any(call in text for call in old.calls):
        return True
    concerned = [who for who, openings in old.openings.items() if exchange.user.startswith(openings)]
    return any(not re.search(rf"\b{who} (wants \w+ replies|writes)", exchange.system or "") for who in concerned)


def still_true(conversation: Conversation) -> bool:
    """Whether no reply in it is made obsolete by a world, nor says that something is not known which a world tells."""
    system = next((message["content"] for message in conversation if message["role"] == "system"), None)
    said = [message["content"] or "" for message in conversation if message["role"] in ("user", "assistant")]
    exchanges = [Exchange(user, assistant, system) for user, assistant in pairwise(said)]
    return not any(exchange.assistant == IGNORANCE or superseded(exchange) for exchange in exchanges)
