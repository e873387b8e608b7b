"""What every measure has in common: it looks at the model as it stands whenever a row of R is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Place:
    """A row of R.

    Attributes:
        row: "base", or the task just trained.
        number: 0 for the base model.
        last: Whether no task follows.
    """

    row: str
    number: int
    last: bool

    @property
    def first(self) -> bool:
        """Whether nothing was learned yet."""
        return self.number == 0


@dataclass(frozen=True)
class Reading:
    """What one look gave.

    Attributes:
        record: Scalars by the names that are logged.
        tables: Name -> columns and rows, in place of an earlier table of that name.
    """

    record: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, tuple[Sequence[str], Rows]] = field(default_factory=dict)


class Measure(ABC):
    """One thing that is measured with every row of R.

    Attributes:
        name: Of its seconds in the log.
    """

    name: str

    @abstractmethod
    def at_row(self, place: Place) -> Reading:
        """Look at the model as it stands; it is left as it was."""

    def resume_(self, rows: Sequence[str], table: Callable[[str], list[list[Any]]]) -> None:  # noqa: B027
        """Go on in a run of which these rows of R are done; `table` reads the rows of a table that it kept.

        Raises:
            FeatclError: If a table that is needed is not there.
        """
