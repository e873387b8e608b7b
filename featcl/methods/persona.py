"""A persona's critical answers, which are never lost: rehearsed in turn, so that none waits longer than the others.

    every update, the next `count` of n answers       each is rehearsed once in ⌈n / count⌉ updates
    loss = L(new) + s / (1 − s) · mean of L(answers)

Unlike in a reservoir nothing is ever dropped, and unlike in a random draw no answer is left to chance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.method import Cost, Method, View
from featcl.methods.replay import check_share
from featcl.methods.tokens import again, tokens_read
from featcl.objectives.experience import Experience
from featcl.streams.trajectory import Trajectory


class Persona(Method):
    """Rehearses critical answers in turn beside each new experience.

    Args:
        answers: Conversations that must stay as they are; the stream adds those whose meta["critical"] is true.
        budget: Largest number of them.
        share: Share of the update that is rehearsal, in (0, 1).
        count: Answers per update.

    Raises:
        FeatclError: For a budget of zero, more answers than the budget, or a number out of range.

    Source: ours; with one answer per update and equal shares it is experience replay (Chaudhry et al. 2019,
    arXiv:1902.10486) with a buffer that is read in order and never overwritten.
    """

    name = "persona"

    def __init__(
        self, *, answers: Sequence[Trajectory] = (), budget: int = 64, share: float = 0.2, count: int = 1
    ) -> None:
        checks.count(self.name, budget=budget, count=count)
        self.budget, self.share, self.count = budget, check_share(self.name, share), count
        self._answers: tuple[Trajectory, ...] = ()
        self._next = self._forward = 0
        for answer in answers:
            self._keep_(answer)

    @property
    def answers(self) -> tuple[Trajectory, ...]:
        """All that are kept, in the order of their turns."""
        return self._answers

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """The next answers, each with its weight."""
        count = min(self.count, len(self._answers))
        turn = [self._answers[(self._next + place) % len(self._answers)] for place in range(count)]
        self._next = (self._next + count) % max(1, len(self._answers))
        each = self.share / (1.0 - self.share) / max(1, count)
        found = [again(answer, view, weight=each, purpose="persona") for answer in turn]
        self._forward += sum(tokens_read(rehearsed.batches) for rehearsed in found)
        return found

    def after_update_(self, experience: Experience, view: View) -> None:
        """Keep a trajectory of the stream that is marked as critical."""
        trajectory = experience.trajectory
        if trajectory.meta.get("critical") is True and all(kept.id != trajectory.id for kept in self._answers):
            self._keep_(trajectory)

    def _keep_(self, answer: Trajectory) -> None:
        if len(self._answers) >= self.budget:
            raise FeatclError(
                f"persona: {answer.id!r} would be critical answer {len(self._answers) + 1}, the budget is "
                f"{self.budget}; none of them may be dropped, so give a larger budget"
            )
        if any(kept.id == answer.id for kept in self._answers):
            raise FeatclError(f"persona: two critical answers have the id {answer.id!r}")
        self._answers = (*self._answers, answer)

    def cost(self) -> Cost:
        """The answers as JSON, and what was rehearsed."""
        stored = sum(len(json.dumps(answer.to_record())) for answer in self._answers)
        return Cost(stored, self._forward, self._forward)

    def state(self) -> dict[str, Any]:
        """The answers and whose turn it is."""
        records = [answer.to_record() for answer in self._answers]
        return {"answers": records, "next": self._next, "forward": self._forward}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._answers = tuple(Trajectory.from_record(record) for record in state["answers"])
        self._next, self._forward = state["next"], state["forward"]
