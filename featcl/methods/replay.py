"""Replay: earlier experiences are learned from again, in the same update as the new one.

    loss = L(new) + s / (1 − s) · mean over the drawn of  w_i L(drawn_i)

so that a share s of the update is replay: s = 1/2 is half and half. Each w_i is how far the record was trusted when it
came in: garbage that was given little weight is not rehearsed with more.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.balanced import Balanced
from featcl.methods.buffer import Buffer, Selection
from featcl.methods.importance import Importance
from featcl.methods.k_centre import KCentre
from featcl.methods.method import Cost, Method, View
from featcl.methods.reservoir import Reservoir
from featcl.methods.tokens import CODECS, again, packed, tokens_read, unpacked
from featcl.objectives.experience import Experience

SELECTIONS: dict[str, type] = {
    "reservoir": Reservoir,
    "importance": Importance,
    "k_centre": KCentre,
    "balanced": Balanced,
}


class Replay(Method):
    """Keeps a bounded sample of the stream, and learns from some of it beside each new experience.

    Args:
        budget: Largest number of trajectories kept, or None.
        budget_bytes: Largest number of bytes kept, or None; one of the two is given.
        select: Which ones stay: a name of `SELECTIONS`, or a mapping with `name` and options.
        share: Share of the update that is replay, in (0, 1).
        count: Trajectories drawn per update.
        codec: How they are kept: `text` (JSON) or `zlib`.
        file: Where they lie, read through a memory map; None: in memory.

    Raises:
        FeatclError: For a budget of zero, none or two, an unknown selection or option, or a number out of range.

    Source: experience replay, Chaudhry et al. 2019, arXiv:1902.10486, algorithm 1.
    """

    name = "replay"

    def __init__(
        self,
        *,
        budget: int | None = None,
        budget_bytes: int | None = None,
        select: str | Mapping[str, Any] = "reservoir",
        share: float = 0.5,
        count: int = 1,
        codec: str = "text",
        file: str | Path | None = None,
    ) -> None:
        checks.count(self.name, count=count)
        checks.choice(self.name, CODECS, codec=codec)
        self.share, self.count, self.codec = check_share(self.name, share), count, codec
        self.buffer = Buffer(build_selection(select), budget=budget, budget_bytes=budget_bytes, file=file)
        self._forward = 0

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """Trajectories drawn from the buffer, each with its weight."""
        drawn = self.buffer.draw(self.count, view.generator(f"replay/{experience.trajectory.id}"))
        each = self.share / (1.0 - self.share) / max(1, len(drawn))
        found = []
        for entry in drawn:
            trajectory = unpacked(self.buffer.read(entry), self.codec)
            found.append(again(trajectory, view, weight=each * entry.weight, purpose="replay"))
        self._forward += sum(tokens_read(replayed.batches) for replayed in found)
        return found

    def after_update_(self, experience: Experience, view: View) -> None:
        """Offer the trajectory to the buffer, unless it holds it already."""
        if experience.trajectory.id not in self.buffer:
            self.buffer.add_(packed(experience.trajectory, self.codec), experience, view)

    def cost(self) -> Cost:
        """The buffer, and what was replayed and looked at."""
        forward, backward = self.buffer.forward_tokens, self.buffer.backward_tokens
        return Cost(self.buffer.stored_bytes, self._forward + forward, self._forward + backward)

    def state(self) -> dict[str, Any]:
        """The buffer's, and what was replayed."""
        return {"buffer": self.buffer.state(), "forward": self._forward}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self.buffer.load_state_(state["buffer"])
        self._forward = state["forward"]

    def tensors(self) -> dict[str, Tensor]:
        """The buffer's."""
        return self.buffer.tensors()

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self.buffer.load_tensors_(tensors)


def build_selection(spec: str | Mapping[str, Any]) -> Selection:
    """A selection by name, or from a mapping with its name and options.

    Raises:
        FeatclError: For an unknown name or option, with the nearest that there is.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", ""))
    if name not in SELECTIONS:
        raise FeatclError(f"replay: no selection {name!r}; {_near(name, SELECTIONS)}")
    known = list(inspect.signature(SELECTIONS[name]).parameters)
    for option in options:
        if option not in known:
            raise FeatclError(f"replay: selection {name} has no option {option!r}; {_near(option, known)}")
    return SELECTIONS[name](**options)


def check_share(owner: str, share: float) -> float:
    """The share, if it is in (0, 1)."""
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0.0 < share < 1.0:
        raise FeatclError(f"{owner}: share must be above 0 and below 1, got {share!r}")
    return float(share)


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known) or 'none'}"
