"""Preferences for a laboratory stream: beside the right reply, one that was right for another request."""

from __future__ import annotations

import random
from dataclasses import replace

from featcl.lab.streams import LabStream
from featcl.lab.tasks import LabTask
from featcl.streams.trajectory import Trajectory


def with_pairs(stream: LabStream, *, seed: int) -> LabStream:
    """The same stream with `chosen`, the last reply of each trajectory, and `rejected`, another one of the same task.

    Args:
        stream: As it is taught.
        seed: Which other one.
    """
    rng = random.Random(f"{seed}/{stream.name}/pairs")
    return replace(stream, tasks=tuple(_paired(task, rng) for task in stream.tasks))


def _paired(task: LabTask, rng: random.Random) -> LabTask:
    last = [str(trajectory.messages[-1]["content"]) for trajectory in task.trajectories]
    replies = sorted(set(last))
    made: list[Trajectory] = []
    for trajectory, right in zip(task.trajectories, last, strict=True):
        wrong = rng.choice([reply for reply in replies if reply != right])
        made.append(replace(trajectory, chosen=right, rejected=wrong))
    return replace(task, trajectories=tuple(made))
