"""Whose state an attached memory goes by, and whether it is written.

One state is *kept*: `state`, or inside `user("anna")` Anna's. The rule:

1. A forward pass without a key-value cache, or with an empty one, starts from the kept state (None: an empty memory).
2. Where it ends goes into its cache, from which the next pass with that cache goes on, and nowhere else.
3. Only inside `writing()` it becomes the kept state too.

So scoring, evaluation, a teacher and sampling leave no trace, `generate` carries the state along until its cache is
dropped, and nothing passes from one user or call to the next but what was written on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from featcl.errors import FeatclError
from featcl.memory import checks
from featcl.memory.state import MemoryState
from featcl.memory.users import MemoryStates, check_user


class Kept:
    """The kept state of a memory, those of its users, and the modes.

    Args:
        memory: The memory whose states these are.

    Attributes:
        memory: The same.
        users: States by user.
    """

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.users = MemoryStates()
        self._state: MemoryState | None = None
        self._user: str | None = None
        self._writing = False
        self._last_ids: Tensor | None = None

    @property
    def state(self) -> MemoryState | None:
        """The kept state; None: an empty memory. Assign to it to go on from another one.

        Raises:
            FeatclError: On assignment, if the state is of another memory.
        """
        return self._state

    @state.setter
    def state(self, state: MemoryState | None) -> None:
        if state is not None:
            check_state(self.memory, state)
        self._state = state

    def settle(self) -> None:
        """Close the open chunk of the kept state, so that what was written last can be read: after a document, say."""
        if self._state is not None:
            self._state = self.memory.settle(self._state)

    # --- modes

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block, where a forward pass ends becomes the kept state.

        Gradients flow from one pass to the next inside the outermost such block; at its end the state is detached. An
        exception that leaves the block puts back the states from before it. Generation writes with one row only (rows
        that have stopped would be written padding), and all but the last token that it draws, which no pass has read.
        """
        before, was = self._snapshot(), self._writing
        self._writing, self._last_ids = True, None
        try:
            yield
        except BaseException:
            self._restore_(before)
            raise
        finally:
            self._writing, self._last_ids = was, None
            if not was:
                self._state = detached(self._state)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block nothing is written, even inside `writing()`: passes start from the kept state, as always."""
        was, self._writing = self._writing, False
        try:
            yield
        finally:
            self._writing = was

    @contextmanager
    def restored(self) -> Iterator[None]:
        """After the block the kept state and those of all users are what they were before it."""
        before = self._snapshot()
        try:
            yield
        finally:
            self._restore_(before)

    @contextmanager
    def using(self, state: MemoryState | None) -> Iterator[None]:
        """Inside the block `state` is kept, and nobody's; what is written is lost after it, unless it is taken out."""
        outer = self._user, self._state
        self.state = state
        self._user = None
        try:
            yield
        finally:
            self._user, self._state = outer

    @contextmanager
    def user(self, name: str) -> Iterator[None]:
        """Inside the block a user's state is kept; at its end it is put into `users`, or forgotten if it is None then.

        Args:
            name: Any name; one that is not in `users` starts with an empty memory.

        Raises:
            FeatclError: If the name is no string, its state is of another memory, or blocks of users overlap without
                one lying in the other, as in threads.
        """
        check_user(name)
        outer, state = self._user, self._state
        self._put_away_()
        self._user, self._state = name, self._state_of(name)
        try:
            yield
        finally:
            if self._user != name:
                raise FeatclError(f"memory: the block of user {name!r} ends inside that of {self._user!r}; nest them")
            self._put_away_()
            self._user, self._state = outer, state if outer is None else self._state_of(outer)

    def _put_away_(self) -> None:
        if self._user is None or self._state is self.users.get(self._user):
            return
        if self._state is None:
            del self.users[self._user]
        else:
            self.users[self._user] = self._state

    def _state_of(self, name: str) -> MemoryState | None:
        state = self.users.get(name)
        if state is not None:
            check_state(self.memory, state)
        return state

    # --- versions

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies of the kept state and of those of all users by name, for `load_state_`, detached."""
        states = {f"users/{name}": self.users[name] for name in self.users}
        if self._state is not None:
            states["kept"] = self._state.detach()
        return {
            f"{owner}/{name}": tensor for owner, state in states.items() for name, tensor in state.tensors().items()
        }

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` returned.

        Raises:
            FeatclError: If a state is of another memory; nothing is changed then.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            owner, _, name = key.rpartition("/")
            parts.setdefault(owner, {})[name] = tensor
        states = {owner: MemoryState.from_tensors(found) for owner, found in parts.items()}
        for owner, state in states.items():
            if owner != "kept" and not owner.startswith("users/"):
                raise FeatclError(f"memory: {owner!r} is no state of an attached memory: 'kept', or 'users/…'")
            check_state(self.memory, state)
        self._state = states.pop("kept", None)
        self.users._states = {owner.removeprefix("users/"): state for owner, state in states.items()}

    def _snapshot(self) -> tuple[MemoryState | None, dict[str, MemoryState]]:
        return self._state, dict(self.users._states)  # states are immutable: nothing is copied

    def _restore_(self, snapshot: tuple[MemoryState | None, dict[str, MemoryState]]) -> None:
        self._state, self.users._states = snapshot


def check_state(memory: Any, state: Any) -> None:
    """Refuse what is no state of this memory.

    Raises:
        FeatclError: If it is no state, a tensor of it is missing, or of another shape or dtype, or holds NaN.
    """
    shapes = memory.state_shapes(getattr(state, "batch", 0))
    checks.check_state(state, shapes, dtype=memory.state_dtype, device=None, chunk_size=memory.chunk_size)


def detached(state: MemoryState | None) -> MemoryState | None:
    """The state as plain tensors: without graph, not made under `inference_mode`; the same object where it is so."""
    if state is None:
        return None
    parts = (*state.weights, *state.momentum, state.keys)
    return state.detach() if any(part.requires_grad or part.is_inference() for part in parts) else state
