"""What a run spends, phase by phase: learning, evaluation, the training of a memory, and acting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from featcl.evaluation.cost import Cost, CostMeter

LEARNING, EVALUATION, MEMORY = "learning", "evaluation", "memory"
ACTING = "acting"  # in cost.json alone: a resumed run does not play again what was played, so it differs
DIFFER = ("seconds", "peak_rss_bytes", "peak_is_of_phase", "peak_cuda_bytes", "stored_bytes")  # from run to run


class Spending:
    """Costs by phase, as records and in all.

    Args:
        meter: On the run's model.
    """

    def __init__(self, meter: CostMeter) -> None:
        self.meter = meter
        self._told: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A block of this phase; where it fails nothing was spent, since it is done again."""
        before = dict(self.meter.costs)
        try:
            with self.meter.phase(name):
                yield
        except BaseException:
            self.meter.costs = before
            raise

    def spent(self) -> dict[str, float]:
        """What learning has cost since this was last asked, by the names of `Cost.record`."""
        now = self._learned()
        found = {name: value - self._told.get(name, 0) for name, value in now.items()}
        self._told = now
        return found

    def totals(self) -> dict[str, float]:
        """FLOPs and tokens of each phase so far."""
        phases = {"train": LEARNING, "evaluation": EVALUATION, "memory": MEMORY}
        costs = {short: self.meter.costs[name] for short, name in phases.items() if name in self.meter.costs}
        return {
            **{f"cost/{short}_flops": cost.flops.total for short, cost in costs.items()},
            **{f"cost/{short}_read_tokens": cost.tokens for short, cost in costs.items()},
        }

    def summary(self) -> dict[str, dict[str, Any]]:
        """By phase, what the same seed repeats: tokens, passes and FLOPs, without times and peaks."""
        plain = {name: cost.to_dict() for name, cost in self.meter.costs.items() if name != ACTING}
        return {name: {key: value for key, value in cost.items() if key not in DIFFER} for name, cost in plain.items()}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """By phase, everything; `load_` reads it back."""
        return {name: cost.to_dict() for name, cost in self.meter.costs.items()}

    def load_(self, costs: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from what `to_dict` said.

        Raises:
            FeatclError: If it is something else.
        """
        self.meter.costs = {name: Cost.from_dict(cost) for name, cost in costs.items()}
        self._told = self._learned()

    def _learned(self) -> dict[str, float]:
        return self.meter.costs.get(LEARNING, Cost()).record()
