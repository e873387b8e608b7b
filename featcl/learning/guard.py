"""The guard: it looks at what the learner forgets and acts before it is severe.

Every `every` updates it draws fresh items from a pool, measures what each has lost since the base model, and bets
against "on average no more than `tolerance` is lost" (`featcl.learning.eprocess`). After i alarms it raises the next
one at wealth ≥ 1/α_i, α_i = α / 2^(i+1), and starts the test anew: the probability that any alarm is ever false is at
most α, however long the learner runs.

Which version is safe. A version is safe when its own check leaves the evidence since any start at 1 or below: nothing
speaks against it (in CUSUM terms the statistic is at rest). An alarm goes back to the newest safe version, which is the
one before the loss seems to have begun. If the alarm comes again before another version was found safe, that one was
not, and the guard goes further back, at last to the version at which it began. A few safe versions are kept, of ages
that grow about geometrically.

What the guard has seen stays seen: `rollback` takes back what was learned, but neither its alarms nor the draws made.
Its state is no part of a version; it is saved beside the last one, and returns when a saved learner is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

from featcl.errors import FeatclError
from featcl.evaluation.pool import Pool
from featcl.learning.eprocess import EProcess, alarm_level
from featcl.learning.randomness import derived_generator
from featcl.learning.stats import UpdateStats

Action = Literal["stop", "rollback", "shrink"]
SAFE_VERSIONS = 4
SHRINK = 0.5  # of what an update may move the model, at each alarm


class Stopped(FeatclError):
    """The guard stopped the learner; its state is whole, the update is a version.

    Attributes:
        stats: Of the update after which it stopped; None until the learner has added it.
    """

    stats: UpdateStats | None = None

    def __init__(self, message: str, reading: GuardReading | None = None) -> None:
        super().__init__(message)
        self.reading = reading or GuardReading(alarm=message)


@dataclass(frozen=True)
class GuardReading:
    """One look of the guard.

    Attributes:
        measures: Under the names that are logged (`guard/wealth`).
        alarm: What was found and done, or None.
    """

    measures: Mapping[str, float] = field(default_factory=dict)
    alarm: str | None = None

    def added_to(self, stats: UpdateStats) -> UpdateStats:
        """The update's stats with what the guard measured and did."""
        return replace(stats, measures={**stats.measures, **self.measures}, alarm=self.alarm)


class Guard(Protocol):
    """Watches a learner; what it remembers is saved with it."""

    max_kl: float | None
    """Limit of KL per update in nats per token that the guard has set, or None; the learner keeps to it."""
    alarms: int
    """How often it has alarmed."""

    def after_update(self, learner: Any, stats: UpdateStats) -> GuardReading | None:
        """Look, if it is time; on an alarm act on the learner (roll back, lower its trust region).

        Raises:
            Stopped: Where the action is to stop.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON data."""
        ...

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        ...


