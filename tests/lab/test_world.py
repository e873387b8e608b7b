"""The truths of the laboratory: complete, new, different between the worlds, and frozen.

The digests freeze what studies are read on. To refreeze, after a change that is meant and before any constrained arm
has run on the new worlds: run this file, read the digests it prints, put them here, and say so in the changelog.
"""

from __future__ import annotations

import pytest

from featcl.lab import lexicon as lex
from featcl.lab.world import World, base_facts, base_functions, later, make_world

NAMES = ("development", "unseen")


@pytest.fixture(params=NAMES)
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


def test_every_word_of_the_lexicon_stands_for_one_thing() -> None:
    groups = (lex.PEOPLE, lex.OBJECTS, lex.TEAMS, lex.NONCE, lex.PROJECTS, lex.LIBRARIES, lex.DATA, lex.DEVICES,
              lex.ROOMS)  # fmt: skip
    words = [word for group in groups for word in group]
    assert sorted(words) == sorted(set(words))


def test_the_worlds_share_nothing_that_is_asked_for() -> None:
    one, two = (make_world(name) for name in NAMES)
    people = [{fact.person for fact in w.facts} | {fact.person for fact in w.moves} | set(w.styles) for w in (one, two)]
    for ours, theirs in (
        people,
        ({*one.conventions, *one.related}, {*two.conventions, *two.related}),
        (one.teams, two.teams),
        ({one.library}, {two.library}),
        (one.renamed, two.renamed),
        ({one.skill}, {two.skill}),
    ):
        assert ours
        assert theirs
        assert not set(ours) & set(theirs)
    assert one.order != two.order
    assert one.digest != two.digest


def test_facts_are_about_people_the_base_model_knows_nothing_of(world: World) -> None:
    assert {fact.person for fact in world.facts}.isdisjoint(lex.BASE_PEOPLE)
    assert {person for person, _ in base_facts()} == set(lex.BASE_PEOPLE)
    assert len({(fact.person, fact.attribute) for fact in world.facts}) == len(world.facts) == 24


def test_moves_differ_from_what_the_base_model_knows(world: World) -> None:
    assert len({(move.person, move.attribute) for move in world.moves}) == len(world.moves) == 12
    assert all(move.value != base_facts()[move.person, move.attribute].value for move in world.moves)


def test_values_are_ones_the_attribute_has(world: World) -> None:
    for fact in (*world.facts, *world.moves, *later(world).facts, *base_facts().values()):
        assert fact.value in lex.ATTRIBUTES[fact.attribute][0]
        assert fact.value != fact.person


def test_neighbours_want_opposite_evenings(world: World) -> None:
    opposites = [{"bright", "dim"}, {"warm", "cool"}, {"quiet", "lively"}]
    evenings = [fact.value for fact in world.facts if fact.attribute == "evening"]
    assert [set(evenings[i : i + 2]) for i in range(0, 6, 2)] == opposites


def test_styles_and_conventions_can_be_told_apart(world: World) -> None:
    for part in ("register", "address", "closer"):
        assert len({getattr(style, part) for style in world.styles.values()}) == len(world.styles) == 4
    first, second = world.conventions.values()
    assert first.noun_first != second.noun_first
    assert len({c.prefix for c in (*world.conventions.values(), *world.related.values())}) == 3
    assert len(set(world.related.values())) == 1
    assert len(world.related) == 2


def test_no_new_name_is_a_name_already(world: World) -> None:
    renamed, functions = list(world.renamed.values()), list(world.functions.values())
    assert len({*renamed, *functions, world.skill}) == len(renamed) + len(functions) + 1
    assert set(renamed).isdisjoint(base_functions()["core"].values())
    for names in base_functions().values():
        assert len(set(names.values())) == len(lex.OPERATIONS)


def test_the_skill_is_neither_copying_nor_reversal(world: World) -> None:
    assert world.order not in ((0, 1, 2), (2, 1, 0))
    assert set(world.order) == {0, 1, 2}


def test_teams_are_even_and_taught_in_two_halves(world: World) -> None:
    teams = list(world.teams.values())
    assert [teams.count(team) for team in dict.fromkeys(teams)] == [2] * 8
    assert set(teams[:8]).isdisjoint(teams[8:])


def test_half_of_the_new_truths_change_later(world: World) -> None:
    now = later(world)
    assert [old != new for old, new in zip(world.facts, now.facts, strict=True)] == [False, True] * 12
    changed = {operation for operation, name in now.functions.items() if world.functions[operation] != name}
    assert len(changed) == 6
    assert len(set(now.functions.values())) == 12
    assert not {now.functions[operation] for operation in changed} & set(world.functions.values())
    assert now == later(world)


PINNED = {
    "development": "",
    "unseen": "",
}


def test_digests_are_frozen() -> None:
    assert {name: make_world(name).digest for name in NAMES} == PINNED
