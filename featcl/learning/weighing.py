"""How far an experience is trusted: a weight from several signals, or quarantine with the reason.

Each signal becomes a factor, 1 for what is as usual; the weight is their product. What is measured on a scale of its
own is compared with its last values: z spreads from their centre, on the bad side, make the factor

    t(z) = min(1, 2 / (1 + exp(z - m)))        1 up to the margin m, then 0.54, 0.24, 0.10, 0.04 a spread further each

| signal    | factor                                                              | margin |
|-----------|---------------------------------------------------------------------|--------|
| reward    | t of the reward below the mean of the last 50; 1 without a reward   | 0      |
| surprise  | t of the student's NLL above the median of the last 16              | 2      |
| agreement | t of the teacher's NLL above the median of the last 16              | 2      |
| energy    | t of log(share of the gradient's energy in the span ÷ chance) below the median of the last 16 | 2 |
| memory    | t of log(how badly the learner's memory knew the tokens) above the median of the last 16 | 2 |
| prior     | the number given for the trajectory's source, else 1                |        |
| custom    | what the user's function says                                       |        |

NLL is nats per token on the trajectory's own targets; without a teacher model, the teacher is the student with its
adapter off. What was quarantined counts as seen: a task that is new is surprising too, and is shut out for at most
half a window. A teacher that knows the tasks tells the two apart, surprise alone cannot. With the objective `policy` a
low reward is itself what is learned from: leave the signal `reward` out there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from featcl.errors import FeatclError
from featcl.learning.full_gradient import energy_share, full_gradient, span_of
from featcl.learning.remembering import memory_surprise
from featcl.learning.running import Usual
from featcl.learning.stats import UpdateStats
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student, base_hidden
from featcl.objectives.sft import nll_sum
from featcl.streams.trajectory import Trajectory

SIGNALS = ("reward", "surprise", "agreement", "energy", "memory", "prior", "custom")
MEASURED = {
    "reward": "raw_reward", "surprise": "nll", "agreement": "teacher_nll", "energy": "log_energy_ratio",
    "memory": "log_memory_surprise",
}  # fmt: skip
MARGINS = {"reward": 0.0, "surprise": 2.0, "agreement": 2.0, "energy": 2.0, "memory": 2.0}
WINDOWS = {"reward": 50, "surprise": 16, "agreement": 16, "energy": 16, "memory": 16}
# of the spread: nats, or of the reward
FLOORS = {"reward": 0.05, "surprise": 0.1, "agreement": 0.1, "energy": 0.1, "memory": 0.1}
BAD_IS_LOW = ("reward", "energy")
TALK = "chat"  # the source of conversations


@dataclass(frozen=True)
class Weight:
    """What a weigher says about one experience.

    Attributes:
        value: At least 0; the loss is multiplied by it.
        signals: What it was made of, under the names that are logged (`weight/surprise`).
        reason: Why the experience is quarantined, or None.
    """

    value: float = 1.0
    signals: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None


class Weigher(Protocol):
    """Weighs experiences; what it remembers is part of every version."""

    def weigh(self, experience: Experience, student: Student, terms: Sequence[Term]) -> Weight:
        """The weight of an experience; without gradients, and without changing what it remembers."""
        ...

    def after_update_(self, experience: Experience, stats: UpdateStats) -> None:
        """Remember an experience that was weighed, learned from or quarantined (`stats.quarantined`)."""
        ...

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON data."""
        ...

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        ...


