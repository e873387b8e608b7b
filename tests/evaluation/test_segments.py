"""Tasks that are learned as one: whole domains, or all of them."""

from __future__ import annotations

from typing import Any

import pytest

from featcl.errors import FeatclError
from featcl.evaluation.material import Material, Task
from featcl.evaluation.segments import SegmentedBoard, in_segments
from featcl.streams import Trajectory


class Scores:
    measure = "accuracy"

    def score(self, model: Any, answering: Any = None) -> dict[str, dict[str, float]]:
        return {"a": {"1": 1.0, "2": 0.0}, "b": {"1": 1.0}, "c": {"1": 0.0}, "p": {"1": 1.0}}

    def targets(self, item: str) -> tuple[Any, ...]:
        return ()


def material(*domains: str) -> Material:
    tasks = tuple(
        Task(name, (Trajectory(f"{name}0", text="x"),), domain) for name, domain in zip("abc", domains, strict=True)
    )
    board: Any = Scores()
    return Material(tasks, ("p",), ("general/g",), board, {}, {}, (), (), frozenset(), "digest")


def test_a_domain_is_all_of_its_tasks() -> None:
    found = in_segments(material("home", "code", "home"), "domain")
    assert [(task.name, [t.id for t in task.trajectories]) for task in found.tasks] == [  # type: ignore[union-attr]
        ("home", ["a0", "c0"]),
        ("code", ["b0"]),
    ]
    assert found.columns == ("home", "code", "a", "b", "c", "p", "general/g")
    assert found.segments == {"a": "home", "b": "code", "c": "home"}
    assert isinstance(found.board, SegmentedBoard)
    scores = found.board.score(None)  # type: ignore[arg-type]
    assert scores["home"] == {"a/1": 1.0, "a/2": 0.0, "c/1": 0.0}
    assert {column: items for column, items in scores.items() if column in "abcp"} == Scores().score(None)


def test_all_tasks_are_one() -> None:
    found = in_segments(material("home", "code", "home"), "joint")
    assert [task.name for task in found.tasks] == ["joint"]
    assert [t.id for t in found.tasks[0].trajectories] == ["a0", "b0", "c0"]  # type: ignore[union-attr]


def test_what_is_apart_stays_so() -> None:
    plain = material("x", "y", "y")
    two = Material(plain.tasks[:2], *list(vars(plain).values())[1:10])
    assert in_segments(two, "domain") is two


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (("x", "x", "x"), "stream.setting domain is one shift, from one domain to another; this stream has 1 (x)"),
        (("x", "y", "z"), "this stream has 3 (x, y, z): choose tasks of two"),
        (("a", "b", "b"), "a task is called 'a', as several together would be"),
    ],
)
def test_one_clear_line(domains: tuple[str, ...], message: str) -> None:
    with pytest.raises(FeatclError) as caught:
        in_segments(material(*domains), "domain")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
