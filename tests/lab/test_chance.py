"""Chance, measured: nobody is right more than one time in ten by a fixed reply, by another item's, or by form alone.

`form` is somebody who knows how an answer looks and which words may stand in it, but not the one thing that is asked.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest

from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.skills import SKILLS, Exchange
from featcl.lab.suites import superseded
from featcl.lab.tasks import CHANGES, TASKS
from featcl.lab.world import Convention, Fact, Style, make_world

ITEMS, CHANCE = 2000, 0.10
PLANS = TASKS | CHANGES
Guess = Callable[[random.Random, Exchange], str]


@cache
def skill_items(name: str) -> list[Exchange]:
    rng = random.Random(f"chance/{name}")
    made: list[Exchange] = []
    while len(made) < ITEMS:
        exchange = SKILLS[name](rng)
        if not superseded(exchange):
            made.append(exchange)
    return made


@cache
def task_items(name: str, world: str) -> list[Exchange]:
    rng = random.Random(f"chance/{name}/{world}")
    truth = make_world(world)  # type: ignore[arg-type]
    return [PLANS[name].ask(truth, rng, False).exchange for _ in range(ITEMS)]


def constant(items: list[Exchange]) -> float:
    """Accuracy of the best fixed reply."""
    return Counter(item.assistant for item in items).most_common(1)[0][1] / len(items)


def another(items: list[Exchange]) -> float:
    """Accuracy of the reply to a random other item."""
    replies = random.Random(0).sample([item.assistant for item in items], len(items))
    return sum(reply == item.assistant for reply, item in zip(replies, items, strict=True)) / len(items)


def by_form(items: list[Exchange], guess: Guess) -> float:
    rng = random.Random(1)
    return sum(guess(rng, item) == item.assistant for item in items) / len(items)


# --- form -----------------------------------------------------------------------------------------------------------


def any_order(rng: random.Random, item: Exchange) -> str:
    """The right words in some order."""
    words = item.assistant.split()
    return " ".join(rng.sample(words, len(words)))


def any_joined_order(rng: random.Random, item: Exchange) -> str:
    """The right words in some order, with the right word between."""
    first, joiner, *_ = item.assistant.split()
    words = [first, *item.assistant.split()[2::2]]
    return f" {joiner} ".join(rng.sample(words, len(words)))


def some_words(rng: random.Random, item: Exchange) -> str:
    """Two to four of the request's last words."""
    return " ".join(rng.choices(item.user.split()[1:], k=rng.randint(2, 4)))


def two_of(sentences: Callable[[Exchange], list[str]]) -> Guess:
    return lambda rng, item: " and ".join(rng.sample(sentences(item), 2)) + "."


def notes(item: Exchange) -> list[str]:
    return item.user.split(" tell me of ")[0].removesuffix(".").split(". ")


def logic(rng: random.Random, item: Exchange) -> str:
    """Both things with their signs, each with some action that is named."""
    sentences = item.user.split(". ")
    actions = [sentence.split(" means ")[1] for sentence in sentences if " means " in sentence]
    things = [(sentence, sentence.split(" is ")[1]) for sentence in sentences if " is " in sentence]
    chosen = rng.sample(actions, 2)
    pairs = zip(things, chosen, strict=True)
    return " and ".join(f"{thing} and {sign} means {action}" for (thing, sign), action in pairs) + "."


def any_value(rng: random.Random, item: Exchange) -> str:
    """The right person and attribute with some value."""
    person, value = item.assistant.split()[0], item.assistant.removesuffix(".").split()[-1]
    for attribute, (values, _, _) in lex.ATTRIBUTES.items():
        if item.assistant == f"{Fact(person, attribute, value).statement}.":
            return f"{Fact(person, attribute, rng.choice(values)).statement}."
    raise AssertionError(item)


def any_function(rng: random.Random, item: Exchange) -> str:
    """The right library and data with some of the made-up names."""
    library, rest = item.assistant.split(".")
    return f"{library}.{rng.choice(lex.NONCE)}({rest.split('(')[1]}"


DEVICE_REQUESTS = {
    say.device_request(room, device, state, say.HELD_OUT): (room, device, state)
    for room in lex.ROOMS for device in lex.DEVICES for state in lex.STATES
}  # fmt: skip


