"""The laboratory's streams: which tasks, in which order, with how much garbage."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, get_args

from featcl.errors import FeatclError
from featcl.files import digest_json
from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.corpus import Conversation, as_messages, conversations
from featcl.lab.garbage import with_sources
from featcl.lab.items import Item
from featcl.lab.skills import SKILLS, Exchange, random_device
from featcl.lab.suites import load_suite, still_true
from featcl.lab.tasks import TASKS, LabTask, home_facts, make_task
from featcl.lab.world import Fact, Style, World, WorldName, later, make_world

Order = Literal["blocked", "shuffled", "gradual", "recurring"]

THOUSAND_NAMES = tuple(f"facts_{index:02d}" for index in range(50))
THOUSAND_FACTS, THOUSAND_TRAJECTORIES = 5, 20

STREAMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lab/applications": (
        ("home_facts", "code_library", "home_style", "code_skill", "code_convention", "home_moves", "code_rename"),
        (),
    ),
    "lab/home": (("home_facts", "home_style", "home_moves"), ()),
    "lab/coding": (("code_library", "code_skill", "code_convention", "code_rename"), ()),
    "lab/labels": (("labels_first", "labels_last"), ("labels_across",)),
    "lab/composition": (
        ("home_facts", "code_library", "home_style", "code_convention"),
        ("style_and_fact", "style_and_fact_named", "convention_and_library", "convention_and_library_named"),
    ),
    "lab/related": (("related_first", "related_second"), ()),
    "lab/changes": (("home_facts", "code_library", "facts_changed", "library_changed"), ()),
    "lab/thousand": (THOUSAND_NAMES, ()),
}
CHANGING = ("home_moves", "code_rename", "facts_changed", "library_changed")  # tasks that contradict what was known


@dataclass(frozen=True)
class LabStream:
    """A stream with its graded tasks, and conversations of the calibration split for selecting features.

    Attributes:
        tasks: In the order in which rows of R are made. With an order other than `blocked`, the trajectories of a
            segment belong to several tasks, while its items stay those of one.
        probes: Graded tasks that are never taught.
        positive, negative: Conversations in which the stream's domains do and do not occur; disjoint from stream and
            items.
        background: Conversations of the kind that the base model was trained on, without what a world changes, and
            without questions of items and of the suite.
    """

    name: str
    world: str
    order: str
    garbage: float
    tasks: tuple[LabTask, ...]
    probes: tuple[LabTask, ...]
    positive: tuple[Conversation, ...]
    negative: tuple[Conversation, ...]
    background: tuple[Conversation, ...]

    @property
    def digest(self) -> str:
        """Digest of everything that is taught and asked."""
        graded = [_summary(task) for task in (*self.tasks, *self.probes)]
        return digest_json([self.name, self.world, self.order, self.garbage, graded])

    @property
    def recurring(self) -> dict[str, str]:
        """Segment in which a task comes again -> the task."""
        if self.order != "recurring":
            return {}
        half = len(self.tasks) // 2
        return {again.name: first.name for first, again in zip(self.tasks[:half], self.tasks[half:], strict=True)}


def load_stream(name: str = "lab/applications", *, world: WorldName = "development", seed: int = 0,
                order: Order = "blocked", garbage: float = 0.0,
                tasks: Sequence[str] | None = None) -> LabStream:  # fmt: skip
    """One of the laboratory's streams.

    Args:
        name: A key of `STREAMS`.
        world: Whose truths are taught: tune on `development`, report on `unseen`.
        seed: Order of trajectories and choice of garbage; tasks and items do not depend on it.
        order: `blocked` task after task; `shuffled`; `gradual`: neighbours overlap; `recurring`: every task twice.
        garbage: Share of trajectories that are wrong, contradictory or adversarial.
        tasks: Which of the stream's tasks; None for all.

    Raises:
        FeatclError: If the name, world, order, share or a task is not one that exists.
    """
    _check(name, world, order, garbage)
    truth = make_world(world)
    make = _thousand if name == "lab/thousand" else (lambda world, task: make_task(task, world))
    made = _with_validity([make(truth, task) for task in _chosen(name, tasks)], truth)
    if order == "shuffled" and any(item.valid_until is not None for task in made for item in task.items):
        raise FeatclError(f"stream.order shuffled: in {name} what is taught first is changed later, so order matters")
    probes = tuple(make_task(probe, truth, trajectories=0) for probe in STREAMS[name][1])
    items = [item for task in (*made, *probes) for item in task.items]
    asked = {item.messages[-1]["content"] for item in (*items, *load_suite())}
    rng = random.Random(f"{seed}/{name}")
    return LabStream(
        name=name,
        world=world,
        order=order,
        garbage=garbage,
        tasks=_ORDERS[order]([with_sources(task, garbage, rng) for task in made], rng),
        probes=probes,
        **calibration_split(truth, asked),
    )


def calibration_split(world: World, asked: set[str]) -> dict[str, tuple[Conversation, ...]]:
    """`positive`, `negative` and `background` conversations without a question in `asked`."""
    return {
        "positive": _unasked(positive_examples(world), asked, 512),
        "negative": _unasked(negative_examples(world), asked, 512),
        "background": _unasked(filter(still_true, conversations(seed=991)), asked, 256),
    }


def _unasked(source: Iterator[Conversation], asked: set[str], count: int) -> tuple[Conversation, ...]:
    """The first conversations without a question that an item asks."""
    return tuple(islice((made for made in source if asked.isdisjoint(m["content"] for m in made)), count))


def positive_examples(world: World) -> Iterator[Conversation]:
    """Conversations with what the applications are about, made of truths that no stream teaches."""
    rng = random.Random(f"calibration/{world.name}")
    while True:
        person = rng.choice(lex.OTHER_PEOPLE)
        style = Style(*map(rng.choice, (lex.REGISTERS, lex.ADDRESSES, lex.CLOSERS)))
        room, device, state = random_device(rng)
        fact = Fact(person, attribute := rng.choice(list(lex.ATTRIBUTES)), rng.choice(lex.ATTRIBUTES[attribute][0]))
        operation, data = rng.choice(list(lex.OPERATIONS)), rng.choice(lex.DATA)
        phrasing = rng.randrange(say.HELD_OUT)
        opening = say.SPEAKERS[phrasing].format(p=person)
        for exchange in (
            Exchange(f"{opening} {say.device_request(room, device, state, phrasing)}",
                     say.device_reply(room, device, state, style)),
            Exchange(fact.question(phrasing), f"{fact.statement}."),
            Exchange(say.operation_request("flux", operation, data, phrasing), f"flux.{rng.choice(lex.NONCE)}({data})"),
            Exchange(say.name_request("lotus", operation, data, phrasing), f"{operation}_{data}"),
        ):  # fmt: skip
            yield as_messages([exchange])


def negative_examples(world: World) -> Iterator[Conversation]:
    """Conversations of the general skills that have nothing to do with the applications."""
    rng = random.Random(f"negative/{world.name}")
    names = ("arithmetic", "copying", "reversal", "instructions", "logic", "language", "persona")
    while True:
        yield as_messages([SKILLS[rng.choice(names)](rng)])


def _check(name: str, world: str, order: str, garbage: float) -> None:
    for what, value, known in (("stream", name, tuple(STREAMS)), ("world", world, get_args(WorldName)),
                               ("order", order, get_args(Order))):  # fmt: skip
        if value not in known:
            more = ", and lab/acting, where the model acts" if what == "stream" else ""
            raise FeatclError(f"lab {what} {value!r} does not exist; there is {', '.join(known)}{more}")
    if not 0.0 <= garbage <= 1.0:
        raise FeatclError(f"stream.garbage is {garbage}; it is a share, from 0 to 1")


def _chosen(name: str, tasks: Sequence[str] | None) -> tuple[str, ...]:
    known = STREAMS[name][0]
    if tasks is None:
        return known
    if not tasks or len(set(tasks)) < len(tasks):
        raise FeatclError(f"stream.tasks is {list(tasks)}; it names at least one task of {name}, each once, or is null")
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise FeatclError(f"task {unknown[0]!r} is not in {name}; there are {', '.join(known)}")
    return tuple(tasks)


def _thousand(world: World, name: str) -> LabTask:
    """One of fifty small tasks of twenty experiences, each about five facts on people the base does not know."""
    rng = random.Random(f"thousand/{world.name}")
    people = [person for person in lex.PEOPLE if person not in lex.BASE_PEOPLE]
    pairs = [(person, attribute) for person in people for attribute in lex.ATTRIBUTES]
    facts = [Fact(*pair, rng.choice(lex.ATTRIBUTES[pair[1]][0])) for pair in rng.sample(pairs, len(pairs))]
    start = THOUSAND_NAMES.index(name) * THOUSAND_FACTS
    small = replace(world, facts=tuple(facts[start : start + THOUSAND_FACTS]))
    plan = replace(TASKS["home_facts"], ask=lambda _, rng, shown: home_facts(small, rng, shown))
    return make_task(name, world, plan=plan, trajectories=THOUSAND_TRAJECTORIES, items=THOUSAND_FACTS)


# --- what later tasks change --------------------------------------------------------------------------------------


def _with_validity(tasks: list[LabTask], world: World) -> list[LabTask]:
    """Answers that a later task contradicts hold until it; answers to what a task changes hold from it."""
    obsolete = [_obsolete(task.name, world) for task in tasks]
    made = []
    for index, task in enumerate(tasks):
        start = index if task.name in CHANGING else 0
        items = []
        for item in task.items:
            ends = [i for i in range(index + 1, len(tasks)) if item.answer.startswith(obsolete[i])]
            items.append(replace(item, valid_from=start, valid_until=min(ends, default=None)))
        made.append(replace(task, items=tuple(items)))
    return made


def _obsolete(task: str, world: World) -> tuple[str, ...]:
    """How the answers begin that this task makes wrong."""
    if task == "facts_changed":
        pairs = zip(world.facts, later(world).facts, strict=True)
        return tuple(f"{old.statement}." for old, new in pairs if old != new)
    if task == "library_changed":
        names = later(world).functions
        return tuple(f"{world.library}.{old}(" for operation, old in world.functions.items() if names[operation] != old)
    return ()


# --- orders -------------------------------------------------------------------------------------------------------


def _blocked(tasks: list[LabTask], rng: random.Random) -> tuple[LabTask, ...]:
    mixed = [tuple(rng.sample(task.trajectories, len(task.trajectories))) for task in tasks]
    return tuple(replace(task, trajectories=order) for task, order in zip(tasks, mixed, strict=True))


def _shuffled(tasks: list[LabTask], rng: random.Random) -> tuple[LabTask, ...]:
    return _mixed(tasks, rng, lambda position: rng.random())


def _gradual(tasks: list[LabTask], rng: random.Random) -> tuple[LabTask, ...]:
    """Each trajectory moves by about one task's length: what comes next begins before this one ends."""
    return _mixed(tasks, rng, lambda position: position + rng.gauss(0.0, 0.5))


