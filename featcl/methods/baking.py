"""Periodic baking: trajectories are collected, and learned from all together when there are N of them.

    observed, k < N        nothing is learned; the trajectory waits
    observed, k = N        loss = Σ over the N of w_i L(trajectory_i), for as many steps as the learner takes

Between two bakings the weights stand still; what was collected then is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from featcl.methods import checks
from featcl.methods.method import Cost, Method, View
from featcl.methods.tokens import again, tokens_read
from featcl.objectives.experience import Experience
from featcl.streams.trajectory import Trajectory


class Baking(Method):
    """Learns every N trajectories from all N.

    Args:
        every: N.

    Raises:
        FeatclError: If N is not a whole number, at least 1.
    """

    name = "baking"

    def __init__(self, *, every: int = 32) -> None:
        checks.count(self.name, every=every)
        self.every = every
        self._waiting: tuple[tuple[Trajectory, float], ...] = ()  # with how far each is trusted
        self._forward = 0

    @property
    def waiting(self) -> tuple[Trajectory, ...]:
        """What has been collected since the last baking."""
        return tuple(trajectory for trajectory, _ in self._waiting)

    def postpones_(self, experience: Experience, view: View) -> str | None:
        """Why nothing is learned from this experience now, which is then kept; None: learn from it now.

        Args:
            experience: With its weight.
            view: The learner.
        """
        if len(self._waiting) + 1 >= self.every:
            return None
        self._waiting = (*self._waiting, (experience.trajectory, experience.weight))
        return f"baking: {len(self._waiting)} of {self.every} collected"

    def flush_(self, view: View) -> Sequence[Experience]:
        """What still waits, at the end of a task, as experiences of one last update; it waits no longer."""
        weights = [weight for _, weight in self._waiting]
        return [self._again(place, view, weight=weight) for place, weight in enumerate(weights)]

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """All that was collected, each counting as much as the experience that completes it."""
        found = self.flush_(view)
        self._forward += sum(tokens_read(baked.batches) for baked in found)
        return found

    def after_update_(self, experience: Experience, view: View) -> None:
        """What was baked is dropped."""
        self._waiting = ()

    def _again(self, place: int, view: View, *, weight: float) -> Experience:
        return again(self._waiting[place][0], view, weight=weight, purpose="baking")

    def cost(self) -> Cost:
        """What waits, as JSON. What is baked is the stream itself, but is read beside the update's own experience."""
        stored = sum(len(json.dumps(trajectory.to_record())) for trajectory in self.waiting)
        return Cost(stored, self._forward, self._forward)

    def state(self) -> dict[str, Any]:
        """What waits."""
        waiting = [[trajectory.to_record(), weight] for trajectory, weight in self._waiting]
        return {"waiting": waiting, "forward": self._forward}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._waiting = tuple((Trajectory.from_record(record), weight) for record, weight in state["waiting"])
        self._forward = state["forward"]
