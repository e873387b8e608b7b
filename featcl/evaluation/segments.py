"""Several tasks learned as one: a domain, or all of them.

A segment is a column of R of its own, with the items of all its tasks, since it is what was trained; its tasks stay as
columns beside it, and leave the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from featcl.errors import FeatclError
from featcl.evaluation.board import Board
from featcl.evaluation.forward import Targeted
from featcl.evaluation.material import Material, Task
from featcl.evaluation.matrix import Measure

JOINT = "joint"


class SegmentedBoard:
    """Scores the segments beside their tasks.

    Args:
        board: Scores the tasks.
        segments: Segment -> its tasks.
    """

    def __init__(self, board: Board, segments: Mapping[str, Sequence[str]]) -> None:
        self.board, self.segments = board, dict(segments)
        self.measure: Measure = board.measure

    def score(self, model: nn.Module, answering: Any = None) -> dict[str, dict[str, float]]:
        """Column -> item id -> score; in a segment's column an item has its task's name in front."""
        scores = self.board.score(model, answering)
        joined = {
            segment: {f"{task}/{item}": score for task in tasks for item, score in scores.get(task, {}).items()}
            for segment, tasks in self.segments.items()
        }
        return {**{segment: items for segment, items in joined.items() if items}, **scores}

    def targets(self, item: str) -> tuple[Targeted, ...]:
        """The text of a task's item with its targets."""
        return self.board.targets(item)


class SegmentedAnswering:
    """Methods are told the segment in the place of the task, of which they have never heard.

    Args:
        answering: How questions are answered (`featcl.methods.answering.Answering`).
        segments: Task -> its segment.
    """

    def __init__(self, answering: Any, segments: Mapping[str, str]) -> None:
        self.answering, self.segments = answering, segments

    def asked(self, messages: Sequence[Any], task: str | None = None) -> Sequence[Any]:
        """What the model is asked in place of a conversation."""
        return self.answering.asked(messages, self._known(task))

    def grouped(self, conversations: Sequence[Sequence[Any]], tasks: Sequence[str | None]) -> Any:
        """Which questions are answered under which adapter."""
        return self.answering.grouped(conversations, [self._known(task) for task in tasks])

    def _known(self, task: str | None) -> str | None:
        return None if task is None else self.segments.get(task, task)


def answering_in(answering: Any, segments: Mapping[str, str]) -> Any:
    """How questions are answered by methods that know segments; None where no method has a say.

    Args:
        answering: `featcl.methods.answering.Answering`.
        segments: Task -> its segment.
    """
    if answering.plain:
        return None
    return SegmentedAnswering(answering, segments) if segments else answering


def in_segments(material: Material, by: Literal["domain", "joint"]) -> Material:
    """The same material, of which whole domains, or all tasks, are learned as one.

    Args:
        material: Of a stream whose trajectories are known by now.
        by: `domain`: the tasks of each of two domains; `joint`: all tasks.

    Raises:
        FeatclError: If there are not two domains, or a segment would have the name of a column.
    """
    names = {task.name: JOINT if by == "joint" else task.domain for task in material.tasks}
    segments: dict[str, list[Task]] = {}
    for task in material.tasks:
        segments.setdefault(names[task.name], []).append(task)
    if by == "domain" and len(segments) != 2:
        raise FeatclError(
            f"stream.setting domain is one shift, from one domain to another; this stream has {len(segments)} "
            f"({', '.join(segments)}): choose tasks of two (stream.tasks), or the setting joint or batches"
        )
    if all(len(parts) == 1 for parts in segments.values()):
        return material
    if taken := sorted(set(segments) & set(material.columns)):
        raise FeatclError(f"stream.setting {by}: a task is called {taken[0]!r}, as several together would be")
    tasks = tuple(
        Task(name, tuple(each for task in parts for each in task.trajectories), name)
        for name, parts in segments.items()
    )
    board = SegmentedBoard(material.board, {name: [task.name for task in parts] for name, parts in segments.items()})
    probes = (*(task.name for task in material.tasks), *material.probes)
    return replace(material, tasks=tasks, probes=probes, board=board, segments=names)
