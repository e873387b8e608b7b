"""What a run measures after every task: the columns of R, and one score per item of each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from featcl.errors import FeatclError
from featcl.evaluation.forward import Targeted
from featcl.evaluation.matrix import Measure, ScoreMatrix
from featcl.evaluation.scoring import ItemScorer, heldout_nll, weighted_nll
from featcl.lab.items import Item


@runtime_checkable
class Board(Protocol):
    """Scores a model on every column of R."""

    measure: Measure

    def score(self, model: nn.Module, answering: Any = None) -> dict[str, dict[str, float]]:
        """Column -> item id -> score; a column without items is left out.

        Args:
            model: A causal language model, adapted or not.
            answering: How questions are answered with methods (`featcl.methods.answering.Answering`); None: as they
                are asked, by the model as it is.
        """
        ...

    def targets(self, item: str) -> tuple[Targeted, ...]:
        """The text of an item with its targets: the right answer, or the held-out tokens."""
        ...


class GradedBoard:
    """Graded items: 1 where the greedy reply is right, 0 where it is wrong.

    Args:
        chat: The chat form of the model's tokenizer.
        columns: Column -> its items.
    """

    measure: Measure = "accuracy"

    def __init__(self, chat: Any, columns: Mapping[str, Sequence[Item]]) -> None:
        for column, items in columns.items():
            _check_ids(column, [item.id for item in items])
        self._places = [(column, item.id) for column, items in columns.items() for item in items]
        self._scorer = ItemScorer(chat, [item for items in columns.values() for item in items])

    def score(self, model: nn.Module, answering: Any = None) -> dict[str, dict[str, float]]:
        scores: dict[str, dict[str, float]] = {}
        found = self._scorer.score(model, answering, tasks=[column for column, _ in self._places])
        for (column, item), right in zip(self._places, found, strict=True):
            scores.setdefault(column, {})[item] = float(right)
        return scores

    def targets(self, item: str) -> tuple[Targeted, ...]:
        return (self._scorer.replies[_place(self._places, item)],)


@dataclass(frozen=True, eq=False)
class Held:
    """Held-out text as methods see it.

    Attributes:
        question: What is asked first, as messages: by it a method knows what stands in front and which adapter answers.
        windows: From what is asked in the place of the question to the windows; None for raw text, in front of which
            nothing stands.
    """

    question: Sequence[Any]
    windows: Callable[[Sequence[Any]], Sequence[Targeted]] | None = None


class LikelihoodBoard:
    """Held-out text: nats per target token of each trajectory or document, lower is better.

    Args:
        columns: Column -> item id -> the windows of that item.
        held: Column -> item id -> the same as methods see it; needed where methods answer.
    """

    measure: Measure = "nll"

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Sequence[Targeted]]],
        *,
        held: Mapping[str, Mapping[str, Held]] | None = None,
    ) -> None:
        self._items = [(column, item, tuple(w)) for column, items in columns.items() for item, w in items.items()]
        if not self._items:
            raise FeatclError("nothing is held out: the stream needs at least two trajectories of a source")
        self._held = held or {}

    def score(self, model: nn.Module, answering: Any = None) -> dict[str, dict[str, float]]:
        if answering is None:
            values = _nlls(model, [windows for _, _, windows in self._items])
        else:
            values = self._answered(model, answering)
        scores: dict[str, dict[str, float]] = {}
        for (column, item, _), value in zip(self._items, values, strict=True):
            scores.setdefault(column, {})[item] = value
        return scores

    def _answered(self, model: nn.Module, answering: Any) -> list[float]:
        """The same with methods."""
        held = [self._held[column][item] for column, item, _ in self._items]
        asked = [self._asked(place, each, answering) for place, each in enumerate(held)]
        values = [math.nan] * len(held)
        for places, state in answering.grouped(
            [each.question for each in held], [column for column, _, _ in self._items]
        ):
            with state:
                found = _nlls(model, [asked[place] for place in places])
            for place, value in zip(places, found, strict=True):
                values[place] = value
        return values

    def _asked(self, place: int, held: Held, answering: Any) -> Sequence[Targeted]:
        """The windows of an item with what methods put in front."""
        if held.windows is None:
            return self._items[place][2]
        asked = answering.asked(held.question, self._items[place][0])
        return self._items[place][2] if asked is held.question else held.windows(asked)

    def targets(self, item: str) -> tuple[Targeted, ...]:
        return self._items[_place([(column, name) for column, name, _ in self._items], item)][2]


def _nlls(model: nn.Module, items: Sequence[Sequence[Targeted]]) -> list[float]:
    """Nats per target token of each item, over all its windows."""
    nlls = iter(heldout_nll(model, [window for windows in items for window in windows]))
    return [weighted_nll([next(nlls) for _ in windows], windows) for windows in items]


def without_columns(matrix: ScoreMatrix, left_out: Sequence[str]) -> ScoreMatrix:
    """The same matrix without some of its columns that are not tasks, such as probes that should change."""
    kept = tuple(column for column in matrix.columns if column not in left_out)
    items = {column: items for column, items in matrix.items.items() if column in kept}
    chance = {column: value for column, value in matrix.chance.items() if column in kept}
    return ScoreMatrix(kept, matrix.n_tasks, matrix.measure, matrix.rows, items, chance=chance)


def _place(places: Sequence[tuple[str, str]], item: str) -> int:
    """Where an item is, given its id, or `column/id` where several columns have that id."""
    found = [at for at, (column, name) in enumerate(places) if item in (name, f"{column}/{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise FeatclError(f"item {item!r} is in several columns: give {places[found[0]][0]}/{item}, or another")
    near = difflib.get_close_matches(item, [name for _, name in places], n=3, cutoff=0.3)
    raise FeatclError(f"no item {item!r}; {'close to it: ' + ', '.join(near) if near else 'R.json lists them'}")


def _check_ids(column: str, ids: Sequence[str]) -> None:
    if len(set(ids)) != len(ids):
        twice = next(id for id in ids if list(ids).count(id) > 1)
        raise FeatclError(f"column {column!r}: the item id {twice!r} occurs twice; each item needs its own")
