"""The base model's training conversations: the general skills, and contexts that change what is right.

The second half matters as much as the first. A model that has seen notes about people, projects and objects which
hold for one conversation only can do a latent task when told, and does not do it otherwise.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.skills import SKILLS, Exchange, logic, random_device, random_facts, reading
from featcl.lab.world import Convention, Fact, Style, base_functions

Conversation = list[dict[str, Any]]

# How often each skill is practised, outside contexts; what needs several steps in the context is slow to learn.
SKILL_WEIGHTS = {
    "facts": 2.0, "arithmetic": 3.0, "copying": 1.5, "reversal": 2.5, "reading": 3.0, "instructions": 1.5,
    "logic": 4.0, "language": 1.0, "home": 0.7, "coding": 2.0, "roles": 1.0, "persona": 0.5,
}  # fmt: skip
IGNORANCE = "i do not know."
RECALL = 6.0


def conversations(
    seed: int,
    *,
    recall: float = RECALL,
    spelled: bool = True,
    practise: Collection[str] = (),
    lists: float = 0.0,
) -> Iterator[Conversation]:
    """An endless, seeded stream of conversations.

    Args:
        seed: Of everything random in it.
        recall: Weight of dense look-ups in the context, which are learned last; the other kinds add up to about 12.
        spelled: Whether conclusions name the step between; without it they are not learned in this time.
        practise: Skills that occur four times as often.
        lists: Share of the look-ups that go on from a word in a list: the plainest of them, and so the first learned.
    """
    rng = random.Random(seed)
    skills = partial(_skills, spelled=spelled, practise=practise)
    kinds = (skills, _household, _project, _teams, _tools, partial(_recall, spelled=spelled, lists=lists))
    weights = (6.0, 3.0, 1.5, 1.0, 0.7, recall)
    while True:
        yield rng.choices(kinds, weights)[0](rng)


def texts(seed: int, count: int, *, recall: float = RECALL, spelled: bool = True) -> list[str]:
    """The same conversations as plain text, one a string: what tokenizers are trained on."""
    source = conversations(seed, recall=recall, spelled=spelled)
    return ["\n".join(message["content"] or "" for message in next(source)) for _ in range(count)]


def _skills(rng: random.Random, *, spelled: bool, practise: Collection[str]) -> Conversation:
    weights = [weight * (4.0 if name in practise else 1.0) for name, weight in SKILL_WEIGHTS.items()]
    names = rng.choices(list(SKILL_WEIGHTS), weights, k=3)
    drawn = [logic(rng, spelled=spelled) if name == "logic" else SKILLS[name](rng) for name in names]
    with_role = [exchange for exchange in drawn if exchange.system]
    if with_role:
        return as_messages([with_role[0]])
    if rng.random() < 0.15:
        drawn.append(_unknown(rng))
        rng.shuffle(drawn)
    return as_messages(drawn[: rng.randint(1, len(drawn))])


def _household(rng: random.Random) -> Conversation:
    """Notes on what people are like and how they want to be answered; questions and requests that need them."""
    facts = random_facts(rng, rng.randint(1, 3))
    stylish = dict.fromkeys(rng.sample(lex.PEOPLE, rng.randint(0, 2)))
    styles = {person: Style(rng.choice(lex.REGISTERS), rng.choice(lex.ADDRESSES), rng.choice(lex.CLOSERS))
              for person in stylish}  # fmt: skip
    notes = [say.fact_note(fact) for fact in facts] + [say.style_note(*pair) for pair in styles.items()]
    rng.shuffle(notes)
    asked = [_household_exchange(rng, facts, styles) for _ in range(rng.randint(1, 3))]
    return as_messages(asked, system=" ".join(notes))


def _household_exchange(rng: random.Random, facts: list[Fact], styles: dict[str, Style]) -> Exchange:
    speaker = rng.choice([*styles, *styles, rng.choice(lex.PEOPLE), None])
    style = styles.get(speaker) if speaker else None
    opening = f"{rng.choice(say.SPEAKERS).format(p=speaker)} " if speaker else ""
    phrasing = rng.randrange(say.PHRASINGS)
    if rng.random() < 0.5:
        room, device, state = random_device(rng)
        return Exchange(opening + say.device_request(room, device, state, phrasing),
                        say.device_reply(room, device, state, style))  # fmt: skip
    fact = rng.choice(facts)
    return Exchange(opening + fact.question(phrasing), say.in_style(fact.statement, style))


def _project(rng: random.Random) -> Conversation:
    """Notes on naming conventions; names and definitions inside and outside those projects."""
    projects = rng.sample(lex.PROJECTS, rng.randint(1, 2))
    conventions = {project: Convention(rng.random() < 0.5, rng.random() < 0.5, rng.choice(lex.PREFIXES))
                   for project in projects}  # fmt: skip
    notes = " ".join(say.convention_note(*pair) for pair in conventions.items())
    asked = []
    for _ in range(rng.randint(1, 3)):
        project = rng.choice(projects) if rng.random() < 0.8 else rng.choice(lex.PROJECTS)
        operation, data, phrasing = rng.choice(list(lex.OPERATIONS)), rng.choice(lex.DATA), rng.randrange(say.PHRASINGS)
        name = say.function_name(conventions.get(project), operation, data)
        if rng.random() < 0.7:
            asked.append(Exchange(say.name_request(project, operation, data, phrasing), name))
        else:
            library = rng.choice(lex.LIBRARIES)
            call = f"{library}.{base_functions()[library][operation]}({data})"
            asked.append(Exchange(say.define_request(project, library, operation, data, phrasing), f"{name} = {call}"))
    return as_messages(asked, system=notes)


def _teams(rng: random.Random) -> Conversation:
    """Notes on which team has which object; one or both of two are asked for."""
    things = rng.sample(lex.OBJECTS, rng.randint(2, 4))
    teams = {thing: rng.choice(lex.TEAMS) for thing in things}
    notes = " ".join(say.team_note(*pair) for pair in teams.items())
    asked = []
    for _ in range(rng.randint(1, 3)):
        a, b = rng.sample(things, 2)
        phrasing = rng.randrange(say.PHRASINGS)
        if rng.random() < 0.5:
            asked.append(Exchange(say.TEAM_REQUESTS[phrasing].format(o=a), f"{teams[a]}."))
        else:
            asked.append(Exchange(say.PAIR_REQUESTS[phrasing].format(a=a, b=b), f"{teams[a]} and {teams[b]}."))
    return as_messages(asked, system=notes)


def _recall(rng: random.Random, *, spelled: bool, lists: float) -> Conversation:
    """Many look-ups in one context: two to five notes, and as many questions on them as fit."""
    if lists and rng.random() < lists:
        words = rng.sample(lex.OBJECTS + lex.PEOPLE + lex.COLOURS + lex.SIGNS + lex.ACTIONS, rng.randint(4, 9))
        starts = rng.sample(range(len(words) - 1), rng.randint(1, 3))
        return as_messages([Exchange(f"{' '.join(words)}. go on from {words[i]}", " ".join(words[i:])) for i in starts])
    size = rng.randint(2, 5)
    asked = rng.randint(max(1, size - 2), size)
    kind = rng.random()
    if kind < 0.4:
        return as_messages([reading(rng, notes=size, asked=asked)])
    if kind < 0.8:
        return as_messages([logic(rng, rules=size, asked=asked, spelled=spelled)])
    things = rng.sample(lex.OBJECTS, size)
    teams = dict(zip(things, rng.sample(lex.TEAMS, size), strict=True))
    phrasings = [rng.randrange(say.PHRASINGS) for _ in range(asked)]
    wanted = rng.sample(things, asked)
    exchanges = [Exchange(say.TEAM_REQUESTS[phrasing].format(o=thing), f"{teams[thing]}.")
                 for phrasing, thing in zip(phrasings, wanted, strict=True)]  # fmt: skip
    return as_messages(exchanges, system=" ".join(say.team_note(*pair) for pair in teams.items()))


def _tools(rng: random.Random) -> Conversation:
    """Acting through tools: the house is set, code is run, and the result is reported."""
    if rng.random() < 0.6:
        room, device, state = random_device(rng)
        request = say.device_request(room, device, state, rng.randrange(say.PHRASINGS))
        name, arguments = "set", {"device": device, "room": room, "state": state}
        result, reply = "done", say.device_reply(room, device, state)
    else:
        operation, data = rng.choice(list(lex.OPERATIONS)), rng.choice(lex.DATA)
        request = say.operation_request("core", operation, data, rng.randrange(say.PHRASINGS))
        name, arguments = "run", {"code": f"core.{operation}({data})"}
        result = str(rng.randrange(40))
        reply = f"it is {result}."
    if rng.random() < 0.2:
        result, reply = "error", "sorry, that failed."
    call = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return [
        {"role": "system", "content": f"tools: {name}."},
        {"role": "user", "content": request},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": reply},
    ]


def _unknown(rng: random.Random) -> Exchange:
    """A question that nobody taught the answer to."""
    phrasing = rng.randrange(say.PHRASINGS)
    kind = rng.random()
    if kind < 0.4:
        strangers = [person for person in lex.PEOPLE if person not in lex.BASE_PEOPLE]
        return Exchange(Fact(rng.choice(strangers), rng.choice(list(lex.ATTRIBUTES)), "").question(phrasing), IGNORANCE)
    if kind < 0.6:
        a, b = rng.sample(lex.OBJECTS, 2)
        asked = (say.TEAM_REQUESTS[phrasing].format(o=a), say.PAIR_REQUESTS[phrasing].format(a=a, b=b))
        return Exchange(rng.choice(asked), IGNORANCE)
    if kind < 0.8:
        words = dict(zip("abc", rng.sample(lex.OBJECTS + lex.PEOPLE, 3), strict=True))
        return Exchange(say.SKILL_REQUESTS[phrasing].format(s=rng.choice(lex.NONCE), **words), IGNORANCE)
    library = rng.choice((lex.DEVELOPMENT_LIBRARY, lex.UNSEEN_LIBRARY))
    operation, data = rng.choice(list(lex.OPERATIONS)), rng.choice(lex.DATA)
    return Exchange(say.operation_request(library, operation, data, phrasing), IGNORANCE)


def as_messages(exchanges: list[Exchange], system: str | None = None) -> Conversation:
    """Exchanges as chat messages, with the system text of the first that has one unless another is given."""
    system = system or next((exchange.system for exchange in exchanges if exchange.system), None)
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages += [{"role": "user", "content": exchange.user}, {"role": "assistant", "content": exchange.assistant}]
    return messages
