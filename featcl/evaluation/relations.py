"""How the columns of R belong together: which are made of which, and which contradict which."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from featcl.errors import FeatclError


@dataclass(frozen=True)
class Claims:
    """False claims made while one row of R came about.

    Attributes:
        row: The task in whose course they were made.
        items: Column -> ids of the items about which something false was said.
    """

    row: str
    items: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Relations:
    """What a stream knows of its columns and a card has to be told; every part may be empty.

    Attributes:
        composed: Column -> the columns of its parts, learned apart and never together.
        named: Column whose questions name their sources -> the column of the same questions without.
        across: Column with choices across tasks -> these tasks.
        related: Groups of tasks that help each other when they are trained jointly.
        contradicts: Task -> the earlier task whose answers it makes wrong.
        claims: What was falsely said, or None.
    """

    composed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    across: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    related: tuple[tuple[str, ...], ...] = ()
    contradicts: Mapping[str, str] = field(default_factory=dict)
    claims: Claims | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Relations:
        """From `relations` in summary.json.

        Raises:
            FeatclError: If a key is unknown, or a value has not its form.
        """
        known = [each.name for each in fields(cls)]
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1) or known
                raise FeatclError(f"relations: unknown key {key!r}; did you mean {near[0]!r}?")
        try:
            claims = data.get("claims")
            return cls(
                composed={column: _names(parts) for column, parts in data.get("composed", {}).items()},
                named={str(column): str(other) for column, other in data.get("named", {}).items()},
                across={column: _names(tasks) for column, tasks in data.get("across", {}).items()},
                related=tuple(_names(group) for group in data.get("related", ())),
                contradicts={str(task): str(other) for task, other in data.get("contradicts", {}).items()},
                claims=None if claims is None else _claims(claims),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise FeatclError(f"relations: a part has not its form ({type(error).__name__}: {error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the parts that are empty."""
        found: dict[str, Any] = {
            "composed": {column: list(parts) for column, parts in self.composed.items()},
            "named": dict(self.named),
            "across": {column: list(tasks) for column, tasks in self.across.items()},
            "related": [list(group) for group in self.related],
            "contradicts": dict(self.contradicts),
        }
        if self.claims is not None:
            found["claims"] = {"row": self.claims.row, "items": {c: list(i) for c, i in self.claims.items.items()}}
        return {key: value for key, value in found.items() if value}

    def check(self, columns: Sequence[str]) -> None:
        """Every name is a column of R.

        Raises:
            FeatclError: If one is not.
        """
        groups = [*self.composed.items(), *self.across.items()]
        names = [name for column, parts in groups for name in (column, *parts)]
        names += [name for pair in (*self.named.items(), *self.contradicts.items()) for name in pair]
        names += [name for group in self.related for name in group]
        names += list(self.claims.items) if self.claims is not None else []
        unknown = [name for name in names if name not in columns]
        if unknown:
            raise FeatclError(f"relations: {unknown[0]!r} is no column of R; columns: {', '.join(columns)}")


# How the laboratory's tasks belong together (`featcl.lab.tasks`): each part holds where all its columns are in R.
_LAB = Relations(
    composed={
        "style_and_fact": ("home_style", "home_facts"),
        "style_and_fact_named": ("home_style", "home_facts"),
        "convention_and_library": ("code_convention", "code_library"),
        "convention_and_library_named": ("code_convention", "code_library"),
    },
    named={
        "style_and_fact_named": "style_and_fact",
        "convention_and_library_named": "convention_and_library",
    },
    across={"labels_across": ("labels_first", "labels_last")},
    related=(("related_first", "related_second"),),
    contradicts={"facts_changed": "home_facts", "library_changed": "code_library"},
)


def lab_relations(columns: Collection[str]) -> Relations:
    """What is known of these columns of one of the laboratory's streams.

    Args:
        columns: Its tasks and probes.
    """

    def there(*names: str) -> bool:
        return all(name in columns for name in names)

    return Relations(
        composed={whole: parts for whole, parts in _LAB.composed.items() if there(whole, *parts)},
        named={named: other for named, other in _LAB.named.items() if there(named, other)},
        across={across: tasks for across, tasks in _LAB.across.items() if there(across, *tasks)},
        related=tuple(group for group in _LAB.related if there(*group)),
        contradicts={later: earlier for later, earlier in _LAB.contradicts.items() if there(later, earlier)},
    )


def _names(values: Any) -> tuple[str, ...]:
    if isinstance(values, str):
        raise TypeError(f"{values!r} stands alone; a list of columns is needed")
    return tuple(str(value) for value in values)


def _claims(data: Mapping[str, Any]) -> Claims:
    return Claims(str(data["row"]), {column: _names(items) for column, items in data["items"].items()})
