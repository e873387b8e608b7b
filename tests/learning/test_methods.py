"""What a learner does with its methods: when each is asked, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.learning import History, Learner, RunLedger
from featcl.learning.optimizers import moments
from featcl.learning.weighing import SignalWeigher
from featcl.methods.method import Method, View
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.streams import Trajectory

Make = Callable[..., Any]
EACH_STEP = ["terms", "project_", "project_step_"]


def other(talk: Trajectory, number: int) -> Trajectory:
    messages = (*talk.messages[:-1], {"role": "assistant", "content": f"hello {number * 7 % 10}"})
    return replace(talk, id=f"talk-{number}", messages=messages)


def held(learner: Learner) -> dict[str, Tensor]:
    return {**learner.adapter.coordinates(), **moments(learner.optimizer)}


def equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def close(one: Mapping[str, Tensor], two: Mapping[str, Tensor], atol: float = 1e-6) -> bool:
    return all(torch.allclose(one[name], two[name], atol=atol, rtol=1e-4) for name in two)


def values(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its times."""
    return {key: value for key, value in record.items() if not key.startswith("seconds")}


class Nothing(Method):
    """Has no answer of its own."""

    name = "nothing"


class Recorder(Method):
    """Writes down what it is asked; a question in `fails` is answered with an error."""

    name = "recorder"

    def __init__(self, *, postpones: bool = False) -> None:
        self.asked: list[str] = []
        self.seen: dict[str, Any] = {}
        self.fails: Mapping[str, BaseException] = {}
        self.postpones = postpones
        self.count = 0

    def _hear(self, what: str, **seen: Any) -> None:
        self.asked.append(what)
        self.seen[what] = seen
        self.count += 1
        if what in self.fails:
            raise self.fails[what]

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        self._hear("begin_task_", task=task, upcoming=[each.trajectory.id for each in upcoming])

    def postpones_(self, experience: Experience, view: View) -> str | None:
        self._hear("postpones_", experience=experience)
        return "later" if self.postpones else None

    def learned(self, trajectory: Trajectory, view: View) -> Trajectory:
        self._hear("learned")
        return trajectory

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        self._hear("beside", experience=experience)
        return ()

    def terms(self) -> Sequence[Term]:
        self._hear("terms")
        return ()

    def project_(self, view: View) -> None:
        self._hear("project_")

    def project_step_(self, before: Mapping[str, Tensor], view: View) -> None:
        now = {name: parameter.detach().clone() for name, parameter in view.parameters.items()}
        self.seen.setdefault("steps", []).append((before, now))
        self._hear("project_step_")

    def after_step_(self, before: Mapping[str, Tensor], gradients: Mapping[str, Tensor], view: View) -> None:
        self._hear("after_step_", before=before, gradients=gradients)

    def after_update_(self, experience: Experience, view: View) -> None:
        self._hear("after_update_", experience=experience)

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        self._hear("end_task_", task=task, experiences=[each.trajectory.id for each in experiences])

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class Beside(Method):
    """Learns the same other trajectory beside each experience."""

    name = "beside"

    def __init__(self, trajectory: Trajectory, weight: float = 1.0) -> None:
        self.trajectory, self.weight = trajectory, weight

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        return [replace(view.encode(self.trajectory), weight=self.weight)]


@dataclass
class Sum:
    """A penalty whose gradient is 1 everywhere."""

    metric: str = "sum/penalty"

    def penalty(self, student: Student) -> Tensor:
        return torch.stack([p.float().sum() for p in student.adapter.parameters()]).sum()


class Pull(Method):
    """Adds that penalty."""

    name = "pull"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def terms(self) -> Sequence[Term]:
        return (Term(self.name, self.weight, Sum()),)


class Fresh(Method):
    """Starts every task from zero."""

    name = "fresh"
    moves_adapter = True

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        with torch.no_grad():
            for parameter in view.parameters.values():
                parameter.zero_()


# --- when they are asked


def test_each_is_asked_when_and_as_often_as_promised(rig: Make, talk: Trajectory) -> None:
    method = Recorder()
    learner = rig().learner(methods=[method], steps=2)
    learner.begin_task("a", upcoming=[talk])
    learner.observe(talk)
    learner.end_task("a", [talk, other(talk, 1)])
    per_update = ["postpones_", "learned", "beside", *EACH_STEP, *EACH_STEP, "after_step_", "after_update_"]
    assert method.asked == ["begin_task_", *per_update, "end_task_"]
    assert method.seen["begin_task_"] == {"task": "a", "upcoming": ["talk-1"]}
    assert method.seen["end_task_"] == {"task": "a", "experiences": ["talk-1", "talk-1"]}


