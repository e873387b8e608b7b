"""The report card of a run: five desiderata, each with its numbers, their references and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation.labels import TaskLabel

QUESTIONS = {
    "preserve": "Is general ability kept?",
    "sequential": "Does learning one after the other do what learning jointly does?",
    "distributions": "Does it hold when what is learned differs, changes or is false?",
    "efficient": "What does it take?",
    "compositional": "Does what was learned apart work together?",
}


@dataclass(frozen=True)
class Number:
    """One number of a card.

    Attributes:
        name: What it is called.
        value: As measured; infinite where something was never reached.
        low, high: Limits of its interval; NaN where it has none, and then `note` says why.
        formula: How it is made, in one line.
        references: "base", "joint", "single", "in_context" or another run -> the same number there.
        unit: Of the value, where it is not a share.
        note: What should be known beside it.
    """

    name: str
    value: float
    low: float
    high: float
    formula: str
    references: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: NaN and infinity are null, and `reached` is false for infinity."""
        limits = {key: _plain(getattr(self, key)) for key in ("value", "low", "high")}
        reached = {"reached": False} if math.isinf(self.value) else {}
        references = {name: _plain(value) for name, value in self.references.items()}
        texts = {"formula": self.formula, "unit": self.unit, "note": self.note}
        return {"name": self.name, **limits, **reached, "references": references, **texts}

    def __str__(self) -> str:
        limits = "" if math.isnan(self.low) else f" [{_shown(self.low)}, {_shown(self.high)}]"
        others = ", ".join(f"{name} {_shown(value)}" for name, value in self.references.items())
        parts = [f"{_shown(self.value)}{limits}", self.unit, f"({others})" if others else "", self.note]
        return "  ".join(part for part in parts if part)


@dataclass(frozen=True)
class Desideratum:
    """One of the five.

    Attributes:
        name: A key of `QUESTIONS`.
        numbers: What was measured of it.
        missing: Number -> what would have to be recorded, run or given for it.
    """

    name: str
    numbers: tuple[Number, ...]
    missing: Mapping[str, str]

    @property
    def question(self) -> str:
        """What it asks."""
        return QUESTIONS[self.name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        numbers = [number.to_dict() for number in self.numbers]
        return {"name": self.name, "question": self.question, "numbers": numbers, "missing": dict(self.missing)}


@dataclass(frozen=True)
class ReportCard:
    """What one run shows of the five desiderata.

    Attributes:
        run: Study, arm and seed.
        measure: What the scores are: `accuracy`, or `nll`, of which the negative stands here, so higher is better.
        level: Coverage of the intervals, which are over items of this run, not over seeds.
        references: Name -> the folder that it was read from; "base" is the run's own first row.
        preserve, sequential, distributions, efficient, compositional: The five.
        labels: How each task ended.
        notes: What is wrong with the files, and what else a reader has to know.
    """

    run: str
    measure: str
    level: float
    references: Mapping[str, str]
    preserve: Desideratum
    sequential: Desideratum
    distributions: Desideratum
    efficient: Desideratum
    compositional: Desideratum
    labels: tuple[TaskLabel, ...]
    notes: tuple[str, ...] = ()

    @property
    def desiderata(self) -> tuple[Desideratum, ...]:
        """The five in order."""
        return tuple(getattr(self, name) for name in QUESTIONS)

    def number(self, name: str) -> Number:
        """The number of that name.

        Raises:
            FeatclError: If the card has none: why, or which it has.
        """
        for _, number in self.numbers():
            if number.name == name:
                return number
        for each in self.desiderata:
            if name in each.missing:
                raise FeatclError(f"{name} was not measured: {each.missing[name]}")
        raise FeatclError(f"no number {name!r}; there are {', '.join(number.name for _, number in self.numbers())}")

    def numbers(self) -> Iterator[tuple[str, Number]]:
        """(desideratum, number), in order."""
        for each in self.desiderata:
            yield from ((each.name, number) for number in each.numbers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        labels = [{key: _plain(value) for key, value in vars(label).items()} for label in self.labels]
        return {
            "run": self.run,
            "measure": self.measure,
            "level": self.level,
            "references": dict(self.references),
            "desiderata": [each.to_dict() for each in self.desiderata],
            "labels": labels,
            "notes": list(self.notes),
        }

    def render(self) -> str:
        """The card as text."""
        unit = "share right" if self.measure == "accuracy" else "minus nats per token, higher is better"
        others = "".join(f"; {name}: {path}" for name, path in self.references.items())
        lines = [f"{self.run} ({unit}; intervals of {self.level:.0%} over items; base: its first row{others})"]
        lines += [f"note: {note}" for note in self.notes]
        width = max((len(number.name) for _, number in self.numbers()), default=0) + 2
        for each in self.desiderata:
            lines += ["", f"{each.name}: {each.question}"]
            lines += [f"  {number.name:{width}}{number}" for number in each.numbers]
            lines += [f"  not measured: {name} ({why})" for name, why in each.missing.items()]
        if self.labels:
            lines += ["", "tasks:"]
        for label in self.labels:
            cost = "" if math.isnan(label.cost) else f", cost to the rest {_shown(label.cost)}"
            worst = f" (most {label.worst}: {_shown(label.worst_cost)})" if label.worst else ""
            lines.append(f"  {label.task:{width}}{label.label}: learned {_shown(label.learned)}{cost}{worst}")
        return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "never" if value > 0 else "-∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}".rstrip("0").rstrip(".") if value else "0"
