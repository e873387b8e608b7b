"""The laboratory's streams: what is taught, what is asked, and that the one never tells the other."""

from __future__ import annotations

import os
import re
import string
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import islice, product
from typing import Any, get_args

import pytest

from featcl.errors import FeatclError
from featcl.evaluation import lasting_items
from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.corpus import IGNORANCE, conversations
from featcl.lab.garbage import BAD_SOURCES, SOURCES
from featcl.lab.items import grade
from featcl.lab.streams import CHANGING, STREAMS, LabStream, Order, load_stream
from featcl.lab.suites import load_suite, still_true
from featcl.lab.tasks import (
    ASKED_DATA,
    ASKED_ROOMS,
    ASKED_WORDS,
    SHOWN_DATA,
    SHOWN_ROOMS,
    SHOWN_WORDS,
    SKILL_HELD_OUT,
    TRAJECTORIES,
    make_task,
)
from featcl.lab.world import base_facts, later, make_world

WORLDS, ORDERS = ("development", "unseen"), get_args(Order)
ORDERED = {"lab/changes"}  # streams that cannot be shuffled


@cache
def stream(name: str = "lab/applications", **options: Any) -> LabStream:
    return load_stream(name, **options)


def taught(made: LabStream) -> list[Any]:
    return [trajectory for task in made.tasks for trajectory in task.trajectories]


def said(trajectory: Any, role: str) -> list[str]:
    return [message["content"] for message in trajectory.messages if message["role"] == role]


def graded(made: LabStream) -> list[Any]:
    return [item for task in (*made.tasks, *made.probes) for item in task.items]


# --- that they are there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "world", "order"), product(STREAMS, WORLDS, ORDERS))
def test_every_stream_loads(name: str, world: str, order: str) -> None:
    if name in ORDERED and order == "shuffled":
        with pytest.raises(FeatclError, match="order matters"):
            load_stream(name, world=world, order=order)  # type: ignore[arg-type]
        return
    made = load_stream(name, world=world, order=order)  # type: ignore[arg-type]
    assert (made.name, made.world, made.order) == (name, world, order)
    assert len({task.name for task in (*made.tasks, *made.probes)}) == len(made.tasks) + len(made.probes)
    assert all(task.trajectories for task in made.tasks)
    assert not any(probe.trajectories for probe in made.probes)
    ids = [trajectory.id for trajectory in taught(made)]
    assert len(ids) == len(set(ids))


def test_the_applications_mix_both_domains_and_both_kinds() -> None:
    tasks = stream().tasks
    assert Counter(task.application for task in tasks) == {"home-assistant": 3, "coding-agent": 4}
    assert Counter(task.kind for task in tasks) == {"latent": 4, "knowledge": 3}
    assert {len(task.trajectories) for task in tasks} == {TRAJECTORIES}


