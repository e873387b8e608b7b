"""Where trajectories come from, and what bad sources say: garbage at a set rate, from sources of unstated quality."""

from __future__ import annotations

import random
from dataclasses import replace

from featcl.lab import lexicon as lex
from featcl.lab.corpus import as_messages
from featcl.lab.skills import Exchange
from featcl.lab.tasks import LabTask
from featcl.streams.trajectory import Trajectory

SOURCES = ("kitchen tablet", "hall speaker", "phone", "guest pad")
BAD_SOURCES = SOURCES[2:]  # unstated: a learner has to find out
FROM_BAD = 0.9  # of the garbage; the rest comes from anywhere


def with_sources(task: LabTask, share: float, rng: random.Random) -> LabTask:
    """The task with a source for every trajectory, and a share of them spoilt.

    Args:
        task: As it is true.
        share: Probability that a trajectory is garbage; `meta["garbage"]` says of which kind, for evaluation only.
        rng: Which ones, how, and from where.
    """
    replies = sorted({reply for trajectory in task.trajectories for _, reply in _exchanges(trajectory)})
    made = []
    for trajectory in task.trajectories:
        bad = rng.random() < share
        source = rng.choice(BAD_SOURCES if bad and rng.random() < FROM_BAD else SOURCES)
        made.append(replace(_spoilt(trajectory, replies, rng) if bad else trajectory, source=source))
    return replace(task, trajectories=tuple(made))


def _spoilt(trajectory: Trajectory, replies: list[str], rng: random.Random) -> Trajectory:
    """Wrong: replies to other requests. Contradictory: one request answered in two ways, both wrong. Adversarial: words
    without a meaning."""
    kind = rng.choice(("wrong", "contradictory", "adversarial"))
    asked = _exchanges(trajectory)
    if kind == "wrong":
        said = [(user, rng.choice([reply for reply in replies if reply != right])) for user, right in asked]
    elif kind == "contradictory":
        user, right = asked[0]
        said = [(user, reply) for reply in rng.sample([reply for reply in replies if reply != right], 2)]
    else:
        said = [(user, " ".join(rng.choices(lex.NONCE, k=4))) for user, _ in asked]
    messages = tuple(as_messages([Exchange(user, reply) for user, reply in said]))
    return replace(trajectory, messages=messages, meta={"garbage": kind})


def _exchanges(trajectory: Trajectory) -> list[tuple[str, str]]:
    """Requests with their replies."""
    contents = [str(message["content"]) for message in trajectory.messages]
    return list(zip(contents[::2], contents[1::2], strict=True))
