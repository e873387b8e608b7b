"""What a method's arguments must be, in one line each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from featcl.errors import FeatclError

T = TypeVar("T")


def positive(method: str, /, **values: float) -> None:
    """Raise FeatclError unless every value is a positive, finite number."""
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise FeatclError(f"{method}: {name} must be a positive number, not {value!r}")


def share(method: str, /, **values: float) -> None:
    """Raise FeatclError unless every value is a number above 0 and at most 1."""
    positive(method, **values)
    for name, value in values.items():
        if value > 1:
            raise FeatclError(f"{method}: {name} must be above 0 and at most 1, not {value!r}")


def count(method: str, /, **values: int | None) -> None:
    """Raise FeatclError unless every value is a whole number of at least 1, or None."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise FeatclError(f"{method}: {name} must be a whole number of at least 1, not {value!r}")


def choice(method: str, options: Sequence[str], /, **values: str) -> None:
    """Raise FeatclError unless every value is one of the options."""
    for name, value in values.items():
        if value not in options:
            raise FeatclError(f"{method}: {name} {value!r} is not available: there is {', '.join(options)}")


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, evenly spread over them, in order; all where there is no limit."""
    if limit is None or len(items) <= limit:
        return list(items)
    last = max(limit - 1, 1)
    return [items[round(index * (len(items) - 1) / last)] for index in range(limit)]
