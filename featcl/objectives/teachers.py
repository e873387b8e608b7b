"""Who teaches: another model, the student itself, its base, an earlier version of it, or its moving average.

    model       another model with the same tokens
    self        the student's present weights (worth something only with context that the student does not see)
    base        the student with its adapter switched off
    version:N   the student as it was after update N
    ema         e ← d e + (1 − d) C after every update: a slow copy of the coordinates C, decay d

The last two are coordinates of the same adapter, put in its place while they teach.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.models import max_context
from featcl.objectives.scoring import Scorer, TokenBatch

KINDS = ("model", "self", "base", "version:N", "ema")
Coordinates = Mapping[str, Tensor]


def check_teacher(name: str, ema_decay: float = 0.0) -> None:
    """Raise FeatclError unless `name` is a teacher's and the decay of its moving average is in [0, 1)."""
    if name.startswith("version:"):
        if not name.removeprefix("version:").isdecimal():
            raise FeatclError(f"teacher {name!r}: after the colon stands the number of an update, as in version:12")
    elif name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(KINDS)}"
        raise FeatclError(f"unknown teacher {name!r}; {hint}")
    if not 0.0 <= ema_decay < 1.0:
        raise FeatclError(f"ema_decay is {ema_decay}; it is at least 0 (the present weights) and below 1 (the first)")


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model that scores tokens.

    Attributes:
        scorer: The model, split at its last hidden state.
        in_place: What its weights are put in place by.
    """

    scorer: Scorer
    in_place: Callable[[], AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> Float[Tensor, "targets d_model"]:
        """Its last hidden states at the positions that predict a target; without graph.

        To be asked before the student's own forward pass: weights put in its place would spoil that pass's graph.
        """
        with self.in_place():
            return self.scorer.hidden(batch)


class Teachers:
    """The teachers of one student.

    Args:
        scorer: The student.
        adapter: Its trained part.
        model: Another model, or None.
    """

    def __init__(self, scorer: Scorer, adapter: Any, model: Scorer | None = None) -> None:
        self.scorer, self.adapter, self.model = scorer, adapter, model
        self.version = 0
        self._wanted: dict[str, float] = {}  # key of a teacher made of coordinates: its decay, 0 for a version
        self._kept: dict[str, dict[str, Tensor]] = {}  # by the same keys

    def named(self, name: str, ema_decay: float = 0.0) -> Teacher:
        """The teacher of that name.

        Raises:
            FeatclError: If there is no such model, or no such version yet.
        """
        if name == "model":
            if self.model is None:
                raise FeatclError("teacher model: the learner has none; give it `teacher=`, a model with its tokens")
            return Teacher(self.model)
        if name in ("self", "base"):
            return Teacher(self.scorer, self.adapter.disabled if name == "base" else nullcontext)
        key = _key(name, ema_decay)
        if key not in self._kept:
            raise FeatclError(f"teacher {key} is not there: the learner is at version {self.version}")
        return Teacher(self.scorer, partial(borrowed, self.adapter, self._kept[key]))

    # --- what is kept -----------------------------------------------------------------------------------------

    def serve_(self, objectives: Sequence[Any], kept: Callable[[int], Coordinates | None]) -> None:
        """Keep from here on what these objectives' teachers are made of, and nothing else.

        Args:
            objectives: Those with a `teacher` (and its `ema_decay`) are looked at.
            kept: The coordinates of an earlier version, or None where it is no longer kept.

        Raises:
            FeatclError: If an objective is taught by an earlier version that is gone.
        """
        names = [(each.teacher, getattr(each, "ema_decay", 0.0)) for each in objectives if hasattr(each, "teacher")]
        wanted = {_key(*pair): pair[1] for pair in names if pair[0] == "ema" or pair[0].startswith("version:")}
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        for key in wanted.keys() - found.keys():
            made = self._start(key, kept)
            if made is not None:
                found[key] = made
        self._wanted, self._kept = wanted, found

    def _start(self, key: str, kept: Callable[[int], Coordinates | None]) -> dict[str, Tensor] | None:
        """A moving average starts where the student is; a version is looked up, or waited for."""
        if not key.startswith("version:"):
            return self.adapter.coordinates()
        number = int(key.removeprefix("version:"))
        if number == self.version:
            return self.adapter.coordinates()
        coordinates = kept(number) if number < self.version else None
        if coordinates is None and number < self.version:
            raise FeatclError(f"teacher {key}: that version is no longer kept; name it before the update that makes it")
        return None if coordinates is None else dict(coordinates)

    @torch.no_grad()
    def after_update_(self, version: int) -> None:
        """Take note of an update: averages move, and a version that somebody waits for is kept."""
        self.version = version
        now = self.adapter.coordinates() if self._wanted else {}
        for key, decay in self._wanted.items():
            if key == f"version:{version}":
                self._kept[key] = now
            elif not key.startswith("version:"):
                self._kept[key] = {name: now[name].lerp(old, decay) for name, old in self._kept[key].items()}

    def restart_(self, version: int) -> None:
        """After the adapter's directions changed, earlier coordinates mean nothing: averages start anew."""
        self.version = version
        self._kept = {key: self.adapter.coordinates() for key in self._wanted if not key.startswith("version:")}

    def moved_(self, version: int) -> None:
        """After coordinates were set to others, though they mean the same: averages start anew, versions stay."""
        kept = {key: made for key, made in self._kept.items() if key.startswith("version:")}
        self.restart_(version)
        self._kept |= kept
        if (key := f"version:{version}") in self._wanted:
            self._kept[key] = self.adapter.coordinates()

    # --- what a checkpoint holds ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The version that the student is at."""
        return {"version": self.version}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Go back to that version; what is not in its tensors is dropped by `load_tensors_`."""
        self.version = int(state["version"])

    def tensors(self) -> dict[str, Tensor]:
        """The coordinates of every teacher that is made of them, by `teacher/coordinate`."""
        return {f"{key}/{name}": tensor for key, kept in self._kept.items() for name, tensor in kept.items()}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """What `tensors` returned; after `load_state_`, and after the student's own coordinates."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            key, rest = name.split("/", 1)
            found.setdefault(key, {})[rest] = tensor.to(self.scorer.device)
        for key in self._wanted.keys() - found.keys():  # was not wanted yet when that was saved
            if not key.startswith("version:"):
                found[key] = self.adapter.coordinates()
            elif key in self._kept and int(key.removeprefix("version:")) <= self.version:
                found[key] = self._kept[key]
        self._kept = {key: found[key] for key in self._wanted if key in found}


