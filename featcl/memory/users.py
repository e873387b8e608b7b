"""One memory state per user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from featcl import files
from featcl.errors import FeatclError
from featcl.memory.state import MemoryState


class MemoryStates:
    """A dictionary of users' states: `states["anna"] = state`, `states["anna"]`, `"anna" in states`, `del`.

    What is kept is a copy without gradients, so that nothing which happens to the given state later reaches the user's.

    Attributes:
        limit: How many users may be kept; None for any number.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        """No users yet.

        Args:
            limit: Most users that are kept: when one more comes, the one whose state was set or read longest ago is
                forgotten. None keeps all.
        """
        if limit is not None and limit < 1:
            raise FeatclError(f"memory states: limit {limit} must be at least 1, or None")
        self.limit = limit
        self._states: dict[str, MemoryState] = {}  # in the order of their last use

    def __getitem__(self, user: str) -> MemoryState:
        if user not in self._states:
            raise FeatclError(f"no memory of user {user!r}: there is {', '.join(map(repr, sorted(self))) or 'none'}")
        self._states[user] = self._states.pop(user)
        return self._states[user]

    def __setitem__(self, user: str, state: MemoryState) -> None:
        check_user(user)
        if not isinstance(state, MemoryState):
            raise FeatclError(f"memory states: of user {user!r} a MemoryState is kept, not a {type(state).__name__}")
        self._states.pop(user, None)
        self._states[user] = state.detach()
        if self.limit is not None and len(self._states) > self.limit:
            del self._states[next(iter(self._states))]

    def __delitem__(self, user: str) -> None:
        if self._states.pop(user, None) is None:
            raise FeatclError(f"no memory of user {user!r} to forget")

    def get(self, user: str, default: MemoryState | None = None) -> MemoryState | None:
        """The user's state, or `default` where there is none."""
        return self[user] if user in self._states else default

    def __contains__(self, user: object) -> bool:
        return user in self._states

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._states))

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self._states.values())

    def __repr__(self) -> str:
        return f"MemoryStates(users={len(self)}, bytes={self.nbytes})"

    def save(self, file: str | Path) -> None:
        """Write all users' states as one safetensors file; the names are in its metadata, so they may be any text."""
        from safetensors.torch import save

        tensors = {
            f"{number}.{name}": tensor.cpu().contiguous()
            for number, state in enumerate(self._states.values())
            for name, tensor in state.tensors().items()
        }
        users = json.dumps({"users": list(self._states), "limit": self.limit})
        files.write_bytes(file, save(tensors, metadata={"featcl": users}))

    @classmethod
    def load(cls, file: str | Path) -> MemoryStates:
        """Read what `save` wrote; bit-equal, in the same order of last use.

        Raises:
            FeatclError: If the file is missing or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as opened:
                saved = json.loads((opened.metadata() or {})["featcl"])
                parts: list[dict] = [{} for _ in saved["users"]]
                for key in opened.keys():  # noqa: SIM118  (not a dictionary)
                    number, name = key.split(".", 1)
                    parts[int(number)][name] = opened.get_tensor(key)
            states = cls(limit=saved["limit"])
            for user, tensors in zip(saved["users"], parts, strict=True):
                states._states[user] = MemoryState.from_tensors(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
            raise FeatclError(f"{file} does not hold saved memory states: {error}") from error
        return states


def check_user(name: object) -> None:
    """Refuse what is no name of a user.

    Raises:
        FeatclError: If it is no string.
    """
    if not isinstance(name, str):
        raise FeatclError(f"memory states: a user is a string, not {name!r}")
