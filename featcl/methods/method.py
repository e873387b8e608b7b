"""What a continual-learning method is: what it needs before a task, at each update and after a task.

    methods = [EWC(strength=100.0), Replay(budget=500)]
    learner = featcl.Learner(model, tokenizer, adapter, methods=methods)

A learner asks its methods in this order; a method overrides what it needs of the class below and nothing else.

    task begins     begin_task_
    experience      postpones_ (then nothing else), learned, beside
    each step       terms (in the gradient), project_ (before the step), project_step_ (after it)
    update          after_step_ (after the trust region), after_update_ (when it is accepted)
    task ends       flush_, end_task_
    question        context, route, routed, around (which takes `taken` tokens)
    judged reply    uses (where no objective can learn from it)

Whatever a method remembers is in `state` and `tensors`, which become part of every version: saved, resumed and rolled
back with the learner. A version holds the tensors themselves: a method makes new ones, and changes none in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.streams.messages import Message
from featcl.streams.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class View:
    """What a method may look at.

    Attributes:
        student: The learning model, as objectives see it.
        parameters: The trained tensors by name, live: their `.grad` is the gradient of this update.
        terms: The learner's own objectives.
        encode: From a trajectory to an experience with the learner's settings.
        gradient: The mean gradient of the learner's own objectives over an experience, by name, the parameters' own
            `.grad` untouched.
        generator: From a purpose to a generator that is a function of the learner's seed, its version and the purpose.
    """

    student: Student
    parameters: Mapping[str, nn.Parameter]
    terms: Sequence[Term]
    encode: Callable[[Trajectory], Experience]
    gradient: Callable[[Experience], dict[str, Tensor]]
    generator: Callable[[str], torch.Generator]


@dataclass(frozen=True)
class Cost:
    """What a method needs beside the update itself.

    Attributes:
        stored_bytes: Buffers, importances, adapters, caches, as they are now.
        forward_tokens: Tokens read beside the update's own since the start.
        backward_tokens: Those among them that were also read backwards.
    """

    stored_bytes: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0


class Method:
    """A method that does nothing; a subclass overrides what it needs.

    Attributes:
        name: As in a config.
        moves_adapter: Whether it moves coordinates or changes the adapter where tasks begin or end; it is first there.
        only_looks: Whether `project_` leaves the gradients as they are; it then sees them before other methods.
    """

    name = "none"
    moves_adapter = False
    only_looks = False

    @property
    def keeps_still(self) -> bool:
        """Whether the weights stand still with it: it postpones every experience."""
        return False

    def refuse(self, view: View) -> None:
        """Raise FeatclError if the method makes no sense with this learner; asked once, when the learner is made."""

    # --- in learning

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Before the first experience of a task, also of the first task.

        Args:
            task: Its name.
            view: The learner.
            upcoming: The task's experiences where they are known by now; tokenised when they are looked at.
        """

    def postpones_(self, experience: Experience, view: View) -> str | None:
        """Why nothing is learned from this experience now, which is then remembered; None: learn from it."""
        return None

    def uses(self, trajectory: Trajectory) -> bool:
        """Whether it learns, outside the weights, from a judged reply that no objective can use."""
        return False

    def learned(self, trajectory: Trajectory, view: View) -> Trajectory:
        """What is encoded and given to the objectives in place of a trajectory; other methods see the trajectory."""
        return trajectory

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """Experiences that are learned in the same update, each with its weight, by the learner's own objectives."""
        return ()

    def terms(self) -> Sequence[Term]:
        """Losses added to the learner's objectives; a regulariser. Its `metric` is the name that is logged."""
        return ()

    def project_(self, view: View) -> None:
        """Change the gradients in `view.parameters`, after the backward pass and before the step."""

    def project_step_(self, before: Mapping[str, Tensor], view: View) -> None:
        """Change the parameters right after the optimizer's step, before the trust region.

        Args:
            before: The parameters before this step, by name.
            view: The learner after it.
        """

    def after_step_(self, before: Mapping[str, Tensor], gradients: Mapping[str, Tensor], view: View) -> None:
        """After all steps of an update and the trust region.

        Args:
            before: The parameters before the update, by name.
            gradients: Those of the update's last step, as the optimizer saw them.
            view: The learner after it.
        """

    def after_update_(self, experience: Experience, view: View) -> None:
        """When the experience was learned from and accepted; where it waits for a common step, before that step."""

    def flush_(self, view: View) -> Sequence[Experience]:
        """What still waits at the end of a task, as experiences of one last update, whose `after_update_` follows."""
        return ()

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """After the last experience of a task.

        Args:
            task: Its name.
            experiences: All of its experiences, tokenised anew when they are looked at.
            view: The learner.
        """

    def cost(self) -> Cost:
        """What it has needed so far."""
        return Cost()

    # --- in chat and evaluation

    def context(self, messages: Sequence[Message], view: View) -> Sequence[Message]:
        """What the model is asked in place of `messages`."""
        return messages

    @contextmanager
    def around(self, view: View) -> Iterator[None]:
        """What acts on every forward pass inside the block."""
        yield

    def taken(self) -> int:
        """Tokens of the model's context that `around` takes in every pass."""
        return 0

    def route(self, messages: Sequence[Message], task: str | None, view: View) -> str | None:
        """Which of its adapters answers this question; None: the present one.

        Args:
            messages: As they are asked.
            task: Where the question comes from, for a method that is told (an oracle); None where nobody knows.
            view: The learner.
        """
        return None

    @contextmanager
    def routed(self, key: str, view: View) -> Iterator[None]:
        """Inside the block the adapter that `route` named is the present one; then the one before, bit for bit."""
        yield

    # --- part of every version

    def state(self) -> dict[str, Any]:
        """What it remembers besides tensors, as plain JSON values."""
        return {}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it remembers, by name."""
        return {}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned, after `load_state_`."""


def overrides(method: Method, *names: str) -> bool:
    """Whether a method has an answer of its own to one of these questions."""
    return any(getattr(type(method), name) is not getattr(Method, name) for name in names)
