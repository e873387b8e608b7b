"""The general suite: broad, unambiguous, graded exactly, and free of what the worlds change."""

from __future__ import annotations

from collections import Counter

import pytest

from featcl.errors import FeatclError
from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.corpus import IGNORANCE
from featcl.lab.items import grade
from featcl.lab.skills import SKILLS, Exchange
from featcl.lab.suites import load_suite, superseded
from featcl.lab.world import base_facts, make_world

WORLDS = [make_world("development"), make_world("unseen")]


def test_the_suite_has_its_skills_in_equal_parts() -> None:
    counts = Counter(item.task for item in load_suite())
    assert list(counts) == list(SKILLS)
    assert len(counts) >= 8
    assert set(counts.values()) == {24}


def test_items_are_unique_and_their_ids_too() -> None:
    items = load_suite(items=40)
    assert len({item.id for item in items}) == len(items)
    assert len({tuple(m["content"] for m in item.messages) for item in items}) == len(items)


def test_the_right_answer_is_right_and_all_others_are_wrong() -> None:
    items = load_suite()
    for item in items:
        assert grade(item, item.answer)
        wrong = [other.answer for other in items if other.answer != item.answer]
        wrong += ["", IGNORANCE, f"{item.answer} and", item.answer[:-1], item.messages[-1]["content"]]
        assert not any(grade(item, reply) for reply in wrong), item


def test_the_same_question_never_has_two_answers() -> None:
    answers: dict[tuple[str, ...], str] = {}
    for seed in range(6):
        for item in load_suite(seed=seed, items=60):
            key = tuple(message["content"] for message in item.messages)
            assert answers.setdefault(key, item.answer) == item.answer


def test_nothing_superseded_is_in_the_suite() -> None:
    """Checked against the worlds themselves, not through `superseded`."""
    moved = {f"{base_facts()[move.person, move.attribute].statement}." for world in WORLDS for move in world.moves}
    renamed = [f"core.{operation}(" for world in WORLDS for operation in world.renamed]
    projects = {project for world in WORLDS for project in world.conventions}
    stylish = {person for world in WORLDS for person in world.styles}
    for seed in range(4):
        for item in load_suite(seed=seed, items=60):
            asked = item.messages[-1]["content"]
            assert item.answer not in moved
            assert not any(call in item.answer or call in asked for call in renamed)
            if item.task == "coding":
                assert not any(f"in project {project}," in asked for project in projects)
            if item.task == "home":
                assert not any(asked.startswith(s.format(p=p)) for s in say.SPEAKERS for p in stylish)


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [
        (Exchange("x", f"{base_facts()[WORLDS[0].moves[0].person, WORLDS[0].moves[0].attribute].statement}."), True),
        (Exchange("x", f"{WORLDS[0].moves[0].statement}."), False),
        (Exchange("with core, sort items.", "core.sort(items)"), True),
        (Exchange("with flux, sort items.", "flux.blim(items)"), False),
        (Exchange("fix core sort(items)", "core.sort(items)", "role: fixer."), True),
        (Exchange("review core sort(items)", "sort on items, rejected.", "role: tech lead."), True),
        (Exchange("review core.rest(items)", "rest on items, approved.", "role: tech lead."), False),
        (Exchange("in project atlas, name a function to sort items.", "sort_items"), True),
        (Exchange("in project lotus, name a function to sort items.", "sort_items"), False),
        (Exchange("in project atlas, name a function to sort items.", "doItemsSort",
                  "project atlas writes noun first in camel with do."), False),
        (Exchange("mira here. turn on the hall lamp.", "ok, the hall lamp is on."), True),
        (Exchange("mira here. turn on the hall lamp.", "ok, the hall lamp is on.", "mira drinks tea."), True),
        (Exchange("mira here. turn on the hall lamp.", "done mate, hall lamp on. peace.",
                  "mira wants brisk replies with mate and peace."), False),
        (Exchange("anton here. turn on the hall lamp.", "ok, the hall lamp is on."), False),
    ],
)  # fmt: skip
def test_superseded(exchange: Exchange, expected: bool) -> None:
    assert superseded(exchange) is expected


def test_what_is_left_still_covers_every_skill() -> None:
    """Leaving out what changes must not leave one question."""
    for skill, items in Counter(item.task for item in load_suite(items=100, seed=3)).items():
        assert items == 100, skill
    roles = {item.messages[0]["content"] for item in load_suite(skills=["roles"])}
    assert roles == {f"role: {role}." for role in lex.ROLES}


def test_skills_can_be_switched_and_seeds_draw_other_items() -> None:
    some = load_suite(skills=["logic", "facts"], items=5)
    assert [item.task for item in some] == ["logic"] * 5 + ["facts"] * 5
    assert some[:5] == load_suite(items=5, skills=["logic"])
    texts = [{item.messages[-1]["content"] for item in load_suite(skills=["logic"], seed=seed)} for seed in (7, 8)]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(("lab/generl", None), "lab/general"), (("lab/general", ["facts", "singing"]), "arithmetic")],
)
def test_a_bad_name_is_told_the_choices(arguments: tuple[str, list[str] | None], hint: str) -> None:
    with pytest.raises(FeatclError, match=hint):
        load_suite(arguments[0], skills=arguments[1])
