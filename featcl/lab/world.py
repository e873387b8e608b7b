"""What is true in the laboratory: facts the base model knows, and two disjoint worlds that it does not.

Everything follows from fixed seeds, so the truth behind every answer is known and can be digested.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Literal

from featcl.files import digest_json
from featcl.lab import lexicon as lex

WorldName = Literal["development", "unseen"]
BASE_SEED = 20260
WORLD_SEEDS: dict[str, int] = {"development": 20261, "unseen": 20262}

PEOPLE_WITH_STYLE = 4
NEW_FACTS_PER_PERSON = 4
CHANGED_FACTS = 12
CHANGED_FUNCTIONS = 6
TEAMS = 8


@dataclass(frozen=True)
class Fact:
    person: str
    attribute: str
    value: str

    @property
    def statement(self) -> str:
        return lex.ATTRIBUTES[self.attribute][2].format(p=self.person, v=self.value)

    def question(self, phrasing: int) -> str:
        return lex.ATTRIBUTES[self.attribute][1][phrasing].format(p=self.person)


@dataclass(frozen=True)
class Style:
    """How a person wants to be answered: register, form of address, closing word."""

    register: str
    address: str
    closer: str


@dataclass(frozen=True)
class Convention:
    """How a project names functions."""

    noun_first: bool
    camel: bool
    prefix: str

    def name(self, operation: str, data: str) -> str:
        words = [self.prefix] + ([data, operation] if self.noun_first else [operation, data])
        return words[0] + "".join(w.capitalize() for w in words[1:]) if self.camel else "_".join(words)


@dataclass(frozen=True)
class Rule:
    """What a new operation does with words: the positions it returns, and the word between them."""

    order: tuple[int, ...]
    joiner: str

    def apply(self, words: Sequence[str]) -> str:
        return f" {self.joiner} ".join(words[i] for i in self.order)


@dataclass(frozen=True)
class World:
    """One world's truths, none of which the base model has seen.

    Attributes:
        facts: New facts about new people.
        styles: Person to style.
        moves: Facts about people the base model knows, changed.
        library, functions: A new library; operation to function name.
        renamed: Operation to its new name in `core`.
        skills: A new operation on four words, by its name.
        conventions: Project to naming convention.
        related, shared: Two further libraries, and their functions: the same in both.
        teams: Object to team: two objects in each of eight teams, the first four taught apart from the last four.
    """

    name: str
    facts: tuple[Fact, ...]
    styles: dict[str, Style]
    moves: tuple[Fact, ...]
    library: str
    functions: dict[str, str]
    renamed: dict[str, str]
    skills: dict[str, Rule]
    conventions: dict[str, Convention]
    related: tuple[str, ...]
    shared: dict[str, str]
    teams: dict[str, str]

    @property
    def digest(self) -> str:
        return digest_json(asdict(self))


@cache
def base_facts() -> dict[tuple[str, str], Fact]:
    """The facts that the base model is trained on, by (person, attribute)."""
    rng = random.Random(BASE_SEED)
    return {
        (person, attribute): Fact(person, attribute, rng.choice(values))
        for person in lex.BASE_PEOPLE
        for attribute, (values, _, _) in lex.ATTRIBUTES.items()
    }


@cache
def base_functions() -> dict[str, dict[str, str]]:
    """Library to operation to function name, for the libraries that the base model knows."""
    rng = random.Random(BASE_SEED + 1)
    operations = list(lex.OPERATIONS)
    made_up = {library: dict(zip(operations, rng.sample(lex.NONCE, len(operations)), strict=True))
               for library in lex.LIBRARIES[1:]}  # fmt: skip
    return {"core": {op: op for op in operations}, **made_up}


@cache
def make_world(name: WorldName) -> World:
    """The development world or the second, unseen one."""
    rng = random.Random(WORLD_SEEDS[name])
    development = name == "development"
    half = slice(0, 6) if development else slice(6, 12)
    people = lex.DEVELOPMENT_PEOPLE if development else lex.UNSEEN_PEOPLE
    projects = lex.PROJECTS[0:2] if development else lex.PROJECTS[2:4]
    skill = lex.NONCE[0 if development else 3]
    forward, backward = (0, 1, 2, 3), (3, 2, 1, 0)
    objects = lex.OBJECTS[0:16] if development else lex.OBJECTS[16:32]
    teams = rng.sample(lex.TEAMS, TEAMS)
    operations = list(lex.OPERATIONS)
    nonce = rng.sample(lex.NONCE[6:], len(lex.OPERATIONS) + CHANGED_FUNCTIONS)
    return World(
        name=name,
        facts=_new_facts(rng, people),
        styles=_styles(rng, people[:PEOPLE_WITH_STYLE]),
        moves=_moves(rng, lex.BASE_PEOPLE[half]),
        library=lex.DEVELOPMENT_LIBRARY if development else lex.UNSEEN_LIBRARY,
        functions=dict(zip(operations[:12], nonce, strict=False)),
        renamed=dict(zip(operations[half], nonce[len(operations) :], strict=False)),
        skills={skill: Rule(backward, "and") if development else Rule(forward, "then")},
        conventions=dict(zip(projects, _conventions(rng), strict=True)),
        related=lex.PROJECTS[4:6] if development else lex.PROJECTS[6:8],
        shared=dict(zip(operations[:12], rng.sample(lex.NONCE[6:], 12), strict=True)),
        teams={thing: teams[i // 2] for i, thing in enumerate(rng.sample(objects, 16))},
    )


def later(world: World) -> World:
    """The world after every other new fact, and every other function of its library, has changed."""
    rng = random.Random(f"later/{world.name}")
    facts = [replace(fact, value=_other(rng, fact)) if i % 2 else fact for i, fact in enumerate(world.facts)]
    unused = [word for word in lex.NONCE if word not in world.functions.values()]
    names = rng.sample(unused, len(world.functions))
    functions = {op: names[i] if i % 2 else old for i, (op, old) in enumerate(world.functions.items())}
    return replace(world, facts=tuple(facts), functions=functions)


def _new_facts(rng: random.Random, people: tuple[str, ...]) -> tuple[Fact, ...]:
    """Random facts for each person; neighbours in the list want opposite evenings."""
    facts = []
    others = [name for name in lex.ATTRIBUTES if name != "evening"]
    for i, person in enumerate(people):
        chosen = rng.sample(others, NEW_FACTS_PER_PERSON - 1)
        facts += [Fact(person, attribute, rng.choice(lex.ATTRIBUTES[attribute][0])) for attribute in chosen]
        facts.append(Fact(person, "evening", lex.EVENINGS[2 * (i // 2) + i % 2]))
    return tuple(facts)


def _styles(rng: random.Random, people: tuple[str, ...]) -> dict[str, Style]:
    registers, addresses, closers = (rng.sample(w, len(people)) for w in (lex.REGISTERS, lex.ADDRESSES, lex.CLOSERS))
    return {p: Style(*parts) for p, *parts in zip(people, registers, addresses, closers, strict=True)}


def _moves(rng: random.Random, people: tuple[str, ...]) -> tuple[Fact, ...]:
    """Two facts of each person, with a value other than the one the base model knows."""
    moves = []
    for person in people:
        for attribute in rng.sample(list(lex.ATTRIBUTES), CHANGED_FACTS // len(people)):
            old = base_facts()[person, attribute]
            moves.append(replace(old, value=_other(rng, old)))
    return tuple(moves)


def _other(rng: random.Random, fact: Fact) -> str:
    """Another value of the fact's attribute."""
    return rng.choice([value for value in lex.ATTRIBUTES[fact.attribute][0] if value != fact.value])


def _conventions(rng: random.Random) -> tuple[Convention, Convention]:
    """Two conventions that differ in prefix and in order of words."""
    noun_first = rng.random() < 0.5
    first, second = rng.sample(lex.PREFIXES, 2)
    return Convention(noun_first, rng.random() < 0.5, first), Convention(not noun_first, rng.random() < 0.5, second)