class CanaryGuard:
    """Raises an alarm when canaries die: an anytime-valid test of forgetting on fresh items.

    Args:
        pool: Items with the base model's scores, chosen before any learning.
        alpha: Probability that any alarm is ever false, at most.
        every: Updates between looks.
        items: Fresh items per look.
        action: `stop`, `rollback` to the newest safe version, or `shrink` the trust region by half.
        tolerance: Mean loss of the pool's score that is accepted for good, as a share (0.01: one point).
        seed: With the number of the look, decides which items are drawn.

    Raises:
        FeatclError: If a setting is out of range.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        alpha: float = 0.05,
        every: int = 10,
        items: int = 128,
        action: Action = "rollback",
        tolerance: float = 0.01,
        seed: int = 0,
    ) -> None:
        if not 0 < alpha < 1:
            raise FeatclError(f"guard: alpha {alpha!r} is not a probability between 0 and 1, such as 0.05")
        if every < 1 or not 1 <= items <= len(pool):
            raise FeatclError(
                f"guard: every {every!r}, items {items!r}: at least 1 each, and items at most {len(pool)}"
            )
        if action not in get_args(Action):
            raise FeatclError(f"guard: action {action!r} is not one of {', '.join(get_args(Action))}")
        self.pool, self.alpha, self.every, self.items, self.action = pool, alpha, every, items, action
        self.seed = seed
        self.test = EProcess.start(tolerance)
        self.updates = self.looks = self.alarms = 0
        self.max_kl: float | None = None
        self._kl = 0.0  # summed since the last look
        self._safe: list[tuple[int, int]] = []  # look, version
        self._changes = 0  # of the adapter's directions, to which the safe versions belong

    @property
    def threshold(self) -> float:
        """Wealth at which the next alarm is raised: 1 / α_i."""
        return 1.0 / alarm_level(self.alpha, self.alarms)

    @property
    def safe_versions(self) -> tuple[int, ...]:
        """Versions it may go back to, oldest first."""
        return tuple(version for _, version in self._safe)

    def after_update(self, learner: Any, stats: UpdateStats) -> GuardReading | None:
        """Look, if it is time; see `Guard`."""
        self._watch_(learner)
        self.updates += 1
        self._kl += stats.kl
        if self.updates % self.every:
            return None
        chosen = self.pool.draw(self.items, derived_generator(self.seed, f"look {self.looks}", "guard"))
        answering = learner.answering()
        answering = None if answering.plain else answering  # otherwise as methods answer, not by the weights alone
        losses = self.pool.losses(learner.adapter.model, chosen, answering=answering)
        self.looks += 1
        self.test = self.test.after(losses)
        measures = {
            "guard/loss": float(losses.mean()),
            "guard/wealth": float(self.test.wealth),
            "guard/threshold": self.threshold,
            "guard/evidence": float(self.test.evidence),
        }
        alarm = None
        if measures["guard/wealth"] >= self.threshold:
            alarm = self._alarm_(learner, measures["guard/wealth"])
        elif measures["guard/evidence"] <= 1.0:
            self._remember_(learner)
        self._kl = 0.0
        measures |= {"guard/alarms": self.alarms, "guard/safe_version": self.safe_versions[-1]}
        measures |= {} if self.max_kl is None else {"guard/max_kl": self.max_kl}
        reading = GuardReading(measures, alarm)
        if alarm is not None and self.action == "stop":
            raise Stopped(alarm, reading)
        return reading

    # --- what is done ----------------------------------------------------------------------------------------------

    def _alarm_(self, learner: Any, wealth: float) -> str:
        """Act; the test starts anew at half the level."""
        found = f"forgetting: wealth {wealth:.3g} reached {self.threshold:.3g} at look {self.looks}"
        self.alarms += 1
        self.test = EProcess.start(self.test.tolerance)
        if self.action == "rollback":
            return f"{found}; {self._roll_back_(learner)}"
        if self.action == "shrink":
            return f"{found}; {self._shrink_(learner)}"
        newest = self.safe_versions[-1]
        return f"{found}; stopped at version {learner.version}, the newest safe version is {newest}"

    def _roll_back_(self, learner: Any) -> str:
        """To the newest safe version, which must earn that name again; the first one is always there."""
        version, safe = learner.version, self.safe_versions[-1]
        learner.rollback(safe)
        if len(self._safe) > 1:
            self._safe.pop()
        learner.hold(*self.safe_versions)
        return f"rolled back from version {version} to {safe}"

    def _shrink_(self, learner: Any) -> str:
        """Half of the limit that holds; where none does, half of the mean KL of the updates since the last look."""
        limits = [limit for limit in (self.max_kl, learner.settings.max_kl_per_update) if limit is not None]
        limit = SHRINK * (min(limits) if limits else self._kl / self.every)
        if not limit > 0:
            return "the updates moved nothing, so that the trust region was left as it is"
        self.max_kl = limit
        return f"an update may move the model by {limit:.3g} nats per token from here on"

    # --- safe versions ---------------------------------------------------------------------------------------------

    def _watch_(self, learner: Any) -> None:
        """Where it begins is safe; versions that were taken back, are gone, or have other directions are let go."""
        if self._changes != learner.adapter.changes:
            self._changes, self._safe = learner.adapter.changes, []
        there = learner.versions
        self._safe = [safe for safe in self._safe if safe[1] < learner.version and safe[1] in there]
        if not self._safe:
            self._safe = [(self.looks, learner.versions[0])]
            learner.hold(*self.safe_versions)

    def _remember_(self, learner: Any) -> None:
        """Keep the newest and the first; between them let go the one nearest in age to its elder."""
        self._safe.append((self.looks, learner.version))
        if len(self._safe) > SAFE_VERSIONS:
            ages = [self.looks + 1 - look for look, _ in self._safe]
            del self._safe[max(range(1, len(ages) - 1), key=lambda index: ages[index] / ages[index - 1])]
        learner.hold(*self.safe_versions)

    # --- on disk ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Counters, wealth, and which versions are safe, as JSON data; the learner keeps the versions themselves."""
        names = ("updates", "looks", "alarms", "max_kl")
        return {
            **{name: getattr(self, name) for name in names},
            "kl": self._kl,
            "changes": self._changes,
            "test": self.test.state(),
            "safe": [list(safe) for safe in self._safe],
        }

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self.updates, self.looks, self.alarms = (int(state[name]) for name in ("updates", "looks", "alarms"))
        self.max_kl, self._kl, self._changes = state["max_kl"], float(state["kl"]), int(state["changes"])
        self.test = EProcess.from_state(self.test.tolerance, state["test"])
        self._safe = [(int(look), int(version)) for look, version in state["safe"]]
