"""Reservoir: every record that was ever offered is in the buffer with the same probability.

    key = u, uniform on (0, 1)        the n largest keys stay

which is a uniform sample of n without replacement after every step, as with Vitter's algorithm R, and goes on where
records take up different numbers of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from featcl.methods.buffer import Entry, Look
from featcl.methods.method import View
from featcl.objectives.experience import Experience


class Reservoir:
    """Keeps a uniform sample of the stream.

    Source: Vitter 1985, ACM TOMS 11(1), algorithm R; for replay, Chaudhry et al. 2019, arXiv:1902.10486, algorithm 2.
    """

    name = "reservoir"

    def look_(self, experience: Experience, view: View, generator: torch.Generator) -> Look:
        """Draw the key."""
        return Look({"key": uniform(generator)})

    def victim_(self, entries: Sequence[Entry], generator: torch.Generator) -> int:
        """The smallest key."""
        return smallest_key(entries)

    def state(self) -> dict[str, Any]:
        """Nothing: the keys are the entries'."""
        return {}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""


def uniform(generator: torch.Generator) -> float:
    """A number in (0, 1], as fine as float64 allows."""
    return 1.0 - float(torch.rand((), dtype=torch.float64, generator=generator))


def smallest_key(entries: Sequence[Entry]) -> int:
    """Place of the entry with the smallest `key` in its mark."""
    return min(range(len(entries)), key=lambda place: entries[place].look.mark["key"])
