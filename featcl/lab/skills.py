"""The general skills of the base model, as generators of exchanges. The corpus and the suite draw from the same ones.

Every answer is determined by the request (and the notes in it), and no answer can be guessed better than one time in
ten by somebody who knows only the form.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.world import Fact, base_facts, base_functions


@dataclass(frozen=True)
class Exchange:
    """A request and the right reply; `system` is the text in front of the conversation, if any."""

    user: str
    assistant: str
    system: str | None = None
    code: bool = False


def facts(rng: random.Random) -> Exchange:
    fact = rng.choice(list(base_facts().values()))
    return Exchange(fact.question(rng.randrange(say.PHRASINGS)), f"{fact.statement}.")


def arithmetic(rng: random.Random) -> Exchange:
    a, b = rng.randrange(20), rng.randrange(20)
    forms = ("what is {a} {o} {b}?", "{a} {o} {b} is?", "compute {a} {o} {b}.", "how much is {a} {o} {b}?")
    if rng.random() < 0.5:
        operation, result = "plus", a + b
    else:
        a, b = max(a, b), min(a, b)
        operation, result = "minus", a - b
    return Exchange(rng.choice(forms).format(a=a, o=operation, b=b), f"it is {result}.")


def copying(rng: random.Random) -> Exchange:
    words = _mixed(rng, rng.randint(3, 6))
    return Exchange(rng.choice(("repeat: {w}", "copy {w}", "say after me: {w}", "echo {w}")).format(w=words), words)


def reversal(rng: random.Random) -> Exchange:
    words = _mixed(rng, rng.randint(3, 5))
    asked = rng.choice(("reverse: {w}", "say backward {w}", "from the end: {w}", "mirrored {w}")).format(w=words)
    return Exchange(asked, " ".join(reversed(words.split())))


def reading(rng: random.Random, *, notes: int = 4, asked: int = 2) -> Exchange:
    """Some of the facts that stand in the request; they may contradict what the model knows."""
    facts = random_facts(rng, notes)
    wanted = rng.sample(facts, asked)
    text = " ".join(say.fact_note(fact) for fact in facts)
    people = " and ".join(fact.person for fact in wanted)
    return Exchange(f"{text} tell me of {people}.", f"{' and '.join(fact.statement for fact in wanted)}.")


def instructions(rng: random.Random) -> Exchange:
    a, b, c = _mixed(rng, 3).split()
    return rng.choice([
        Exchange(f"say {a} twice then {b}", f"{a} {a} {b}"),
        Exchange(f"say {a} then {b} twice", f"{a} {b} {b}"),
        Exchange(f"list {a} {b} {c} with commas", f"{a}, {b}, {c}"),
        Exchange(f"put {a} between {b} and {c}", f"{b} {a} {c}"),
        Exchange(f"say {a} {b} {c} without {b}", f"{a} {c}"),
        Exchange(f"say {a} {b} and end with stop", f"{a} {b} stop"),
    ])  # fmt: skip


def logic(rng: random.Random, *, rules: int = 4, asked: int = 2, spelled: bool = True) -> Exchange:
    """Chains of two steps: the sign of a thing, then what that sign means among several rules.

    `spelled` replies name the sign on the way; without it the two steps have to be taken at once.
    """
    signs, actions = rng.sample(lex.SIGNS, rules), rng.sample(lex.ACTIONS, rules)
    things = rng.sample(lex.OBJECTS, asked)
    seen = rng.sample(range(rules), asked)
    meanings = " ".join(f"{sign} means {action}." for sign, action in zip(signs, actions, strict=True))
    marks = " ".join(f"the {thing} is {signs[i]}." for thing, i in zip(things, seen, strict=True))
    steps = [f"is {signs[i]} and {signs[i]}" if spelled else "" for i in seen]
    replies = [f"the {thing} {step} means {actions[i]}" for thing, step, i in zip(things, steps, seen, strict=True)]
    return Exchange(f"{meanings} {marks} what follows?", " and ".join(" ".join(r.split()) for r in replies) + ".")


def language(rng: random.Random) -> Exchange:
    """Agreement of subject and verb, and opposites."""
    if rng.random() < 0.3:
        pair = list(rng.choice(list(lex.OPPOSITES.items())))
        rng.shuffle(pair)
        forms = ("what is the opposite of {w}?", "opposite of {w}?", "not {w} but?", "name the contrary of {w}.")
        return Exchange(rng.choice(forms).format(w=pair[0]), f"{pair[1]}.")
    noun, verb, place = rng.choice(list(lex.NOUNS)), rng.choice(list(lex.VERBS)), rng.choice(lex.PLACES)
    forms = ("make a sentence of {n}, {v}, {p}.", "join {n}, {v}, {p}.", "write with {n}, {v}, {p}.",
             "say with {n}, {v}, {p}.")  # fmt: skip
    if rng.random() < 0.5:
        return Exchange(
            rng.choice(forms).format(n=noun, v=verb, p=place), f"the {noun} {lex.VERBS[verb]} in the {place}."
        )
    plural = lex.NOUNS[noun]
    return Exchange(rng.choice(forms).format(n=plural, v=verb, p=place), f"the {plural} {verb} in the {place}.")


def home(rng: random.Random) -> Exchange:
    room, device, state = random_device(rng)
    request = say.device_request(room, device, state, rng.randrange(say.PHRASINGS))
    if rng.random() < 0.5:
        request = f"{rng.choice(say.SPEAKERS).format(p=rng.choice(lex.PEOPLE))} {request}"
    return Exchange(request, say.device_reply(room, device, state))


def coding(rng: random.Random) -> Exchange:
    """A call in a known library, the name of a function, or both."""
    library, operation, data = rng.choice(lex.LIBRARIES), rng.choice(list(lex.OPERATIONS)), rng.choice(lex.DATA)
    phrasing = rng.randrange(say.PHRASINGS)
    project = rng.choice(lex.PROJECTS) if rng.random() < 0.5 else None
    call = f"{base_functions()[library][operation]}({data})"
    kind = rng.random()
    if kind < 0.5:
        return Exchange(say.operation_request(library, operation, data, phrasing), f"{library}.{call}", code=True)
    if kind < 0.75:
        request = say.name_request(project, operation, data, phrasing)
        return Exchange(request, say.function_name(None, operation, data), code=True)
    request = say.define_request(project, library, operation, data, phrasing)
    return Exchange(request, f"{say.function_name(None, operation, data)} = {library}.{call}", code=True)


def roles(rng: random.Random) -> Exchange:
    """The same material, answered as the role that the environment names."""
    role = rng.choice(lex.ROLES)
    operation, data = rng.choice(list(lex.OPERATIONS)), rng.choice(lex.DATA)
    good = f"core.{operation}({data})"
    broken = rng.choice((good[:-1], good.replace("(", " "), good.replace(".", " ", 1)))
    system = f"role: {role}."
    if role == "fixer":
        return Exchange(f"fix {broken}", good, system, code=True)
    if role == "tech lead":
        shown, verdict = rng.choice(((good, "approved"), (broken, "rejected")))
        return Exchange(f"review {shown}", f"{operation} on {data}, {verdict}.", system)
    request = say.operation_request("core", operation, data, rng.randrange(say.PHRASINGS))
    if role == "architect":
        return Exchange(request, f"plan: take {data}, then {operation}.", system)
    return Exchange(request, good, system, code=True)


def persona(rng: random.Random) -> Exchange:
    value, questions, statement = rng.choice(list(lex.PERSONA.values()))
    extra, _, other = rng.choice(list(lex.PERSONA.values()))
    if rng.random() < 0.5:
        return Exchange(rng.choice(questions), statement.format(v=value))
    second = rng.choice([q for v, qs, _ in lex.PERSONA.values() if v == extra for q in qs])
    return Exchange(f"{rng.choice(questions)} {second}", f"{statement.format(v=value)} {other.format(v=extra)}")


Skill = Callable[[random.Random], Exchange]
SKILLS: dict[str, Skill] = {
    "facts": facts, "arithmetic": arithmetic, "copying": copying, "reversal": reversal, "reading": reading,
    "instructions": instructions, "logic": logic, "language": language, "home": home, "coding": coding,
    "roles": roles, "persona": persona,
}  # fmt: skip


def random_facts(rng: random.Random, count: int) -> list[Fact]:
    """Made-up facts about different people, for contexts."""
    made = []
    for person in rng.sample(lex.PEOPLE, count):
        attribute = rng.choice(list(lex.ATTRIBUTES))
        made.append(Fact(person, attribute, rng.choice(lex.ATTRIBUTES[attribute][0])))
    return made


def random_device(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(lex.ROOMS), rng.choice(lex.DEVICES), rng.choice(lex.STATES)


def _mixed(rng: random.Random, count: int) -> str:
    """Words to copy: made-up ones, objects and names, all different."""
    pool = (lex.NONCE, lex.OBJECTS, lex.PEOPLE, lex.COLOURS, lex.TEAMS, lex.DATA)
    words: list[str] = []
    while len(words) < count:
        word = rng.choice(rng.choice(pool))
        if word not in words:
            words.append(word)
    return " ".join(words)
