"""A task that comes again is the same task: for whoever keeps something per task, and in the plan of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.material import Task
from featcl.evaluation.segments import SegmentedAnswering
from featcl.lab.streams import load_stream
from featcl.methods.merging import Merging
from featcl.methods.notes import Notes
from featcl.methods.routed import Routed
from featcl.plan import BeginTask, EndTask, Evaluate, Update, plan
from tests.methods.coins import same_tensors
from tests.methods.tiny_learner import Tiny

A, B = ("abcd abcd",), ("vwxyz vw",)
TASKS = ("home_facts", "code_rename")


def planned(order: str, *methods: Any) -> list[Any]:
    """The steps of a run on two of the laboratory's tasks."""
    lab = load_stream(order=order, tasks=TASKS)  # type: ignore[arg-type]
    tasks = tuple(Task(task.name, task.trajectories[:2]) for task in lab.tasks)
    config = RunConfig.from_dict({"stream": {"order": order}, "evaluation": {"canaries": None}})
    experiment: Any = SimpleNamespace(
        config=config, material=SimpleNamespace(tasks=tasks, segments=lab.recurring), canaries=None, memorizing=None,
        learner=SimpleNamespace(methods=methods), experiences=(None,),
    )  # fmt: skip
    return list(plan(experiment))


def test_methods_hear_of_the_task_and_r_has_a_row_for_each_visit() -> None:
    steps = planned("recurring", "any")
    assert [step.task for step in steps if isinstance(step, BeginTask)] == [*TASKS, *TASKS]
    assert [step.task for step in steps if isinstance(step, EndTask)] == [*TASKS, *TASKS]
    again = [f"{task}_again" for task in TASKS]
    assert [step.row for step in steps if isinstance(step, Evaluate)] == ["base", *TASKS, *again]
    assert list(dict.fromkeys(step.task for step in steps if isinstance(step, Update))) == [*TASKS, *again]
    blocked = planned("blocked", "any")
    assert [step.task for step in blocked if isinstance(step, BeginTask)] == list(TASKS), "negative control"
    assert load_stream(tasks=TASKS).recurring == {}


def test_evaluation_tells_methods_the_task() -> None:
    heard: list[Any] = []
    inner: Any = SimpleNamespace(grouped=lambda _, tasks: heard.extend(tasks))
    known = load_stream(order="recurring", tasks=TASKS).recurring
    SegmentedAnswering(inner, known).grouped([()] * 3, ["home_facts", "home_facts_again", "general/facts"])
    assert heard == ["home_facts", "home_facts", "general/facts"]


def test_a_router_with_one_task_that_comes_twice_has_nothing_to_choose() -> None:
    lab = load_stream(order="recurring", tasks=TASKS[:1])
    names = [lab.recurring.get(task.name, task.name) for task in lab.tasks]
    with pytest.raises(FeatclError, match="at least two tasks, the stream has 1"):
        Routed().check_tasks(names)
    Routed().check_tasks([task.name for task in lab.tasks])  # negative control: by their segments they are two


def test_merging_goes_on_from_the_tasks_own_end_and_replaces_it() -> None:
    tiny, method = Tiny("write"), Merging(method="average")
    for task, texts in (("a", A), ("b", B)):
        tiny.learn_(method, task, tiny.task(*texts))
    first = {name: tensor.clone() for name, tensor in method.tensors().items()}
    method.begin_task_("a", tiny.view)
    assert same_tensors(
        tiny.adapter.coordinates(), {key[2:]: tensor for key, tensor in first.items() if key.startswith("0/")}
    )
    tiny.step_(method, tiny.task(*A)[0])
    method.end_task_("a", [], tiny.view)
    assert method.state()["tasks"] == ["a", "b"]
    kept = method.tensors()
    moved = {key[:2] for key, tensor in first.items() if not torch.equal(tensor, kept[key])}
    assert moved == {"0/"}, "its own end moved, the other task's and the start stayed"
    tiny.learn_(method, "c", tiny.task(*B))  # negative control: a new task has an end of its own
    assert method.state()["tasks"] == ["a", "b", "c"]


def test_a_training_task_that_comes_again_is_trained_again() -> None:
    tiny, method = Tiny("write"), Notes(by="embedding", training_tasks=1)
    trained = []
    for task in ("a", "b", "a"):
        method.begin_task_(task, tiny.view)
        trained.append(method.training)
    assert trained == [True, False, True]
    other = Notes(by="embedding", training_tasks=1)
    other.load_state_(method.state())
    other.load_tensors_(method.tensors())
    assert other.training
    other.begin_task_("b", tiny.view)
    assert not other.training