def test_experiences_that_wait_make_one_step(rig: Make, talk: Trajectory) -> None:
    method = Recorder()
    learner = rig().learner(methods=[method], accumulate=2)
    learner.observe(other(talk, 0))
    once = ["postpones_", "learned", "beside", "terms"]
    assert method.asked == ["begin_task_", *once, "after_update_"]
    learner.observe(other(talk, 1))
    learner.observe(other(talk, 2))
    steps = ["project_", "project_step_", "after_step_"]
    assert method.asked[6:] == [*once, *steps, "after_update_", *once, "after_update_"]
    made = learner.end_task("talk", [])
    assert [stats.trajectories for stats in made] == [("talk-2",)]
    assert method.asked[-4:] == [*steps, "end_task_"]


def test_nobody_says_when_a_task_begins(rig: Make, talk: Trajectory) -> None:
    method = Recorder()
    learner = rig().learner(methods=[method])
    learner.observe(talk)
    learner.observe(other(talk, 1))
    assert method.asked.count("begin_task_") == 1
    assert method.seen["begin_task_"] == {"task": "greeting", "upcoming": []}


def test_what_is_not_trusted_is_not_shown(rig: Make, talk: Trajectory) -> None:
    method = Recorder()
    weigher = SignalWeigher(["custom"], custom=lambda trajectory: 0.5 if trajectory.id == "talk-1" else 0.0)
    learner = rig().learner(methods=[method], weigher=weigher)
    learner.begin_task("a")
    stats = learner.observe(replace(talk, id="bad"))
    assert stats.quarantined
    assert method.asked == ["begin_task_"]
    learner.observe(talk)
    assert method.seen["beside"]["experience"].weight == 0.5
    assert method.seen["after_update_"]["experience"].weight == 0.5


def test_what_is_postponed_reaches_no_weight(rig: Make, talk: Trajectory) -> None:
    method = Recorder(postpones=True)
    learner = rig().learner(methods=[method])
    learner.begin_task("a")
    start = held(learner)
    stats = learner.observe(talk)
    assert (stats.postponed, stats.version, learner.version) == ("later", 0, 0)
    assert method.asked == ["begin_task_", "postpones_"]
    assert equal(start, held(learner))
    assert stats.record()["postponed"] == "later"
    assert "train/loss" not in stats.record()
    assert learner.present.parts["methods"]["methods"]["recorder"] == {"count": 2}  # what it did is remembered
    method.postpones = False  # negative control
    assert learner.observe(talk).postponed is None
    assert not equal(start, held(learner))


# --- what becomes of the answers


def test_a_method_without_answers_changes_nothing(rig: Make, talk: Trajectory) -> None:
    plain, with_it = rig().learner(), rig().learner(methods=[Nothing()])
    for number in range(3):
        one, two = (values(learner.observe(other(talk, number)).record()) for learner in (plain, with_it))
        assert one == two
    assert equal(held(plain), held(with_it))
    assert "methods" not in plain.present.parts
    assert plain.begin_task("a") is None
    assert plain.end_task("a", [talk]) == ()
    assert plain.version == 3
    assert plain.cost() == {}


def test_what_a_step_is_told(rig: Make, talk: Trajectory) -> None:
    method = Recorder()
    learner = rig().learner(methods=[method], steps=2)
    learner.begin_task("a")
    start = learner.adapter.coordinates()
    learner.observe(talk)
    (first, after_first), (second, _) = method.seen["steps"]
    assert equal(first, start)
    assert equal(second, after_first)
    assert not equal(first, second)
    assert equal(method.seen["after_step_"]["before"], start)


def test_the_gradients_are_those_of_the_last_step_and_of_the_view(rig: Make, talk: Trajectory) -> None:
    method = Recorder()
    learner = rig().learner(methods=[method])
    learner.begin_task("a")
    view = learner.view()
    expected = view.gradient(view.encode(talk))
    assert all(parameter.grad is None for parameter in view.parameters.values())
    learner.observe(talk)
    assert equal(method.seen["after_step_"]["gradients"], expected)


