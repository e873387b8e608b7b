"""The truths of the laboratory: complete, new, different between the worlds, and frozen.

The digests freeze what studies are read on. To refreeze, after a change that is meant and before any constrained arm
has run on the new worlds: run this file, put the digests that it prints into `PINNED`, and say so in the changelog.
"""

from __future__ import annotations

import pytest

from featcl.lab import lexicon as lex
from featcl.lab.streams import load_stream
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
        (one.conventions, two.conventions),
        (one.teams, two.teams),
        ({one.library}, {two.library}),
        (one.renamed, two.renamed),
        (one.skills, two.skills),
        (one.related, two.related),
    ):
        assert ours
        assert theirs
        assert not set(ours) & set(theirs)
    assert {*one.skills.values()}.isdisjoint(two.skills.values())
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
    assert first.prefix != second.prefix


def test_the_related_libraries_are_two_and_their_functions_differ(world: World) -> None:
    assert len({*world.related, world.library, *lex.LIBRARIES, *world.conventions}) == 2 + 1 + 3 + 2
    assert len(set(world.shared.values())) == len(world.shared) == 12


def test_no_new_name_is_a_name_already(world: World) -> None:
    renamed, functions = list(world.renamed.values()), list(world.functions.values())
    operations = [*world.skills]
    assert len({*renamed, *functions, *operations}) == len(renamed) + len(functions) + len(operations)
    assert set(renamed).isdisjoint(base_functions()["core"].values())
    for names in base_functions().values():
        assert len(set(names.values())) == len(lex.OPERATIONS)


def test_operations_put_every_word_somewhere_and_a_word_between(world: World) -> None:
    """The word between is what makes them neither copying nor reversal, whatever the order."""
    for rule in world.skills.values():
        assert sorted(rule.order) == [0, 1, 2, 3]
        assert rule.joiner not in (*lex.OBJECTS, *lex.PEOPLE, "")
        words = [f"w{i}" for i in range(4)]
        assert rule.apply(words) == f" {rule.joiner} ".join(words[i] for i in rule.order)


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
    "world development": "540525ce6b83a54a158706dc55672b4426aa61625ab24913f38d0e7ecdc1390e",
    "world unseen": "5a5b16413840cc4f2263cf9b596b32f2f8c978beb1d9a444c673c59c08089afc",
    "lab/applications development": "c6bfca99634ea397cf16794616b563f4aea06cedaff1be4d713b68920a9ebd58",
    "lab/applications unseen": "f160f9f1ed0666dc12f1eb8197a503e8736c7a019e944c929780a446144c999c",
}


def test_digests_are_frozen() -> None:
    """The truths, and what the main stream teaches and asks of them."""
    found = {f"world {name}": make_world(name).digest for name in NAMES}  # type: ignore[arg-type]
    found |= {f"lab/applications {name}": load_stream(world=name).digest for name in NAMES}  # type: ignore[arg-type]
    assert found == PINNED, f"see the head of this file; now: {found}"