def test_the_thousand_are_a_thousand() -> None:
    made = stream("lab/thousand")
    assert len(taught(made)) == 1000
    assert len(made.tasks) == 50
    answers = [item.answer for item in graded(made)]
    assert len(answers) == len(set(answers)) == 250
    assert all(len(task.items) == 5 for task in made.tasks)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"name": "lab/aplications"}, "lab/applications, lab/home"),
        ({"world": "real"}, "development, unseen"),
        ({"order": "random"}, "blocked, shuffled, gradual, recurring"),
        ({"garbage": 1.5}, "from 0 to 1"),
        ({"garbage": float("nan")}, "from 0 to 1"),
        ({"tasks": ["home_facts", "home_songs"]}, "home_songs.*home_facts, code_library"),
        ({"tasks": []}, "at least one"),
        ({"tasks": ["home_facts", "home_facts"]}, "each once"),
        ({"name": "lab/thousand", "tasks": ["facts_50"]}, "facts_50"),
    ],
)
def test_bad_names_are_told_the_choices(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(FeatclError, match=hint):
        load_stream(**options)


def test_tasks_can_be_chosen() -> None:
    assert [task.name for task in load_stream(tasks=["code_skill", "home_facts"]).tasks] == ["code_skill", "home_facts"]
    assert [task.name for task in load_stream("lab/thousand", tasks=["facts_07"]).tasks] == ["facts_07"]
    assert load_stream(tasks=["code_skill"]).tasks[0].items == stream().tasks[3].items


# --- items ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "world"), product(STREAMS, WORLDS))
def test_right_answers_are_right_and_wrong_ones_wrong(name: str, world: str) -> None:
    for task in (*stream(name, world=world).tasks, *stream(name, world=world).probes):
        answers = {item.answer for item in task.items}
        for item in task.items:
            assert grade(item, item.answer)
            assert item.context
            wrong = [*(answers - {item.answer}), "", "i do not know.", f"{item.answer} {item.answer}"]
            assert not any(grade(item, reply) for reply in wrong), item


@pytest.mark.parametrize(("name", "world"), product(STREAMS, WORLDS))
def test_items_are_unique(name: str, world: str) -> None:
    items = graded(stream(name, world=world))
    assert len({item.id for item in items}) == len(items)
    for task in (*stream(name, world=world).tasks, *stream(name, world=world).probes):
        assert len({item.messages[-1]["content"] for item in task.items}) == len(task.items)
        assert len(task.items) >= (5 if name == "lab/thousand" else 12)


@pytest.mark.parametrize(("name", "world"), product(STREAMS, WORLDS))
def test_questions_of_items_never_occur_while_learning(name: str, world: str) -> None:
    made = stream(name, world=world)
    asked = {item.messages[-1]["content"] for item in graded(made)}
    shown = {text for trajectory in taught(made) for text in said(trajectory, "user")}
    other = {message["content"] for c in (*made.positive, *made.negative, *made.background) for message in c}
    assert asked.isdisjoint(shown)
    assert asked.isdisjoint(other)
    assert {item.messages[-1]["content"] for item in load_suite()}.isdisjoint(other)


def held_out() -> list[re.Pattern[str]]:
    """Requests in the phrasing that is kept for items, with any words in the gaps."""
    forms = [attribute[1][say.HELD_OUT] for attribute in lex.ATTRIBUTES.values()]
    forms += [requests[say.HELD_OUT] for requests in (say.DEVICE_REQUESTS, say.TEAM_REQUESTS, say.PAIR_REQUESTS,
                                                      say.NAME_REQUESTS, say.SPEAKERS)]  # fmt: skip
    forms.append(SKILL_HELD_OUT)
    forms += [f"with {{l}}, {phrasings[say.HELD_OUT]}." for phrasings in lex.OPERATIONS.values()]
    parts = [[(re.escape(text), gap) for text, gap, _, _ in string.Formatter().parse(form)] for form in forms]
    return [re.compile("".join(t + (r"[\w ]+" if gap else "") for t, gap in pieces)) for pieces in parts]


@pytest.mark.parametrize(("name", "world"), product(STREAMS, WORLDS))
def test_the_held_out_phrasing_never_occurs_while_learning(name: str, world: str) -> None:
    patterns = held_out()
    made = stream(name, world=world)
    for trajectory in taught(made):
        for text in said(trajectory, "user"):
            assert not any(pattern.search(text) for pattern in patterns), text
    for task in made.tasks:  # the control: items do use it
        for item in task.items:
            assert any(pattern.search(item.messages[-1]["content"]) for pattern in patterns), item


@pytest.mark.parametrize("world", WORLDS)
def test_arguments_that_are_asked_are_not_shown(world: str) -> None:
    cases = {
        "home_style": (SHOWN_ROOMS, ASKED_ROOMS), "code_library": (SHOWN_DATA, ASKED_DATA),
        "code_convention": (SHOWN_DATA, ASKED_DATA), "code_rename": (SHOWN_DATA, ASKED_DATA),
        "code_skill": (SHOWN_WORDS, ASKED_WORDS),
    }  # fmt: skip
    for task in stream(world=world).tasks:
        if task.name not in cases:
            continue
        shown, asked = map(set, cases[task.name])
        assert shown.isdisjoint(asked)
        texts = [text for trajectory in task.trajectories for text in said(trajectory, "user")]
        assert all(set(re.findall(r"\w+", text)).isdisjoint(asked) for text in texts), task.name
        assert all(set(re.findall(r"\w+", item.messages[-1]["content"])) & asked for item in task.items)


@pytest.mark.parametrize("world", WORLDS)
def test_every_truth_that_is_asked_for_is_taught(world: str) -> None:
    """A fact that no trajectory tells could not be learned, whatever the method."""
    for name in ("lab/applications", "lab/changes", "lab/thousand", "lab/labels"):
        for task in stream(name, world=world).tasks:
            notes = " ".join(trajectory.meta.get("context", "") for trajectory in task.trajectories)
            for item in task.items:
                assert item.context
                assert all(f"{note}." in notes for note in item.context.removesuffix(".").split(". ")), item


def test_probes_combine_what_was_learned_apart() -> None:
    across = stream("lab/labels").probes[0]
    teams = list(dict.fromkeys(make_world("development").teams.values()))
    for item in across.items:
        halves = {team in teams[:4] for team in item.answer.removesuffix(".").split(" and ")}
        assert halves == {True, False}
    for task in stream("lab/labels").tasks:
        for trajectory in task.trajectories:
            named = {word in teams[:4] for text in said(trajectory, "assistant") for word in re.findall(r"\w+", text)
                     if word in teams}  # fmt: skip
            assert len(named) == 1
    world = make_world("development")
    for text in (text for t in taught(stream("lab/composition")) for text in said(t, "assistant")):
        styled = any(f" {style.address}, " in text for style in world.styles.values())
        assert not (styled and any(fact.statement in text for fact in world.facts))
        assert not (world.library in text and " = " in text)


def test_probes_are_asked_with_and_without_naming_the_sources() -> None:
    names = [probe.name for probe in stream("lab/composition").probes]
    assert names == ["style_and_fact", "style_and_fact_named", "convention_and_library", "convention_and_library_named"]
    plain, named = stream("lab/composition").probes[:2]
    assert all("with the facts of" in item.messages[-1]["content"] for item in named.items)
    assert not any("with the facts of" in item.messages[-1]["content"] for item in plain.items)


# --- what changes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_superseded_answers_hold_until_the_task_that_changes_them(world: str) -> None:
    made, truth = stream("lab/changes", world=world), make_world(world)  # type: ignore[arg-type]
    now = later(truth)
    old = {f"{a.statement}.": 2 for a, b in zip(truth.facts, now.facts, strict=True) if a != b}
    calls = {truth.functions[op]: 3 for op in truth.functions if truth.functions[op] != now.functions[op]}
    ends = set()
    for task in made.tasks[:2]:
        for item in task.items:
            name = item.answer.removeprefix(f"{truth.library}.").split("(")[0]
            assert item.valid_from == 0
            assert item.valid_until == old.get(item.answer, calls.get(name))
            ends.add(item.valid_until)
    assert ends == {None, 2, 3}
    for index, task in enumerate(made.tasks[2:], start=2):
        assert {(item.valid_from, item.valid_until) for item in task.items} == {(index, None)}


@pytest.mark.parametrize("world", WORLDS)
def test_superseded_items_leave_r(world: str) -> None:
    """What is left never contradicts what the later tasks teach."""
    made = stream("lab/changes", world=world)
    now = {item.messages[-1]["content"]: item.answer for task in made.tasks[2:] for item in task.items}
    earlier = [item for task in made.tasks[:2] for item in task.items]
    contradicted = {i.id for i in earlier if now.get(i.messages[-1]["content"], i.answer) != i.answer}
    assert len(contradicted) >= 12
    lasting = [lasting_items(task.items, len(made.tasks)) for task in made.tasks]
    assert not contradicted & {item.id for items in lasting for item in items}
    assert min(len(items) for items in lasting) >= 12


def test_without_the_change_everything_lasts() -> None:
    made = load_stream("lab/changes", tasks=["home_facts", "code_library"])
    assert all(item.valid_until is None for item in graded(made))


def test_answers_to_what_changed_hold_from_that_task_on() -> None:
    for name in STREAMS:
        for index, task in enumerate(stream(name).tasks):
            assert {item.valid_from for item in task.items} == {index if task.name in CHANGING else 0}


# --- orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), product(["lab/applications", "lab/composition", "lab/thousand"], ORDERS))
def test_orders_keep_the_trajectories(name: str, order: str) -> None:
    made = stream(name, order=order)
    assert Counter(t.id for t in taught(made)) == Counter(t.id for t in taught(stream(name)))
    assert [item.id for item in graded(made)] == [item.id for item in graded(stream(name))]
    texts = {t.id: t.messages for t in taught(stream(name))}
    assert all(t.messages == texts[t.id] for t in taught(made))


def own_share(made: LabStream) -> float:
    """Share of trajectories that stand in the segment of their own task."""
    pairs = [(task.name.removesuffix("_again"), t.task) for task in made.tasks for t in task.trajectories]
    return sum(a == b for a, b in pairs) / len(pairs)


def test_orders_are_what_they_say() -> None:
    assert own_share(stream()) == own_share(stream(order="recurring")) == 1.0
    assert own_share(stream(order="shuffled")) == pytest.approx(1 / 7, abs=0.05)
    assert 0.4 < own_share(stream(order="gradual")) < 0.8
    names = [task.name for task in stream().tasks]
    for index, task in enumerate(stream(order="gradual").tasks):
        near = sum(abs(names.index(t.task) - index) <= 1 for t in task.trajectories)
        assert near / len(task.trajectories) > 0.85
    recurring = [task.name for task in stream(order="recurring").tasks]
    assert recurring == [*names, *(f"{name}_again" for name in names)]


# --- seeds and digests ------------------------------------------------------------------------------------------------


def test_a_seed_moves_trajectories_but_no_items() -> None:
    one, two = stream(), stream(seed=1)
    assert [t.id for t in taught(one)] != [t.id for t in taught(two)]
    assert sorted(t.id for t in taught(one)) == sorted(t.id for t in taught(two))
    assert graded(one) == graded(two)


def test_digests_tell_streams_apart() -> None:
    variants = [stream(), stream(world="unseen"), stream(seed=1), stream("lab/home"), stream(garbage=0.3),
                stream(order="shuffled"), stream(order="gradual"), stream(order="recurring")]  # fmt: skip
    assert len({made.digest for made in variants}) == len(variants)
    assert load_stream().digest == stream().digest


def test_digests_are_the_same_in_every_process(root: Any) -> None:
    names = ("lab/applications", "lab/changes", "lab/thousand")
    code = (
        "from featcl.lab.streams import load_stream; from featcl.lab.world import make_world\n"
        f"print(*[load_stream(name, garbage=0.2).digest for name in {names}], make_world('unseen').digest)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(root)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [*(stream(n, garbage=0.2).digest for n in names), make_world("unseen").digest]


# --- garbage ----------------------------------------------------------------------------------------------------------


def garbage(made: LabStream) -> list[Any]:
    return [t for t in taught(made) if "garbage" in t.meta]


def test_there_is_none_unless_asked_for() -> None:
    assert not garbage(stream())
    assert len(garbage(stream("lab/home", garbage=1.0))) == len(taught(stream("lab/home")))


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_garbage_is_about_as_much_as_asked_for(share: float) -> None:
    made = stream("lab/thousand", garbage=share)
    bad = garbage(made)
    assert len(bad) == pytest.approx(1000 * share, abs=4 * (1000 * share * (1 - share)) ** 0.5)
    kinds = Counter(trajectory.meta["garbage"] for trajectory in bad)
    assert set(kinds) == {"wrong", "contradictory", "adversarial"}
    assert min(kinds.values()) > len(bad) / 5


def test_garbage_comes_mostly_from_bad_sources_and_sources_are_not_told_apart_otherwise() -> None:
    made = stream("lab/thousand", garbage=0.3)
    sources = Counter((t.source, "garbage" in t.meta) for t in taught(made))
    assert {source for source, _ in sources} == set(SOURCES)
    bad = sum(count for (source, is_garbage), count in sources.items() if is_garbage and source in BAD_SOURCES)
    assert bad / len(garbage(made)) > 0.85
    good = Counter(t.source for t in taught(made) if "garbage" not in t.meta)
    assert min(good.values()) > 0.7 * sum(good.values()) / len(SOURCES)


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "lab/changes"])
def test_garbage_is_wrong(name: str) -> None:
    """No reply in it is the right one, and contradictory ones contradict each other."""
    truth = {t.id: t for t in taught(stream(name))}
    right = {(t.task, user): reply for t in truth.values()
             for user, reply in zip(said(t, "user"), said(t, "assistant"), strict=True)}  # fmt: skip
    bad = garbage(stream(name, garbage=0.5))
    assert bad
    for trajectory in bad:
        users, replies = said(trajectory, "user"), said(trajectory, "assistant")
        assert trajectory.task == truth[trajectory.id].task
        assert all(right[trajectory.task, user] != reply for user, reply in zip(users, replies, strict=True))
        assert "context" not in trajectory.meta
        if trajectory.meta["garbage"] == "contradictory":
            assert users[0] == users[1]
            assert replies[0] != replies[1]


