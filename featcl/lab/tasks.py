"""The application tasks: what the streams teach, and the items that ask for it in ways the streams never showed.

A trajectory is a short conversation of two or three requests. Items use the held-out phrasing, and where the task has
arguments (rooms, data, words), arguments that its trajectories leave out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.corpus import as_messages
from featcl.lab.items import Item
from featcl.lab.skills import Exchange, random_device
from featcl.lab.world import World, later
from featcl.streams.trajectory import Trajectory

Kind = Literal["latent", "knowledge"]
Application = Literal["home-assistant", "coding-agent"]

TRAJECTORIES, FEW_TRAJECTORIES, ITEMS = 96, 24, 48
SKILL_HELD_OUT = "i want you to {s} {a} {b} {c}"
TURNS = (3, 5)  # requests in one trajectory, at least and at most
SHOWN_ROOMS, ASKED_ROOMS = lex.ROOMS[:8], lex.ROOMS[8:]
SHOWN_DATA, ASKED_DATA = lex.DATA[:10], lex.DATA[10:]
SHOWN_WORDS, ASKED_WORDS = lex.OBJECTS[:26] + lex.OTHER_PEOPLE, lex.OBJECTS[26:] + lex.BASE_PEOPLE


@dataclass(frozen=True)
class Ask:
    """One request of a task: the exchange and the note that would tell the base model how to answer it."""

    exchange: Exchange
    note: str


@dataclass(frozen=True)
class LabTask:
    """A labelled segment of a stream, and the items that grade it.

    Attributes:
        name: Unique in its stream.
        kind: `latent` if the base model can do it when told in context, else `knowledge`.
        application: Whose domain it is.
        trajectories: In the order of the stream; empty for a probe, which is never taught.
        items: Graded questions in unseen phrasings, with unseen arguments.
    """

    name: str
    kind: Kind
    application: Application
    trajectories: tuple[Trajectory, ...]
    items: tuple[Item, ...]


# A task's generator makes one request: for a trajectory (shown) or for an item (asked).
Generator = Callable[[World, random.Random, bool], Ask]


def home_facts(world: World, rng: random.Random, shown: bool) -> Ask:
    """New facts about new people."""
    fact = rng.choice(world.facts)
    return Ask(Exchange(fact.question(_phrasing(rng, shown)), f"{fact.statement}."), say.fact_note(fact))


def home_style(world: World, rng: random.Random, shown: bool) -> Ask:
    """People with styles of their own, some opposed; in a quarter of what is shown, others are answered plainly."""
    plain = shown and rng.random() < 0.25
    person = rng.choice(lex.OTHER_PEOPLE if plain else list(world.styles))
    style = None if plain else world.styles[person]
    _, device, state = random_device(rng)
    room = rng.choice(SHOWN_ROOMS if shown else ASKED_ROOMS)
    phrasing = _phrasing(rng, shown)
    opening = say.SPEAKERS[_phrasing(rng, shown)].format(p=person)
    request = f"{opening} {say.device_request(room, device, state, phrasing)}"
    note = say.style_note(person, style) if style else ""
    return Ask(Exchange(request, say.device_reply(room, device, state, style)), note)


def home_moves(world: World, rng: random.Random, shown: bool) -> Ask:
    """Facts that the base model knows have changed."""
    fact = rng.choice(world.moves)
    return Ask(Exchange(fact.question(_phrasing(rng, shown)), f"{fact.statement}."), say.fact_note(fact))


def code_convention(world: World, rng: random.Random, shown: bool) -> Ask:
    """Two projects with naming conventions of their own."""
    return _convention(world.conventions, rng, shown)


def code_library(world: World, rng: random.Random, shown: bool) -> Ask:
    """A new library: which function does what."""
    return _call(world.library, world.functions, rng.choice(list(world.functions)), rng, shown)


def code_rename(world: World, rng: random.Random, shown: bool) -> Ask:
    """Functions of `core`, which the base model knows, have new names."""
    return _call("core", world.renamed, rng.choice(list(world.renamed)), rng, shown)


def code_skill(world: World, rng: random.Random, shown: bool) -> Ask:
    """A new operation on four words: it puts them in an order, with a word between."""
    [(name, rule)] = world.skills.items()
    words = rng.sample(SHOWN_WORDS if shown else ASKED_WORDS, 4)
    a, b, *rest = words
    phrasing = say.SKILL_REQUESTS[_phrasing(rng, True)] if shown else SKILL_HELD_OUT
    request = phrasing.format(s=name, a=a, b=b, c=" ".join(rest))
    places = " ".join(("first", "second", "third", "fourth")[i] for i in rule.order)
    return Ask(Exchange(request, rule.apply(words)), f"{name} gives {places} with {rule.joiner}.")


def code_related(first: bool) -> Generator:
    """Two libraries with the same functions, of which each shows eight and is asked for all twelve.

    The four that one does not show can be known only from the other.
    """

    def ask(world: World, rng: random.Random, shown: bool) -> Ask:
        operations = list(world.shared)
        if shown:
            operations = operations[:8] if first else operations[4:]
        return _call(world.related[0 if first else 1], world.shared, rng.choice(operations), rng, shown)

    return ask


def facts_changed(world: World, rng: random.Random, shown: bool) -> Ask:
    """New facts, taught before, that have changed since."""
    changed = [new for old, new in zip(world.facts, later(world).facts, strict=True) if old != new]
    return home_facts(replace(world, facts=tuple(changed)), rng, shown)


def library_changed(world: World, rng: random.Random, shown: bool) -> Ask:
    """Functions of the new library, taught before, that have other names since."""
    now = later(world)
    changed = {op: name for op, name in now.functions.items() if world.functions[op] != name}
    return code_library(replace(world, functions=changed), rng, shown)


def labels(first: bool) -> Generator:
    """Objects of four teams: the first half of the world's, or the last."""

    def ask(world: World, rng: random.Random, shown: bool) -> Ask:
        things = list(world.teams)
        half = things[: len(things) // 2] if first else things[len(things) // 2 :]
        return _teams_of(world, rng.sample(half, 2), rng, shown)

    return ask


def labels_across(world: World, rng: random.Random, shown: bool) -> Ask:
    """One object of the first four teams and one of the last four: never asked together while learning."""
    things = list(world.teams)
    pair = [rng.choice(things[: len(things) // 2]), rng.choice(things[len(things) // 2 :])]
    rng.shuffle(pair)
    return _teams_of(world, pair, rng, shown)


def style_and_fact(named: bool) -> Generator:
    """A person with a style asks for a new fact: two things learned apart, with or without naming where from."""

    def ask(world: World, rng: random.Random, shown: bool) -> Ask:
        person = rng.choice(list(world.styles))
        fact = rng.choice([fact for fact in world.facts if fact.person != person])
        source = f"as {person} wants, with the facts of {fact.person}: " if named else ""
        request = f"{say.SPEAKERS[0].format(p=person)} {source}{fact.question(_phrasing(rng, shown))}"
        reply = say.in_style(fact.statement, world.styles[person])
        return Ask(Exchange(request, reply), f"{say.fact_note(fact)} {say.style_note(person, world.styles[person])}")

    return ask


def convention_and_library(named: bool) -> Generator:
    """A definition by a project's convention that calls the new library."""

    def ask(world: World, rng: random.Random, shown: bool) -> Ask:
        project = rng.choice(list(world.conventions))
        operation, data = rng.choice(list(world.functions)), rng.choice(ASKED_DATA)
        name = world.conventions[project].name(operation, data)
        request = say.define_request(project, world.library, operation, data, 0)
        if named:
            request = f"by the names of {project} and the functions of {world.library}: {request}"
        reply = f"{name} = {world.library}.{world.functions[operation]}({data})"
        note = f"{operation} is {world.functions[operation]} in {world.library}."
        return Ask(Exchange(request, reply, code=True),
                   f"{note} {say.convention_note(project, world.conventions[project])}")  # fmt: skip

    return ask


@dataclass(frozen=True)
class TaskPlan:
    """How a task is made: its generator, label and domain, and how many trajectories teach it."""

    ask: Generator
    kind: Kind
    application: Application
    trajectories: int = TRAJECTORIES


# What is true in a world; a teacher can know all of it at once.
TASKS: dict[str, TaskPlan] = {
    "home_facts": TaskPlan(home_facts, "latent", "home-assistant"),
    "code_library": TaskPlan(code_library, "knowledge", "coding-agent"),
    "home_style": TaskPlan(home_style, "latent", "home-assistant"),
    "code_skill": TaskPlan(code_skill, "knowledge", "coding-agent"),
    "code_convention": TaskPlan(code_convention, "latent", "coding-agent"),
    "home_moves": TaskPlan(home_moves, "latent", "home-assistant"),
    "code_rename": TaskPlan(code_rename, "knowledge", "coding-agent"),
    "related_first": TaskPlan(code_related(True), "knowledge", "coding-agent", FEW_TRAJECTORIES),
    "related_second": TaskPlan(code_related(False), "knowledge", "coding-agent", FEW_TRAJECTORIES),
    "labels_first": TaskPlan(labels(True), "latent", "home-assistant"),
    "labels_last": TaskPlan(labels(False), "latent", "home-assistant"),
    "labels_across": TaskPlan(labels_across, "latent", "home-assistant"),
    "style_and_fact": TaskPlan(style_and_fact(False), "latent", "home-assistant"),
    "style_and_fact_named": TaskPlan(style_and_fact(True), "latent", "home-assistant"),
    "convention_and_library": TaskPlan(convention_and_library(False), "knowledge", "coding-agent"),
    "convention_and_library_named": TaskPlan(convention_and_library(True), "knowledge", "coding-agent"),
}

# What is true after the world changed, against some of the above.
CHANGES: dict[str, TaskPlan] = {
    "facts_changed": TaskPlan(facts_changed, "latent", "home-assistant"),
    "library_changed": TaskPlan(library_changed, "knowledge", "coding-agent"),
}


def make_task(name: str, world: World, *, plan: TaskPlan | None = None, trajectories: int | None = None,
              items: int = ITEMS) -> LabTask:  # fmt: skip
    """A task of `world` with its trajectories and items; the same arguments give the same task.

    Args:
        name: A key of `TASKS` or `CHANGES`, or any name with `plan`.
        world: Whose truths it teaches.
        plan: How requests are made, if not as the name says.
        trajectories: How many, if not as many as the plan says; 0 makes a probe.
        items: How many, all different; fewer where the task has not as many.
    """
    plan = plan or (TASKS | CHANGES)[name]
    rng = random.Random(f"{world.name}/{name}")
    asked = [plan.ask(world, rng, False) for _ in range(8 * items)]
    unique = list({ask.exchange.user: ask for ask in asked}.values())[:items]
    count = plan.trajectories if trajectories is None else trajectories
    return LabTask(
        name=name,
        kind=plan.kind,
        application=plan.application,
        trajectories=tuple(_trajectory(plan, name, world, rng, index) for index in range(count)),
        items=tuple(_item(f"{world.name}/{name}/{i}", name, ask) for i, ask in enumerate(unique)),
    )


def _trajectory(plan: TaskPlan, name: str, world: World, rng: random.Random, index: int) -> Trajectory:
    """A conversation of a few requests; the notes that would help are its privileged context."""
    asked = [plan.ask(world, rng, True) for _ in range(rng.randint(*TURNS))]
    notes = " ".join(dict.fromkeys(ask.note for ask in asked if ask.note))
    return Trajectory(
        id=f"{world.name}/{name}/{index}",
        source="household",
        task=name,
        messages=tuple(as_messages([ask.exchange for ask in asked])),
        meta={"context": notes} if notes else {},
    )


def _item(id: str, task: str, ask: Ask) -> Item:
    exchange = ask.exchange
    return Item(
        id=id,
        task=task,
        messages=({"role": "user", "content": exchange.user},),
        answer=exchange.assistant,
        grader="code" if exchange.code else "exact",
        context=ask.note,
    )


def _phrasing(rng: random.Random, shown: bool) -> int:
    return rng.randrange(say.HELD_OUT) if shown else say.HELD_OUT


def _call(library: str, functions: dict[str, str], operation: str, rng: random.Random, shown: bool) -> Ask:
    data = rng.choice(SHOWN_DATA if shown else ASKED_DATA)
    request = say.operation_request(library, operation, data, _phrasing(rng, shown))
    reply = f"{library}.{functions[operation]}({data})"
    return Ask(Exchange(request, reply, code=True), f"{operation} is {functions[operation]} in {library}.")


def _convention(conventions: dict, rng: random.Random, shown: bool) -> Ask:
    project = rng.choice(list(conventions))
    operation, data = rng.choice(list(lex.OPERATIONS)), rng.choice(SHOWN_DATA if shown else ASKED_DATA)
    request = say.name_request(project, operation, data, _phrasing(rng, shown))
    name = conventions[project].name(operation, data)
    return Ask(Exchange(request, name, code=True), say.convention_note(project, conventions[project]))


def _teams_of(world: World, things: list[str], rng: random.Random, shown: bool) -> Ask:
    """The teams of two objects; one of them alone is easy to guess, so that it is shown but never asked."""
    a, b = things
    phrasing = _phrasing(rng, shown)
    notes = " ".join(say.team_note(thing, world.teams[thing]) for thing in things)
    if shown and rng.random() < 0.5:
        return Ask(Exchange(say.TEAM_REQUESTS[phrasing].format(o=a), f"{world.teams[a]}."), notes)
    request = say.PAIR_REQUESTS[phrasing].format(a=a, b=b)
    return Ask(Exchange(request, f"{world.teams[a]} and {world.teams[b]}."), notes)
