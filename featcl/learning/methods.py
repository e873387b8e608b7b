"""A learner's continual-learning methods: asked in order, and a part of every version.

A method never sees the learner, only a `View` of it. What each is asked and when is told in `featcl.methods.method`;
here are the order among several methods and what becomes of their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.learning.gradient import accumulate_gradient_
from featcl.methods.method import Cost, Method, View, overrides
from featcl.methods.quadratic import copies
from featcl.methods.together import check_together
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.streams.trajectory import Trajectory

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one update is made from.

    Attributes:
        own: The experience, as the objectives are to read it.
        beside: What else is learned from.
    """

    own: Experience
    beside: Sequence[Experience] = ()


class Methods(Sequence[Method]):
    """The methods of one learner, in the order in which they were given.

    Where tasks begin or end, those that move the adapter come first, so that the others see it moved; before a step,
    those that only look at the gradients.

    Args:
        methods: The methods.
        view: Makes a view of the learner.

    Attributes:
        task: The present task; None: none has begun.

    Raises:
        FeatclError: If two of them make no sense together.
    """

    def __init__(self, methods: Sequence[Method], view: Callable[[], View]) -> None:
        check_together(methods)
        self._methods, self._view = tuple(methods), view
        self.task: str | None = None
        self._moved: tuple[int, ...] = ()  # versions that a task's beginning or end made

    @overload
    def __getitem__(self, index: int) -> Method: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Method]: ...
    def __getitem__(self, index: int | slice) -> Method | Sequence[Method]:
        return self._methods[index]

    def __len__(self) -> int:
        return len(self._methods)

    def having(self, *hooks: str) -> Iterator[Method]:
        """Those with an answer of their own to one of these questions."""
        return (method for method in self._methods if overrides(method, *hooks))

    def refuse(self) -> None:
        """Raise FeatclError if one of them makes no sense with the learner."""
        for method in self._methods:
            method.refuse(self._view())

    # --- where tasks begin and end

    def begin_task_(self, task: str, upcoming: Sequence[Trajectory]) -> None:
        """A task begins."""
        for method in self._adapter_first():
            view = self._view()
            method.begin_task_(task, view, Encoded(upcoming, view.encode))
        self.task = task

    def flush_(self) -> Lesson | None:
        """What still waits for an update, as one; None where nothing does."""
        found = [each for method in self.having("flush_") for each in method.flush_(self._view())]
        return Lesson(found[0], found[1:]) if found else None

    def end_task_(self, task: str, trajectories: Sequence[Trajectory]) -> None:
        """A task ends."""
        for method in self._adapter_first():
            view = self._view()
            method.end_task_(task, Encoded(trajectories, view.encode), view)

    def _adapter_first(self) -> list[Method]:
        return sorted(self._methods, key=lambda method: not method.moves_adapter)

    def moved_(self, version: int) -> None:
        """The coordinates of this version were made at a task's beginning or end."""
        self._moved = (*self._moved, version)

    def refuse_revert(self, version: int) -> None:
        """Raise FeatclError where a task's beginning or end has set the coordinates anew since that version."""
        at = min((each for each in self._moved if each >= version), default=None)
        if at is not None:
            raise FeatclError(
                f"v{version} cannot be subtracted: methods set the coordinates anew where a task began or ended, which "
                f"made v{at}; rollback restores whole versions"
            )

    # --- one update, in the order of the questions

    def postpones_(self, experience: Experience) -> str | None:
        """Why nothing is learned from an experience; all of them are asked, since each remembers it for itself."""
        asked = [method.postpones_(experience, self._view()) for method in self.having("postpones_")]
        return "; ".join(reason for reason in asked if reason is not None) or None

    def lesson(self, experience: Experience) -> Lesson:
        """What the update is made from."""
        trajectory = experience.trajectory
        for method in self.having("learned"):
            trajectory = method.learned(trajectory, self._view())
        own = experience
        if trajectory is not experience.trajectory:
            own = replace(self._view().encode(trajectory), weight=experience.weight, baseline=experience.baseline)
        beside = [each for method in self.having("beside") for each in method.beside(experience, self._view())]
        return Lesson(own, beside)

    def terms(self) -> list[Term]:
        """What is added to the objectives."""
        return [term for method in self._methods for term in method.terms()]

    def project_(self) -> None:
        """Change the gradient of the step to come."""
        for method in sorted(self.having("project_"), key=lambda method: not method.only_looks):
            method.project_(self._view())

    def before_step(self) -> Parameters | None:
        """The parameters before a step, for those that look back at it; None where nobody does."""
        return copies(self._view().parameters) if any(self.having("project_step_")) else None

    def project_step_(self, before: Parameters | None) -> None:
        """Change the step that was taken."""
        for method in self.having("project_step_"):
            assert before is not None
            method.project_step_(before, self._view())

    def before_update(self) -> Parameters | None:
        """As `before_step`, of a whole update."""
        return copies(self._view().parameters) if any(self.having("after_step_")) else None

    def gradients(self) -> Parameters | None:
        """The gradients as the optimizer is to see them; None where nobody looks at them."""
        if not any(self.having("after_step_")):
            return None
        found = {name: parameter.grad for name, parameter in self._view().parameters.items()}
        return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}

    def after_step_(self, before: Parameters | None, gradients: Parameters | None) -> None:
        """The update was taken."""
        for method in self.having("after_step_"):
            assert before is not None
            assert gradients is not None
            method.after_step_(before, gradients, self._view())

    def after_update_(self, experience: Experience) -> None:
        """The experience was learned from."""
        for method in self.having("after_update_"):
            method.after_update_(experience, self._view())

    def costs(self) -> dict[str, Cost]:
        """What each has needed so far, by name."""
        return {method.name: method.cost() for method in self._methods}

    # --- a part of every version

    def state(self) -> dict[str, Any]:
        """What they remember besides tensors, by name."""
        own = {method.name: method.state() for method in self._methods}
        return {"task": self.task, "moved": list(self._moved), "methods": own}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self.task, self._moved = state["task"], tuple(state["moved"])
        for method in self._methods:
            method.load_state_(state["methods"][method.name])

    def check(self, state: Mapping[str, Any], where: str | Path) -> None:
        """Raise FeatclError for the state of other methods, which was saved there."""
        saved, own = sorted(state["methods"]), sorted(method.name for method in self._methods)
        if saved != own:
            raise FeatclError(
                f"{where}: saved with methods {', '.join(saved) or 'none'}, this learner has "
                f"{', '.join(own) or 'none'}; give `methods=` the same"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that they remember, by `method/name`."""
        return {f"{m.name}/{name}": tensor for m in self._methods for name, tensor in m.tensors().items()}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        for method in self._methods:
            lead = f"{method.name}/"
            own = {key: tensor for key, tensor in tensors.items() if key.startswith(lead)}
            method.load_tensors_({key.removeprefix(lead): tensor for key, tensor in own.items()})


class Encoded(Sequence[Experience]):
    """Trajectories as experiences, each tokenised when it is asked for.

    Args:
        trajectories: The trajectories.
        encode: From one to its experience.
    """

    def __init__(self, trajectories: Sequence[Trajectory], encode: Callable[[Trajectory], Experience]) -> None:
        self._trajectories, self._encode = trajectories, encode

    def __len__(self) -> int:
        return len(self._trajectories)

    @overload
    def __getitem__(self, index: int) -> Experience: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Experience]: ...
    def __getitem__(self, index: int | slice) -> Experience | Sequence[Experience]:
        if isinstance(index, slice):
            return Encoded(self._trajectories[index], self._encode)
        return self._encode(self._trajectories[index])


def mean_gradient(terms: Sequence[Term], experience: Experience, student: Student) -> dict[str, Tensor]:
    """The gradient of the objectives' weighted mean over an experience, by name; the parameters' own stay as they are.

    Args:
        terms: The learner's own.
        experience: With its weight.
        student: The learning model.
    """
    parameters = student.adapter.named_parameters()
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        accumulate_gradient_(terms, experience, student)
        return {name: _gradient(parameter) for name, parameter in parameters.items()}
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