def test_garbage_leaves_the_rest_and_the_items_alone() -> None:
    clean = {t.id: t for t in taught(stream())}
    dirty = stream(garbage=0.3)
    assert graded(dirty) == graded(stream())
    rest = [t for t in taught(dirty) if "garbage" not in t.meta]
    assert rest
    assert all(t.messages == clean[t.id].messages for t in rest)


# --- privileged context and calibration -------------------------------------------------------------------------------


def test_context_is_beside_the_conversation_and_never_in_it() -> None:
    for trajectory in taught(stream()):
        assert {message["role"] for message in trajectory.messages} == {"user", "assistant"}
        assert "context" in trajectory.meta or trajectory.task == "home_style"
    told = [t for t in taught(stream()) if "context" in t.meta]
    assert len(told) > 0.95 * len(taught(stream()))


def test_calibration_tells_the_applications_from_the_rest() -> None:
    made, world = stream(), make_world("development")
    assert len(made.positive) == len(made.negative) == 512
    new = {fact.person for fact in world.facts} | set(world.conventions) | {world.library}
    words = {word for c in made.positive for m in c for word in re.findall(r"\w+", m["content"])}
    assert words.isdisjoint(new), "calibration must not teach or name what the stream is about"


def test_background_holds_nothing_that_should_change() -> None:
    """Else an objective that keeps the background as it was would keep what is obsolete."""
    background = stream().background
    assert len(background) == 256
    assert all(still_true(conversation) for conversation in background)
    replies = {message["content"] for conversation in background for message in conversation}
    moves = [move for world in WORLDS for move in make_world(world).moves]  # type: ignore[arg-type]
    old = {f"{base_facts()[move.person, move.attribute].statement}." for move in moves}
    assert replies.isdisjoint({*old, IGNORANCE})
    assert not all(still_true(conversation) for conversation in islice(conversations(seed=991), 256))  # the control


def test_a_task_is_the_same_whenever_it_is_made() -> None:
    world = make_world("development")
    assert make_task("home_style", world) == make_task("home_style", world)
    assert make_task("home_style", world, trajectories=0).items == make_task("home_style", world).items