@contextmanager
def borrowed(adapter: Any, coordinates: Coordinates) -> Iterator[None]:
    """Inside the block the adapter has these coordinates; then its own again, bit for bit."""
    own = adapter.coordinates()
    try:
        adapter.load_coordinates_(coordinates)
        yield
    finally:
        adapter.load_coordinates_(own)


def model_teacher(teacher: Any, student: Scorer, tokenizer: Any, *, max_length: int) -> Scorer | None:
    """Another model as a teacher, which must speak the student's tokens.

    Args:
        teacher: A model, or (model, tokenizer), or None.
        student: Whom it teaches.
        tokenizer: The student's.
        max_length: Longest sequence that the student learns from, in tokens.

    Raises:
        FeatclError: If tokenizer, logit width or context length do not fit.
    """
    if teacher is None:
        return None
    model, own = teacher if isinstance(teacher, tuple) else (teacher, None)
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise FeatclError("teacher and student have different tokenizers; distillation compares token by token")
    scorer = Scorer(model)
    if scorer.logit_width != student.logit_width:
        raise FeatclError(
            f"the teacher scores {scorer.logit_width} tokens, the student {student.logit_width}: "
            "distillation needs one tokenizer and one logit width"
        )
    if scorer.device != student.device:
        raise FeatclError(f"the teacher is on {scorer.device}, the student on {student.device}: put both on one device")
    if (length := max_context(scorer.causal)) < max_length:
        raise FeatclError(f"the teacher reads {length} tokens, the student learns from up to {max_length}")
    return scorer


def _key(name: str, ema_decay: float) -> str:
    return f"ema:{ema_decay}" if name == "ema" else name