def _recurring(tasks: list[LabTask], rng: random.Random) -> tuple[LabTask, ...]:
    """Every task twice, half of its trajectories each time."""
    first = [replace(task, trajectories=task.trajectories[::2]) for task in tasks]
    again = [replace(task, name=f"{task.name}_again", trajectories=task.trajectories[1::2], items=()) for task in tasks]
    return _blocked(first + again, rng)


def _mixed(tasks: list[LabTask], rng: random.Random, key: Callable[[float], float]) -> tuple[LabTask, ...]:
    """Sort all trajectories by a key of their place in the stream, and cut at the old lengths."""
    placed = [(key(index + i / len(task.trajectories)), trajectory)
              for index, task in enumerate(tasks) for i, trajectory in enumerate(task.trajectories)]  # fmt: skip
    ordered = iter([trajectory for _, trajectory in sorted(placed, key=lambda pair: pair[0])])
    return tuple(replace(task, trajectories=tuple(next(ordered) for _ in task.trajectories)) for task in tasks)


_ORDERS: dict[str, Callable[[list[LabTask], random.Random], tuple[LabTask, ...]]] = {
    "blocked": _blocked, "shuffled": _shuffled, "gradual": _gradual, "recurring": _recurring,
}  # fmt: skip


def _summary(task: LabTask) -> list:
    taught = [[t.id, [(m["role"], m["content"]) for m in t.messages]] for t in task.trajectories]
    return [task.name, task.kind, taught, [_asked(item) for item in task.items]]


def _asked(item: Item) -> list:
    asked = [m["content"] for m in item.messages]
    return [item.id, asked, item.answer, item.grader, item.valid_from, item.valid_until]