def any_style(rng: random.Random, item: Exchange) -> str:
    style = Style(*(rng.choice(words) for words in (lex.REGISTERS, lex.ADDRESSES, lex.CLOSERS)))
    return say.device_reply(*DEVICE_REQUESTS[item.user.split(". ", 1)[1]], style)


def any_name(rng: random.Random, item: Exchange) -> str:
    convention = Convention(rng.random() < 0.5, rng.random() < 0.5, rng.choice(lex.PREFIXES))
    operation, data = item.user.removesuffix("?").split()[-2:]
    return convention.name(operation, data)


def known_teams(rng: random.Random, item: Exchange) -> str:
    """Somebody who knows all teams, and which half of them either object is in, but no more."""
    for world in (make_world("development"), make_world("unseen")):
        teams = list(dict.fromkeys(world.teams.values()))
        answer = item.assistant.removesuffix(".").split(" and ")
        if set(answer) <= set(teams) and any(thing in item.user for thing in world.teams):
            halves = [teams[:4] if team in teams[:4] else teams[4:] for team in answer]
            return " and ".join(rng.choice(half) for half in halves) + "."
    raise AssertionError(item)


SKILL_FORMS: dict[str, Guess] = {
    "facts": any_value,
    "copying": any_order,
    "reversal": any_order,
    "instructions": some_words,
    "reading": two_of(notes),
    "logic": logic,
    "arithmetic": lambda rng, item: f"it is {rng.randrange(39)}.",
}
TASK_FORMS: dict[str, Guess] = {
    "home_facts": any_value,
    "home_moves": any_value,
    "facts_changed": any_value,
    "home_style": any_style,
    "code_library": any_function,
    "code_rename": any_function,
    "library_changed": any_function,
    "code_skill": any_joined_order,
    "code_convention": any_name,
    "related_first": any_function,
    "related_second": any_function,
    "labels_first": known_teams,
    "labels_last": known_teams,
    "labels_across": known_teams,
}


@pytest.mark.parametrize("name", SKILLS)
def test_chance_of_a_skill(name: str) -> None:
    items = skill_items(name)
    measured = {"constant": constant(items), "another": another(items)}
    if name in SKILL_FORMS:
        measured["form"] = by_form(items, SKILL_FORMS[name])
    print(name, measured)
    assert max(measured.values()) <= CHANCE, measured


@pytest.mark.parametrize("world", ["development", "unseen"])
@pytest.mark.parametrize("name", PLANS)
def test_chance_of_a_task(name: str, world: str) -> None:
    items = task_items(name, world)
    measured = {"constant": constant(items), "another": another(items)}
    if name in TASK_FORMS:
        measured["form"] = by_form(items, TASK_FORMS[name])
    print(name, world, measured)
    assert max(measured.values()) <= CHANCE, measured


def test_the_measure_finds_an_item_that_is_easy_to_guess() -> None:
    """The control: one of two labels, and a skill on three words in some order, are above the bound."""
    rng = random.Random(0)
    coins = [Exchange("which side?", rng.choice(("head.", "tail."))) for _ in range(ITEMS)]
    assert constant(coins) == pytest.approx(0.5, abs=0.05)
    assert another(coins) == pytest.approx(0.5, abs=0.05)
    triples = [Exchange("x", " ".join(rng.sample(lex.OBJECTS, 3))) for _ in range(ITEMS)]
    assert by_form(triples, any_order) == pytest.approx(1 / 6, abs=0.03)


def test_form_guessers_look_right() -> None:
    """Their replies have the words of a right answer, else they would measure nothing."""
    rng = random.Random(2)
    for name, guess in TASK_FORMS.items():
        items = task_items(name, "development")[:200]
        replies = [guess(rng, item) for item in items]
        lengths = {(len(reply.split()), reply[-1].isalpha()) for reply in replies}
        assert lengths & {(len(item.assistant.split()), item.assistant[-1].isalpha()) for item in items}, name
    assert by_form(task_items("home_facts", "development"), any_value) > 0.03
    assert by_form(skill_items("logic"), logic) > 0.05
    assert by_form(skill_items("reading"), two_of(notes)) > 0.05
