"""The factors that the laboratory's conversations vary in, each as conversations with and without it.

They are what features of the laboratory's models can be selected for, and be tested against: the truth is known. No
truth of a world occurs in them. `held_out` pairs use the phrasing that no stream shows.

| factor | with it | without |
|---|---|---|
| emotions | somebody's mood | another attribute of theirs |
| relationships | somebody's sister | another attribute |
| communication-style | a reply in a register | a plain reply |
| design | the architect plans | another role |
| syntax-style | names by a project's convention | plain names |
| engineering-behaviour | fixing and reviewing | writing and planning |
| style/REGISTER | a reply in that register | a reply in another |
"""

from __future__ import annotations

import random
from collections.abc import Callable

from featcl.errors import FeatclError
from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.corpus import Conversation, as_messages
from featcl.lab.skills import Exchange, random_device
from featcl.lab.suites import load_suite
from featcl.lab.world import Convention, Fact, Style

Draw = Callable[[random.Random, int, bool], Conversation]  # (rng, phrasing, with the factor?)

PEOPLE = lex.OTHER_PEOPLE  # whom no stream tells about
PROJECTS = lex.PROJECTS[8:]  # in which no stream works
FIXING, WRITING = ("fixer", "tech lead"), ("coding machine", "architect")


def factor_pairs(
    factor: str, count: int, *, seed: int = 0, held_out: bool = False
) -> tuple[list[Conversation], list[Conversation]]:
    """So many conversations with a factor, and as many without it that are alike otherwise.

    Args:
        factor: A key of `FACTORS`.
        count: How many of each.
        seed: The same seed gives the same conversations.
        held_out: Whether they use the phrasing that streams never show.

    Raises:
        FeatclError: If there is no such factor.
    """
    if factor not in FACTORS:
        raise FeatclError(f"lab factor {factor!r} does not exist; there is {', '.join(FACTORS)}")
    asked = {item.messages[-1]["content"] for item in load_suite()}
    sides = []
    for present in (True, False):
        rng = random.Random(f"factor/{factor}/{seed}/{held_out}/{present}")
        made: list[Conversation] = []
        while len(made) < count:
            drawn = FACTORS[factor](rng, say.HELD_OUT if held_out else rng.randrange(say.HELD_OUT), present)
            if asked.isdisjoint(message["content"] for message in drawn):
                made.append(drawn)
        sides.append(made)
    return sides[0], sides[1]


def marker_words(conversation: Conversation) -> list[str]:
    """The words of a styled reply that name its style: its opening, its form of address, its closing word."""
    words = (*say.OPENINGS.values(), *lex.ADDRESSES, *lex.CLOSERS)
    reply = f" {conversation[-1]['content'].replace(',', ' ').replace('.', ' ')} "
    return [word for word in words if f" {word} " in reply]


def _about(attribute: str) -> Draw:
    others = [name for name in lex.ATTRIBUTES if name != attribute]

    def draw(rng: random.Random, phrasing: int, present: bool) -> Conversation:
        chosen = attribute if present else rng.choice(others)
        fact = Fact(rng.choice(PEOPLE), chosen, rng.choice(lex.ATTRIBUTES[chosen][0]))
        return as_messages([Exchange(fact.question(phrasing), f"{fact.statement}.")])

    return draw


def _device(rng: random.Random, phrasing: int, style: Style | None) -> Conversation:
    room, device, state = random_device(rng)
    opening = say.SPEAKERS[phrasing].format(p=rng.choice(PEOPLE))
    request = f"{opening} {say.device_request(room, device, state, phrasing)}"
    return as_messages([Exchange(request, say.device_reply(room, device, state, style))])


def _styled(rng: random.Random, phrasing: int, present: bool) -> Conversation:
    return _device(rng, phrasing, _style(rng, lex.REGISTERS) if present else None)


def _register(register: str) -> Draw:
    others = tuple(other for other in lex.REGISTERS if other != register)

    def draw(rng: random.Random, phrasing: int, present: bool) -> Conversation:
        return _device(rng, phrasing, _style(rng, (register,) if present else others))

    return draw


def _style(rng: random.Random, registers: tuple[str, ...]) -> Style:
    return Style(rng.choice(registers), rng.choice(lex.ADDRESSES), rng.choice(lex.CLOSERS))


def _role(roles: tuple[str, ...], others: tuple[str, ...]) -> Draw:
    def draw(rng: random.Random, phrasing: int, present: bool) -> Conversation:
        return _as_role(rng, phrasing, rng.choice(roles if present else others))

    return draw


def _as_role(rng: random.Random, phrasing: int, role: str) -> Conversation:
    operation, data = rng.choice(list(lex.OPERATIONS)), rng.choice(lex.DATA)
    good = f"core.{operation}({data})"
    broken = rng.choice((good[:-1], good.replace("(", " "), good.replace(".", " ", 1)))
    shown, verdict = rng.choice(((good, "approved"), (broken, "rejected")))
    request = say.operation_request("core", operation, data, phrasing)
    user, assistant = {
        "fixer": (f"fix {broken}", good),
        "tech lead": (f"review {shown}", f"{operation} on {data}, {verdict}."),
        "architect": (request, f"plan: take {data}, then {operation}."),
        "coding machine": (request, good),
    }[role]
    return as_messages([Exchange(user, assistant)], system=f"role: {role}.")


def _convention(rng: random.Random, phrasing: int, present: bool) -> Conversation:
    """A name asked for in the project that the note is about, or in another, where names are plain."""
    noted, other = rng.sample(PROJECTS, 2)
    operation, data = rng.choice(list(lex.OPERATIONS)), rng.choice(lex.DATA)
    convention = Convention(rng.random() < 0.5, rng.random() < 0.5, rng.choice(lex.PREFIXES))
    request = say.name_request(noted if present else other, operation, data, phrasing)
    reply = say.function_name(convention if present else None, operation, data)
    return as_messages([Exchange(request, reply)], system=say.convention_note(noted, convention))


FACTORS: dict[str, Draw] = {
    "emotions": _about("mood"),
    "relationships": _about("sister"),
    "communication-style": _styled,
    "design": _role(("architect",), tuple(role for role in lex.ROLES if role != "architect")),
    "syntax-style": _convention,
    "engineering-behaviour": _role(FIXING, WRITING),
    **{f"style/{register}": _register(register) for register in lex.REGISTERS},
}