def test_what_is_beside_counts_with_its_weight_and_brakes_count_once(rig: Make, talk: Trajectory) -> None:
    objective = ["sft", {"name": "l2_to_base", "weight": 3.0}]
    settings: dict[str, Any] = {"objective": objective, "optimizer": "sgd", "lr": 0.5}
    learner = rig().learner(methods=[Beside(other(talk, 5), weight=0.25)], **settings)
    learner.observe(talk)  # so that the brake has a gradient
    before, view = learner.adapter.coordinates(), learner.view()
    brake, [plain] = learner.terms[1], [term for term in learner.terms if term.name == "sft"]
    learner.reconfigure(objective=[{"name": "sft"}])
    view = learner.view()
    own, extra = (view.gradient(view.encode(each)) for each in (other(talk, 1), other(talk, 5)))
    value = brake.weight * brake.objective.penalty(learner.student)
    pulls = torch.autograd.grad(value, list(view.parameters.values()))
    learner.reconfigure(objective=objective)
    stats = learner.observe(other(talk, 1))
    expected = {
        name: before[name] - 0.5 * (own[name] + 0.25 * extra[name] + pull)
        for (name, _), pull in zip(view.parameters.items(), pulls, strict=True)
    }
    assert close(learner.adapter.coordinates(), expected)
    assert plain.metric in stats.losses
    assert stats.record()["beside/experiences"] == 1.0
    assert stats.tokens == learner._experience(other(talk, 1))[0].batches[0].tokens  # what is beside is a cost


def test_the_trust_region_is_measured_on_what_is_beside_too(rig: Make, talk: Trajectory) -> None:
    more = Trajectory("more", text="a long text that says something else entirely, and goes on. " * 3)
    with_it, without = rig().learner(methods=[Beside(more, 1e-9)]), rig().learner()
    one, two = (learner.observe(talk) for learner in (with_it, without))
    assert one.kl != pytest.approx(two.kl, rel=1e-3)


def test_a_term_is_added_once_and_logged(rig: Make, talk: Trajectory) -> None:
    def learned(accumulate: int, *methods: Method) -> tuple[dict[str, Tensor], Any]:
        learner = rig().learner(methods=methods, optimizer="sgd", lr=0.5, accumulate=accumulate)
        stats = [learner.observe(other(talk, number)) for number in range(accumulate)]
        return learner.adapter.coordinates(), stats[-1]

    for accumulate in (1, 3):
        plain, _ = learned(accumulate)
        pulled, stats = learned(accumulate, Pull(0.01))
        assert close(pulled, {name: value - 0.5 * 0.01 for name, value in plain.items()})
        assert "sum/penalty" in stats.losses


def test_the_objectives_read_what_a_method_says(rig: Make, talk: Trajectory) -> None:
    class Says(Recorder):
        def learned(self, trajectory: Trajectory, view: View) -> Trajectory:
            return other(talk, 9)

    method = Says()
    told, plain = rig().learner(methods=[method]), rig().learner()
    told.observe(replace(talk, id="talk-9"))
    plain.observe(other(talk, 9))
    assert equal(held(told), held(plain))
    assert method.seen["after_update_"]["experience"].trajectory.messages == talk.messages


# --- tasks


