"""Balance: every class of the stream has as many records as every other, however rare it is.

While there is room, all are kept. Then, for a new record of class c:

    c was never a largest class    one of a largest class goes, at random
    otherwise, u uniform:          u ≤ m_c / n_c   one of class c goes, at random
                                   else            the new one goes

with m_c records of c in the buffer and n_c seen, so that within a class the records are a uniform sample of it. A class
that has none left, since there are more classes than places, counts as one that was never largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.buffer import Entry, Look
from featcl.methods.method import View
from featcl.methods.reservoir import uniform
from featcl.objectives.experience import Experience

CLASSES = ("task", "source", "user", "class")


class Balanced:
    """Keeps as many records of each class.

    Args:
        by: What a class is: a trajectory's `task`, `source` or `user`, or its meta["class"].

    Raises:
        FeatclError: For another `by`, or a trajectory without it.

    Source: Chrysakis and Moens 2020, ICML, class-balancing reservoir sampling (CBRS), algorithm 1.
    """

    name = "balanced"

    def __init__(self, *, by: str = "task") -> None:
        checks.choice(self.name, CLASSES, by=by)
        self.by = by
        self._seen: Counter[str] = Counter()
        self._full: set[str] = set()  # classes that were once a largest one of a full buffer

    def look_(self, experience: Experience, view: View, generator: torch.Generator) -> Look:
        """Note the class."""
        trajectory = experience.trajectory
        name = trajectory.meta.get("class") if self.by == "class" else getattr(trajectory, self.by)
        if name is None:
            where = 'meta["class"]' if self.by == "class" else self.by
            raise FeatclError(f"balanced: trajectory {trajectory.id!r} has no {where}, by which the buffer is balanced")
        self._seen[str(name)] += 1
        return Look({"class": str(name)})

    def victim_(self, entries: Sequence[Entry], generator: torch.Generator) -> int:
        """As the head of this module says."""
        classes = [entry.look.mark["class"] for entry in entries]
        new, sizes = classes[-1], Counter(classes[:-1])
        if not sizes:
            return 0
        largest = {name for name, size in sizes.items() if size == max(sizes.values())}
        self._full |= largest
        if new not in self._full or not sizes[new]:
            going = largest
        elif uniform(generator) <= sizes[new] / self._seen[new]:
            going = {new}
        else:
            return len(entries) - 1
        places = [place for place, name in enumerate(classes[:-1]) if name in going]
        return places[int(torch.randint(len(places), (), generator=generator))]

    def state(self) -> dict[str, Any]:
        """How many of each class were seen, and which were once a largest one."""
        return {"seen": dict(self._seen), "full": sorted(self._full)}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._seen, self._full = Counter(state["seen"]), set(state["full"])