class SignalWeigher:
    """The product of the signals' factors; see the head of this module.

    Args:
        signals: Which of `SIGNALS` count; each of them is logged.
        priors: Source -> factor, for `prior`; a source that is not named has 1.
        custom: From a trajectory to a factor, for `custom`.
        judge: From a text of feedback to a reward, for trajectories that have no reward; without it, text says nothing.
        memory: The learner's attached memory, for `memory`.
        quarantine_below: An experience whose weight is smaller is not learned from; 0 only where the weight is 0.

    Raises:
        FeatclError: For an unknown signal, none, a number out of range, or a signal without what it needs.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("reward", "surprise", "prior"),
        *,
        priors: Mapping[str, float] | None = None,
        custom: Callable[[Trajectory], float] | None = None,
        judge: Callable[[str], float] | None = None,
        memory: Any = None,
        quarantine_below: float = 0.0,
    ) -> None:
        self.signals, self.priors = tuple(signals), dict(priors or {})
        self.custom, self.judge, self.memory, self.quarantine_below = custom, judge, memory, quarantine_below
        for signal in self.signals:
            if signal not in SIGNALS:
                raise FeatclError(f"weighing: unknown signal {signal!r}; choose from {', '.join(SIGNALS)}")
        if not self.signals:
            raise FeatclError(f"weighing: no signal given; choose from {', '.join(SIGNALS)}")
        if ("custom" in self.signals) != (custom is not None):
            raise FeatclError("weighing: the signal custom and a function `custom` belong together")
        if "memory" in self.signals and memory is None:
            raise FeatclError("weighing: the signal memory needs `memory`, what featcl.attach_memory returns")
        if self.priors and "prior" not in self.signals:
            raise FeatclError("weighing: priors are given, but the signal prior is not among the signals")
        for source, prior in self.priors.items():
            _check_factor(prior, f"weighing: the prior of source {source!r}")
        if not 0.0 <= quarantine_below < 1.0:
            raise FeatclError(f"weighing: quarantine_below is {quarantine_below}; a weight from 0 to below 1 is meant")
        self._usual = {
            signal: Usual(WINDOWS[signal], floor=FLOORS[signal], robust=signal != "reward")
            for signal in self.signals
            if signal in MEASURED
        }

    def weigh(self, experience: Experience, student: Student, terms: Sequence[Term]) -> Weight:
        """The product of the factors, all of them logged, and quarantine where it is too small.

        Raises:
            FeatclError: If a measurement is not finite, or `custom` gives no factor.
        """
        factors: dict[str, float] = {}
        measured: dict[str, float] = {}
        for signal in self.signals:
            if signal == "prior":
                factors[signal] = float(self.priors.get(experience.trajectory.source, 1.0))
            elif signal == "custom":
                assert self.custom is not None
                factors[signal] = _check_factor(self.custom(experience.trajectory), "weighing: the custom weight")
            else:
                value = self._measure(signal, experience, student, terms)
                factors[signal] = 1.0 if value is None else self._trust(signal, value)
                measured |= {} if value is None else {MEASURED[signal]: value}
        value = math.prod(factors.values())
        logged = {f"weight/{name}": number for name, number in {**measured, **factors}.items()}
        quarantined = value < self.quarantine_below or value <= 0.0
        return Weight(value, logged, self._reason(value, factors, measured) if quarantined else None)

    def _measure(self, signal: str, experience: Experience, student: Student, terms: Sequence[Term]) -> float | None:
        if signal == "reward":
            return self._reward(experience.trajectory)
        if not experience.batches and signal != "energy":
            return None  # a prompt alone
        if signal == "surprise":
            value = student_nll(experience, student)
        elif signal == "agreement":
            value = teacher_nll(experience, student)
        elif signal == "memory":
            surprise = memory_surprise(experience, self.memory)
            value = math.log(surprise) if surprise > 0 else -math.inf
        else:
            ratio = energy_ratio(experience, student, terms)
            if ratio is None:
                return None  # samples that were all rewarded the same: no gradient, so no share of it
            value = math.log(ratio) if ratio > 0 else -math.inf
        if not math.isfinite(value):
            raise FeatclError(
                f"trajectory {experience.trajectory.id!r} ({experience.trajectory.task}): weighing: "
                f"{MEASURED[signal]} is {value}; look at this trajectory, or leave the signal {signal} out"
            )
        return value

    def _reward(self, trajectory: Trajectory) -> float | None:
        if trajectory.reward is None and trajectory.feedback is not None and self.judge is not None:
            return float(self.judge(trajectory.feedback))
        return trajectory.reward

    def _trust(self, signal: str, value: float) -> float:
        z = self._usual[signal].z(value)
        return trust(-z if signal in BAD_IS_LOW else z, MARGINS[signal])

    def _reason(self, value: float, factors: Mapping[str, float], measured: Mapping[str, float]) -> str:
        lowest = min(factors, key=lambda name: factors[name])
        why = f"{lowest} {factors[lowest]:.2g}"
        if (name := MEASURED.get(lowest, "")) in measured:
            usual = self._usual[lowest]
            why += f" ({name} {measured[name]:.3g}, usually {usual.centre:.3g} ± {usual.spread:.2g})"
        return f"weight {value:.2g}, lowest signal: {why}"

    # --- what it remembers

    def after_update_(self, experience: Experience, stats: UpdateStats) -> None:
        """What was measured is remembered, also of what was quarantined."""
        for signal, usual in self._usual.items():
            value = stats.measures.get(f"weight/{MEASURED[signal]}")
            if value is not None:
                usual.update_(value)

    def state(self) -> dict[str, Any]:
        """The last values of each signal."""
        return {signal: usual.state() for signal, usual in self._usual.items()}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; signals that it does not know go on as they are."""
        for signal, usual in self._usual.items():
            if signal in state:
                usual.load_state_(state[signal])


