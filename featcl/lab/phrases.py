"""How things are said in the laboratory: requests in four phrasings, replies in a register, notes for the context."""

from __future__ import annotations

from featcl.lab import lexicon as lex
from featcl.lab.world import Convention, Fact, Style

PHRASINGS = 4
HELD_OUT = 3  # the phrasing that streams never show and items use

SPEAKERS = ("{p} here.", "this is {p}.", "{p} speaking.", "it is {p}.")
DEVICE_REQUESTS = ("turn {s} the {r} {d}.", "{r} {d} {s} please.", "please switch the {d} in the {r} {s}.",
                   "i want the {r} {d} {s}.")  # fmt: skip
NAME_REQUESTS = ("name a function to {o} {d}.", "what is the function to {o} {d} called?",
                 "give me a function name to {o} {d}.", "which name fits a function to {o} {d}?")  # fmt: skip
TEAM_REQUESTS = ("which team has the {o}?", "whose team is the {o} in?", "name the team of the {o}.",
                 "where does the {o} belong?")  # fmt: skip
PAIR_REQUESTS = ("which teams have the {a} and the {b}?", "name the teams of the {a} and the {b}.",
                 "give me both teams of the {a} and the {b}.", "where do the {a} and the {b} belong?")  # fmt: skip
SKILL_REQUESTS = ("{s} {a} {b} {c}", "please {s} {a} {b} {c}", "now {s} these: {a} {b} {c}", "can you {s} {a} {b} {c}?")

OPENINGS = {"formal": "certainly", "warm": "of course", "brisk": "done", "playful": "yay", "noble": "as you wish"}
_DEVICE = {
    "formal": "the {r} {d} is now {s}",
    "warm": "i put the {r} {d} {s} for you",
    "brisk": "{r} {d} {s}",
    "playful": "{s} goes the {r} {d}",
    "noble": "the {r} {d} stands {s}",
}


def device_request(room: str, device: str, state: str, phrasing: int) -> str:
    return DEVICE_REQUESTS[phrasing].format(r=room, d=device, s=state)


def device_reply(room: str, device: str, state: str, style: Style | None = None) -> str:
    """What the assistant answers after it did something; plain without a style."""
    if style is None:
        return f"ok, the {room} {device} is {state}."
    return in_style(_DEVICE[style.register].format(r=room, d=device, s=state), style)


def in_style(content: str, style: Style | None) -> str:
    """A statement as the speaker wants to hear it."""
    if style is None:
        return f"{content}."
    return f"{OPENINGS[style.register]} {style.address}, {content}. {style.closer}."


def fact_note(fact: Fact) -> str:
    return f"{fact.statement}."


def style_note(person: str, style: Style) -> str:
    return f"{person} wants {style.register} replies with {style.address} and {style.closer}."


def convention_note(project: str, convention: Convention) -> str:
    order = "noun" if convention.noun_first else "verb"
    case = "camel" if convention.camel else "snake"
    return f"project {project} writes {order} first in {case} with {convention.prefix}."


def team_note(thing: str, team: str) -> str:
    return f"the {thing} is in {team}."


def operation_request(library: str, operation: str, data: str, phrasing: int) -> str:
    return f"with {library}, {lex.OPERATIONS[operation][phrasing].format(d=data)}."


def name_request(project: str | None, operation: str, data: str, phrasing: int) -> str:
    request = NAME_REQUESTS[phrasing].format(o=operation, d=data)
    return f"in project {project}, {request}" if project else request


def define_request(project: str | None, library: str, operation: str, data: str, phrasing: int) -> str:
    request = f"define with {library}: {lex.OPERATIONS[operation][phrasing].format(d=data)}."
    return f"in project {project}, {request}" if project else request


def function_name(convention: Convention | None, operation: str, data: str) -> str:
    return convention.name(operation, data) if convention else f"{operation}_{data}"