def test_moved_coordinates_are_a_version_and_the_moments_are_dropped(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(methods=[Fresh()])
    learner.begin_task("a")
    assert learner.version == 0  # nothing moved: they were zero
    learner.observe(talk)
    learned = learner.adapter.coordinates()
    learner.begin_task("b")
    assert learner.version == 2
    assert moments(learner.optimizer) == {}
    assert all(not tensor.any() for tensor in learner.adapter.coordinates().values())
    with pytest.raises(FeatclError, match=r"v1 cannot be subtracted.*made v2"):
        learner.revert(1)
    learner.rollback(1)
    assert equal(learned, learner.adapter.coordinates())
    assert moments(learner.optimizer) != {}


def test_a_task_that_was_taken_back_begins_anew(rig: Make, talk: Trajectory) -> None:
    method = Recorder()
    learner = rig().learner(methods=[method])
    learner.begin_task("a")
    learner.observe(talk)
    learner.observe(other(talk, 1))
    learner.begin_task("b", upcoming=[talk])
    learner.observe(other(talk, 2))
    learner.rollback(1)
    assert learner.methods.task == "a"
    asked = len(method.asked)
    learner.observe(other(talk, 3))
    assert method.asked[asked] == "begin_task_"
    assert method.seen["begin_task_"] == {"task": "b", "upcoming": ["talk-1"]}
    learner.rollback(learner.version)
    learner.observe(other(talk, 4))
    assert method.asked.count("begin_task_") == 3  # negative control: within the task nothing begins


@pytest.mark.parametrize("hook", ["begin_task_", "postpones_", "learned", "beside", *EACH_STEP, "after_step_",
                                  "after_update_", "end_task_"])  # fmt: skip
def test_a_failure_leaves_learner_and_methods_as_before(rig: Make, talk: Trajectory, hook: str) -> None:
    method = Recorder()
    learner = rig().learner(methods=[Fresh(), method])
    learner.begin_task("a")
    learner.observe(talk)
    before, count = held(learner), method.count

    def act() -> None:
        if hook == "begin_task_":
            learner.begin_task("b")
        elif hook == "end_task_":
            learner.end_task("a", [talk])
        else:
            learner.observe(other(talk, 1))

    method.fails = {hook: FeatclError("no")}
    with pytest.raises(FeatclError, match="no"):
        act()
    assert equal(before, held(learner))
    assert (method.count, learner.version, learner.methods.task, len(learner.pending)) == (count, 1, "a", 0)
    method.fails = {}
    act()
    assert method.count > count  # negative control


def test_memory_that_runs_out_in_a_method_makes_smaller_batches(rig: Make, talk: Trajectory) -> None:
    method = Recorder()
    learner = rig().learner(methods=[method])
    learner.begin_task("a")
    once = {"beside": MemoryError("out of memory")}
    method.fails = once

    halve = learner.halve_micro_batch_

    def halved() -> None:
        halve()
        method.fails = {}

    learner.halve_micro_batch_ = halved  # type: ignore[method-assign]
    learner.observe(talk)
    assert learner.version == 1
    assert method.count == 1 + 8  # the first try left nothing


# --- on disk


def test_saved_state_belongs_to_its_methods(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learner = rig().learner(methods=[Recorder()])
    learner.observe(talk)
    learner.save(tmp_path)
    made = rig()
    with pytest.raises(FeatclError, match="saved with methods recorder, this learner has none; give `methods=`"):
        Learner.load(tmp_path, made.model, made.tokenizer, made.adapter)
    made = rig()
    with pytest.raises(FeatclError, match="this learner has nothing, recorder"):
        Learner.load(tmp_path, made.model, made.tokenizer, made.adapter, methods=[Recorder(), Nothing()])
    made, method = rig(), Recorder()
    loaded = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter, methods=[method])
    assert (loaded.methods.task, method.count) == ("greeting", learner.methods[0].count)  # type: ignore[attr-defined]
    assert equal(held(learner), held(loaded))


def test_what_is_no_method_is_refused(rig: Make) -> None:
    with pytest.raises(FeatclError, match="'ewc' is no method"):
        rig().learner(methods=["ewc"])


class Keeps(Method):
    """Remembers a million numbers, the same ones or new ones after every update."""

    name = "keeps"

    def __init__(self, *, anew: bool) -> None:
        self.anew, self.numbers = anew, torch.zeros(1 << 18)

    def after_update_(self, experience: Experience, view: View) -> None:
        if self.anew:
            self.numbers = self.numbers + 1.0

    def tensors(self) -> dict[str, Tensor]:
        return {"numbers": self.numbers, "ends": self.numbers[-3:]}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        self.numbers = tensors["numbers"]


@pytest.mark.parametrize("anew", [False, True])
def test_what_no_version_changed_is_written_once(rig: Make, talk: Trajectory, tmp_path: Path, anew: bool) -> None:
    learner = rig().learner(methods=[Keeps(anew=anew)])
    for number in range(4):
        learner.observe(other(talk, number))
    learner.save(tmp_path)
    size = (tmp_path / "learner.safetensors").stat().st_size / (1 << 20)
    assert size > 4.5 if anew else size < 1.6
    made, method = rig(), Keeps(anew=anew)
    loaded = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter, methods=[method])
    for version in (4, 2):
        loaded.rollback(version)
        assert float(method.numbers.sum()) == (version << 18 if anew else 0)


def test_the_ledger_goes_on_over_tasks_that_move_the_coordinates(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    made = rig()
    learner = made.learner(methods=[Fresh()], ledger=RunLedger(tmp_path, made.adapter))
    seen: dict[int, dict[str, Tensor]] = {}
    for task in ("a", "b"):
        learner.begin_task(task)
        for number in range(2):
            learner.observe(other(talk, number))
            seen[learner.version] = learner.adapter.coordinates()
    assert list(seen) == [1, 2, 4, 5]  # v3 is the beginning of the second task
    learner.rollback(3)
    learner.observe(other(talk, 7))
    seen[4] = learner.adapter.coordinates()
    history = History(tmp_path)
    assert list(history.line) == [1, 2, 4]
    assert all(equal(history.coordinates(version), seen[version]) for version in history.line)
