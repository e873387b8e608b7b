"""A LoRA per task and a router: every task is learned from the same start, and a question goes to one task's adapter.

    task t: C ← C(start), then learned to C_t;      question q: C ← C_r(q) while it is answered

Whatever the kind, an adapter per task is a set of coordinates: kept when the task ends, put in place for a question.
Nothing that a task learned is touched by the next; what is forgotten is what the router gets wrong.

| router  | r(q)                                                                                       |
|---------|--------------------------------------------------------------------------------------------|
| oracle  | the task that the question is said to come from; what comes from no task gets the start    |
| nearest | the task whose mean activation of the base model is nearest                                |
| learned | what a linear classifier says, trained on the base's activations when a task ends          |

`nearest` and `learned` send every question to a task, also one about none of them. As long as one task is known, all
questions go there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.checks import choice, count, spread
from featcl.methods.method import Cost, Method, View
from featcl.methods.quadratic import nbytes
from featcl.methods.router import Learned, Nearest, Router, prompt_vector, question_of
from featcl.models import blocks
from featcl.objectives.experience import Experience
from featcl.objectives.teachers import borrowed
from featcl.streams.messages import Message

ROUTERS: dict[str, type[Router] | None] = {"oracle": None, "nearest": Nearest, "learned": Learned}
START = "(start)"
"""The key of what was there before the first task."""


class Routed(Method):
    """One set of coordinates per task.

    Args:
        router: `oracle`, `nearest` or `learned`.
        layer: Block after which the base is read; None: a third of the way up. Not for `oracle`.
        examples: At most so many questions of a task are read and kept for the router.

    Raises:
        FeatclError: If an argument is out of range; with a learner whose model has no such block; for a task that ends
            without having begun.

    Source: an adapter per task as in progressive networks' columns without lateral connections (Rusu et al. 2016,
    arXiv:1606.04671); a gate on task inputs as Expert Gate has it (Aljundi et al. 2016, arXiv:1611.06194, with
    autoencoders in place of means).
    """

    name = "routed"
    moves_adapter = True

    def __init__(self, *, router: str = "nearest", layer: int | None = None, examples: int = 64) -> None:
        choice(self.name, tuple(ROUTERS), router=router)
        count(self.name, examples=examples)
        if layer is not None and router == "oracle":
            raise FeatclError("routed: the oracle reads no activations; leave layer out")
        self.router, self.layer, self.examples = router, layer, examples
        made = ROUTERS[router]
        self.by = None if made is None else made(examples=examples)
        self._start: dict[str, Tensor] = {}
        self._ends: dict[str, dict[str, Tensor]] = {}
        self._present: str | None = None
        self._changes = self._read = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that have coordinates of their own."""
        return tuple(self._ends)

    def refuse(self, view: View) -> None:
        """A layer that the model does not have."""
        self._layer(view)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Refuse a stream in which there is nothing to choose.

        Args:
            tasks: Its tasks, in order, with repetitions.

        Raises:
            FeatclError: If there are fewer than two.
        """
        if len(set(tasks)) < 2:
            raise FeatclError(f"routed: a router needs at least two tasks, the stream has {len(set(tasks))}")

    # --- in learning

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """From the start; a task that comes again goes on with its own coordinates."""
        adapter = view.student.adapter
        if not self._start:
            self._start, self._changes = adapter.coordinates(), adapter.changes
        self._check(adapter)
        if self._present is not None and self._present != task:
            self._ends = {**self._ends, self._present: adapter.coordinates()}
            adapter.load_coordinates_(self._ends.get(task, self._start))
        self._present = task

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """Keep its coordinates, and let the router read its questions."""
        if task != self._present:
            raise FeatclError(f"routed: task {task!r} ends, but {self._present!r} is what is being learned")
        self._check(view.student.adapter)
        self._ends = {**self._ends, task: view.student.adapter.coordinates()}
        if self.by is None:
            return
        vectors = []
        for experience in spread(experiences, self.examples):
            vector, read = prompt_vector(question_of(experience.trajectory), view.student, layer=self._layer(view))
            vectors.append(vector)
            self._read += read
        if not vectors:
            raise FeatclError(f"routed: task {task!r} has no experiences from which the router could know it")
        self.by.add_(task, torch.stack(vectors))

    def _layer(self, view: View) -> int:
        n_layers = len(blocks(view.student.scorer.causal))
        layer = n_layers // 3 if self.layer is None else self.layer
        if not isinstance(layer, int) or not 0 <= layer < n_layers:
            raise FeatclError(f"routed: layer {layer!r} is out of range: the model has blocks 0 to {n_layers - 1}")
        return layer

    def _check(self, adapter: Any) -> None:
        if adapter.changes != self._changes:
            raise FeatclError("routed: the directions were changed, and earlier tasks have the old coordinates")

    # --- in chat and evaluation

    def route(self, messages: Sequence[Message], task: str | None, view: View) -> str | None:
        """The task that answers; None where the present coordinates are its own.

        Args:
            messages: The question.
            task: For the oracle; with None it leaves the present coordinates.
            view: The learner.
        """
        if self.by is None:
            found = task if task is None or task == self._present or task in self._ends else START
            found = None if found == START and not self._start else found
        elif not self.by.known:
            found = None
        else:
            found = self.by.choose(prompt_vector(messages, view.student, layer=self._layer(view))[0])
        return None if found == self._present else found

    @contextmanager
    def routed(self, key: str, view: View) -> Iterator[None]:
        """Inside the block the coordinates are that task's, or the start's."""
        if key not in (START, *self._ends):
            raise FeatclError(f"routed: no task {key!r}: there is {', '.join(self._ends) or 'none'}")
        self._check(view.student.adapter)
        with borrowed(view.student.adapter, self._start if key == START else self._ends[key]):
            yield

    # --- part of every version

    def cost(self) -> Cost:
        """Coordinates of every task and of the start, and the router's vectors; tokens that it read when tasks ended.

        Routing a question reads its prompt once more, up to the router's layer; like the question itself it is not
        counted here.
        """
        kept = {} if self.by is None else self.by.tensors()
        return Cost(nbytes(self._start, kept, *self._ends.values()), self._read)

    def state(self) -> dict[str, Any]:
        """Names and numbers."""
        plain = {"tasks": list(self._ends), "present": self._present, "changes": self._changes, "read": self._read}
        return plain if self.by is None else {**plain, "router": self.by.state()}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self._ends = {task: {} for task in state["tasks"]}
        self._present, self._changes, self._read = state["present"], int(state["changes"]), int(state["read"])
        if self.by is not None:
            self.by.load_state_(state["router"])

    def tensors(self) -> dict[str, Tensor]:
        """The start, the end of every task by its number, and what the router knows."""
        parts = {"start": self._start, **{str(number): end for number, end in enumerate(self._ends.values())}}
        parts["router"] = {} if self.by is None else self.by.tensors()
        return {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = tensor
        self._start = parts.get("start", {})
        self._ends = {task: parts.get(str(number), {}) for number, task in enumerate(self._ends)}
        if self.by is not None:
            self.by.load_tensors_(parts.get("router", {}))
