"""What a continual-learning method is: what it needs before a task, at each update and after a task.

    methods = [EWC(strength=100.0), Replay(budget=500)]
    learner = featcl.Learner(model, tokenizer, adapter, methods=methods)

A method overrides what it needs of the class below and nothing else. Whatever it remembers is in `state` and
`tensors`, which become part of every version: saved, resumed and rolled back with the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
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
    """

    name = "none"

    def begin_task_(self, task: str, view: View) -> None:
        """Before the first experience of a task."""

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """Experiences that are learned in the same update, each with its weight; replay."""
        return ()

    def terms(self) -> Sequence[Term]:
        """Losses added to the learner's objectives; a regulariser. Its `metric` is the name that is logged."""
        return ()

    def project_(self, view: View) -> None:
        """Change the gradients in `view.parameters`, after the backward pass and before the step."""

    def after_step_(self, before: Mapping[str, Tensor], gradients: Mapping[str, Tensor], view: View) -> None:
        """Right after the optimizer's step and the trust region.

        Args:
            before: Coordinates before the update.
            gradients: Those of the update's last step, as the optimizer saw them.
            view: The learner after it.
        """

    def after_update_(self, experience: Experience, view: View) -> None:
        """When the experience was learned from and the update accepted."""

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """After the last experience of a task; `experiences` are all of its, tokenised anew."""

    def cost(self) -> Cost:
        """What it has needed so far."""
        return Cost()

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
        """Take over what `tensors` returned."""
