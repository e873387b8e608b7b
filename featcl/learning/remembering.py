"""A learner's side of an attached memory: whose state acts, what is written when, and what a version keeps of it.

The slow weights are frozen; what changes is the state. Every pass of the model starts from the state that is kept, and
leaves no trace: the gradient, the trust region, teachers, the guard, evaluation and sampling all read the same memory.
Where an experience was learned from, the updated model reads it once more, and the state after that is the new one; it
closes the memory's open chunk, so that the next experience can read all of it.

Several learners can share one attachment. The learner of an adapter with a name of its own has the state of the user of
that name; the learner of the unnamed adapter has the attachment's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from featcl.adapters.several import only
from featcl.errors import FeatclError
from featcl.files import digest_bytes
from featcl.memory import MemoryState
from featcl.memory.attach import memories_of
from featcl.objectives.experience import Experience
from featcl.objectives.scoring import Scorer
from featcl.streams.chat import Chat
from featcl.streams.trajectory import Trajectory
from featcl.streams.windows import encode_trajectory


class Remembering:
    """What one learner keeps in a memory.

    Args:
        attached: The memory on the learner's model; its slow weights are frozen from here on.
        adapter: The learner's.

    Raises:
        FeatclError: If it is no attached memory, or on another model.
    """

    def __init__(self, attached: Any, adapter: Any) -> None:
        if not hasattr(attached, "writing"):
            raise FeatclError(
                f"Learner: memory is a {type(attached).__name__}; it takes what featcl.attach_memory returns"
            )
        if not any(other is attached for other in memories_of(adapter.model)):
            raise FeatclError("Learner: the memory is attached to another model than the adapter, or detached")
        for parameter in attached.parameters():
            parameter.requires_grad_(False)
        self.attached = attached
        self.user = None if adapter.name == "default" else adapter.name

    @contextmanager
    def own(self) -> Iterator[None]:
        """Inside the block the attachment has this learner's state, and nothing is written."""
        with ExitStack() as stack:
            if self.user is not None:
                stack.enter_context(self.attached.user(self.user))
            stack.enter_context(self.attached.held())
            yield

    @property
    def held(self) -> MemoryState | None:
        """The learner's state; None: nothing was written yet."""
        with self.own():
            return self.attached.state

    @torch.no_grad()
    def write_(self, ids: Sequence[int], scorer: Scorer, *, longest: int) -> dict[str, float]:
        """Let the model read a text once, and keep the state after it.

        Args:
            ids: The whole text; what is longer than the model's context is read in pieces, one after the other.
            scorer: The model.
            longest: Tokens of a piece.

        Returns:
            What is logged: the norm of the largest head.
        """
        with self.own(), self.attached.writing():
            for start in range(0, len(ids), longest):
                piece = torch.tensor([list(ids[start : start + longest])], device=scorer.device)
                scorer.trunk(input_ids=piece, use_cache=False)
            self.attached.state = self.attached.memory.settle(self.attached.state)
            return {"memory/norm": max(layer["weights"] for layer in self.attached.state.norms())}

    def weights_digest(self) -> str:
        """SHA-256 of slow weights and gate: a state means something with these alone."""
        tensors = sorted(self.attached.tensors().items())
        return digest_bytes(b"".join(name.encode() + _bytes(tensor) for name, tensor in tensors))

    # --- a part of every version

    def state(self) -> dict[str, Any]:
        """Nothing but tensors."""
        return {}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """`load_tensors_` has to follow."""

    def tensors(self) -> dict[str, Tensor]:
        """Of the learner's state; none where nothing was written."""
        held = self.held
        return {} if held is None else held.tensors()

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        with self.own():
            self.attached.state = MemoryState.from_tensors(tensors) if tensors else None
            if self.user is not None and not tensors and self.user in self.attached.users:
                del self.attached.users[self.user]


def whole_ids(trajectory: Trajectory, chat: Chat) -> list[int]:
    """All tokens of a trajectory, in one piece however long it is."""
    return encode_trajectory(trajectory, chat, max_length=sys.maxsize, mask="none").windows[0].input_ids


@contextmanager
def alone(adapter: Any, remembering: Remembering | None) -> Iterator[None]:
    """Inside the block the model is one learner's: no other adapter acts, no other memory, and no other's state."""
    own = None if remembering is None else remembering.attached
    with ExitStack() as stack:
        stack.enter_context(only(adapter))
        for other in memories_of(adapter.model):
            if other is not own:
                stack.enter_context(other.disabled())
        if remembering is not None:
            stack.enter_context(remembering.own())
        yield


def memory_surprise(experience: Experience, attached: Any) -> float:
    """Mean inner loss per token of an experience, up to its last target, at the state that is kept."""
    total, tokens = 0.0, 0
    for batch in experience.batches:
        seq = batch.input_ids.shape[1]
        last = torch.zeros(len(batch.input_ids), dtype=torch.long, device=batch.positions.device)
        last = last.scatter_reduce(0, batch.positions // seq, batch.positions % seq + 1, "amax")
        mask = torch.arange(seq, device=last.device) <= last[:, None]
        total += float((attached.surprise(batch.input_ids, mask) * mask.sum(-1)).sum())
        tokens += int(mask.sum())
    return total / tokens


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
