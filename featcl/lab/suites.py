"""The general suite: what the base model can do, and what learning must not destroy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from featcl.errors import FeatclError
from featcl.lab.corpus import as_messages
from featcl.lab.items import Item
from featcl.lab.skills import SKILLS, Exchange
from featcl.lab.world import base_facts, make_world

SUITES = ("lab/general",)
ITEMS_PER_SKILL = 24


def load_suite(name: str = "lab/general", *, skills: Sequence[str] | None = None, items: int = ITEMS_PER_SKILL,
               seed: int = 7) -> tuple[Item, ...]:  # fmt: skip
    """The items of a suite; `item.task` is the skill.

    Facts and functions that a world changes are left out: they should change.

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


@cache
def _obsolete() -> frozenset[str]:
    """Replies that are right for the base model and wrong once a world has taught what changed."""
    worlds = [make_world("development"), make_world("unseen")]
    replies = [f"{base_facts()[move.person, move.attribute].statement}." for world in worlds for move in world.moves]
    calls = [f"core.{operation}(" for world in worlds for operation in world.renamed]
    return frozenset(replies + calls)


def superseded(exchange: Exchange) -> bool:
    """Whether one of the worlds makes this reply obsolete."""
    if exchange.assistant in _obsolete():
        return True
    return any(old in exchange.assistant for old in _obsolete() if old.startswith("core."))
