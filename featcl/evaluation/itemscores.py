"""The scores of one column's items as one array, read like a mapping of item ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float

from featcl.errors import FeatclError
from featcl.evaluation.metrics import known_mean


class ItemScores(Mapping[str, tuple[float, ...]]):
    """Item id -> one score per row of R; NaN where it was not measured. It cannot be changed.

    Args:
        ids: Unique names of the items.
        values: Their scores, kept as `.array`.

    Raises:
        FeatclError: If two items have one id, or ids and scores differ in number.
    """

    def __init__(self, ids: Sequence[str], values: Float[np.ndarray, "rows items"]) -> None:
        self.ids = tuple(ids)
        self.array = values.view()
        self.array.flags.writeable = False
        if values.shape[1] != len(self.ids):
            raise FeatclError(f"{len(self.ids)} item ids for {values.shape[1]} columns of scores")
        if len(set(self.ids)) != len(self.ids):
            twice = next(name for name in self.ids if self.ids.count(name) > 1)
            raise FeatclError(f"the item id {twice!r} occurs twice; each item needs its own")

    @classmethod
    def of(cls, items: Mapping[str, Sequence[float | None]], *, rows: int) -> ItemScores:
        """From item id -> scores, None or NaN where one was not measured.

        Raises:
            FeatclError: If an item has not one score per row, or a score is no number.
        """
        if isinstance(items, ItemScores) and len(items.array) == rows:
            return items
        odd = next((item for item, scores in items.items() if len(scores) != rows), None)
        if odd is not None:
            raise FeatclError(f"item {odd!r} has {len(items[odd])} scores for {rows} rows")
        try:
            values = np.array(list(items.values()), dtype=float).reshape(len(items), rows)
        except (TypeError, ValueError) as error:
            raise FeatclError(f"a score is a number or null ({error})") from error
        return cls(tuple(items), np.ascontiguousarray(values.T))

    @cached_property
    def means(self) -> Float[np.ndarray, " rows"]:
        """Per row, the mean over the items that were measured; NaN where none was."""
        return known_mean(self.array)

    def with_row(self, scores: Mapping[str, float] | None) -> ItemScores:
        """One more row: these scores, or nothing measured.

        Args:
            scores: One for each item; for a column that has no items yet, of any.

        Raises:
            FeatclError: If the items are not those of the earlier rows (`odd item` is named).
        """
        if not self.ids and scores:
            before = np.full((len(self.array), len(scores)), np.nan)
            return ItemScores(tuple(scores), np.vstack([before, _row(tuple(scores), scores)]))
        if scores is None:
            return ItemScores(self.ids, np.vstack([self.array, np.full((1, len(self.ids)), np.nan)]))
        odd = sorted(set(self.ids) ^ set(scores))
        if odd:
            where = "new" if odd[0] in scores else "missing"
            raise FeatclError(f"item {odd[0]!r} is {where}; every row needs the same items")
        return ItemScores(self.ids, np.vstack([self.array, _row(self.ids, scores)]))

    def __getitem__(self, item: str) -> tuple[float, ...]:
        return tuple(self.array[:, self._places[item]].tolist())

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ItemScores):
            return super().__eq__(other)
        return self.ids == other.ids and np.array_equal(self.array, other.array, equal_nan=True)

    __hash__ = None  # type: ignore[assignment]

    def to_lists(self) -> list[list[float]]:
        """For each item its scores; the quick way to all of them."""
        return self.array.T.tolist()

    @cached_property
    def _places(self) -> dict[str, int]:
        return {item: place for place, item in enumerate(self.ids)}


def _row(ids: Sequence[str], scores: Mapping[str, float]) -> np.ndarray:
    return np.array([[scores[item] for item in ids]], dtype=float)