def check_priors(priors: Mapping[str, float], sources: Collection[str], *, complete: bool = True) -> str | None:
    """Whether every source that has a prior is one that trajectories come from.

    Args:
        priors: Source -> factor.
        sources: Those of the stream; what is said in a chat has a source of its own, which is always known.
        complete: False: there may be others.

    Returns:
        What to say where `sources` is not complete and one is not among them, else None.

    Raises:
        FeatclError: Naming the sources that there are.
    """
    strange = next((source for source in priors if source not in {*sources, TALK}), None)
    if strange is None:
        return None
    near = difflib.get_close_matches(strange, [*sources], n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    text = (
        f"weighing.priors: no trajectory comes from {strange!r}, so its prior acts on nothing; {meant}"
        f"the sources are {', '.join(sorted(sources)) or 'not known'}"
    )
    if complete and sources:
        raise FeatclError(text)
    return f"{text}, as far as is known"


def as_weigher(weigher: Weigher | Callable[[Trajectory], float] | None) -> Weigher | None:
    """A weigher as it is; a function from a trajectory to its weight as one."""
    if weigher is None or hasattr(weigher, "weigh"):
        return weigher  # type: ignore[return-value]
    if not callable(weigher):
        raise FeatclError(f"weigher must be a function of a trajectory, or have `weigh`, not {type(weigher).__name__}")
    return SignalWeigher(("custom",), custom=weigher)


def trust(z: float, margin: float = 0.0) -> float:
    """t(z) = min(1, 2 / (1 + exp(z - margin))): how far something z spreads on the bad side is believed."""
    return min(1.0, 2.0 / (1.0 + math.exp(min(z - margin, 700.0))))


@torch.no_grad()
def student_nll(experience: Experience, student: Student) -> float:
    """Mean negative log-likelihood of the trajectory's own targets, nats per token."""
    scorer = student.scorer
    total = sum(
        float(nll_sum(scorer.hidden(batch), batch.targets, scorer.head, width=scorer.logit_width))
        for batch in experience.batches
    )
    return total / sum(batch.tokens for batch in experience.batches)


@torch.no_grad()
def teacher_nll(experience: Experience, student: Student) -> float:
    """As `student_nll`, of the teacher model, or where there is none of the student with its adapter off."""
    scorer = student.teacher or student.scorer
    total = 0.0
    for batch in experience.batches:
        hidden = base_hidden(student, batch) if student.teacher is None else scorer.hidden(batch)
        total += float(nll_sum(hidden, batch.targets, scorer.head, width=scorer.logit_width))
    return total / sum(batch.tokens for batch in experience.batches)


def energy_ratio(experience: Experience, student: Student, terms: Sequence[Term]) -> float | None:
    """Share of the full gradient's energy inside the span, divided by chance (k/d): 1 for a gradient without aim.

    None where the gradient is zero.
    """
    span = span_of(student.adapter)
    gradient = full_gradient(terms, experience, student)
    if not any(bool(part.any()) for part in gradient):
        return None
    return energy_share(gradient, span) / span.chance


def _check_factor(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value < math.inf:
        raise FeatclError(f"{what} must be a finite number, at least 0, got {value!r}")
    return float(value)
