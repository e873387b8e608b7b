"""A pool of items that a guard draws from, and how much of each the model has lost since the base model.

Every look draws anew, whatever the model then is, from at least `LEAST` items that were chosen before any learning:
then the mean loss of a draw is in expectation that of the whole pool, which is what the test of `featcl.learning.
eprocess` needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.evaluation.board import Held
from featcl.evaluation.forward import TargetBatch, Targeted, target_batches
from featcl.evaluation.scoring import agreement, encode_item
from featcl.lab.items import Item
from featcl.streams.windows import cut_windows

LEAST = 1000
WINDOW = 64  # tokens of an item that is cut out of text
NO_TASK = "(no task)"  # where methods are told that an item comes from: it is of no task of any stream
Measure = Literal["reply", "answers", "tokens"]


class Pool:
    """Items with the base model's score of each.

    Three scores, all in [0, 1]:

        reply     probability of the whole reply: how often sampling would be right; it falls before answers flip
        answers   1 if the greedy reply is right word for word, else 0: what is lost are items right before, wrong now
        tokens    mean probability of the target tokens; for text, where no whole window is ever likely

    Loss of an item: max(0, base score − score now). What was gained elsewhere does not make up for it.

    Args:
        model: The base model (an adapter switched off, or still at its zero start).
        sequences: Prompts with their replies, or windows of text; chosen without a look at any learner.
        held: The same as methods see them, one for each; needed where methods answer.
        measure: `reply`, `answers` or `tokens`.
        stop_ids: Tokens that end a turn; for `answers`.
        batch_tokens: Padded tokens per forward.

    Raises:
        FeatclError: If there are fewer than `LEAST` sequences, or an unknown measure.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequence[Targeted],
        *,
        held: Sequence[Held] = (),
        measure: Measure = "reply",
        stop_ids: frozenset[int] = frozenset(),
        batch_tokens: int = 4096,
    ) -> None:
        if len(sequences) < LEAST:
            raise FeatclError(
                f"guard: a pool of {len(sequences)} items; its test needs at least {LEAST}, since it draws fresh ones "
                "for every look"
            )
        if measure not in get_args(Measure):
            raise FeatclError(f"guard: measure {measure!r} is not one of {', '.join(get_args(Measure))}")
        self.sequences, self.held = tuple(sequences), tuple(held)
        self.measure: Measure = measure
        self.stop_ids = stop_ids
        self.batch_tokens = batch_tokens
        self.base = self._scores(model, self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
        """Indices of `count` different items, all equally likely.

        Raises:
            FeatclError: If the pool has not as many.
        """
        if not 1 <= count <= len(self):
            raise FeatclError(f"guard: {count} items per look from a pool of {len(self)}; draw between 1 and that many")
        return torch.randperm(len(self), generator=generator)[:count]

    def losses(
        self, model: nn.Module, chosen: Int[Tensor, " count"], *, answering: Any = None
    ) -> Float[Tensor, " count"]:
        """max(0, base score − score now) of the chosen items, each in [0, 1].

        Args:
            model: The model as it is now.
            chosen: Indices of items.
            answering: How questions are answered with methods (`featcl.methods.answering.Answering`); None: as they
                are asked, by the model as it is.

        Raises:
            FeatclError: If the model's predictions are not finite, or methods answer and the pool does not know what
                its items ask.
        """
        places = chosen.tolist()
        if answering is None:
            now = self._scores(model, [self.sequences[place] for place in places])
        else:
            now = self._answered(model, places, answering)
        lost = (self.base[chosen] - now).clamp(min=0.0)
        if not bool(torch.isfinite(lost).all()):
            raise FeatclError("guard: the model's predictions on the pool are not finite; lower the learning rate")
        return lost

    def _answered(self, model: nn.Module, chosen: Sequence[int], answering: Any) -> Float[Tensor, " count"]:
        """The scores of the chosen items, as they are asked and by the adapter that answers them."""
        if len(self.held) != len(self.sequences):
            raise FeatclError("guard: methods answer, and the pool has no questions for them; give it `held`")
        held = [self.held[place] for place in chosen]
        asked = [self._asked(place, answering) for place in chosen]
        found = torch.zeros(len(chosen), dtype=torch.float64)
        for places, state in answering.grouped([each.question for each in held], [NO_TASK] * len(held)):
            with state:
                found[list(places)] = self._scores(model, [asked[place] for place in places])
        return found

    def _asked(self, place: int, answering: Any) -> Targeted:
        """An item with what methods put in front; nothing stands in front of text."""
        held = self.held[place]
        asked = held.question if held.windows is None else answering.asked(held.question, NO_TASK)
        if held.windows is None or asked is held.question:
            return self.sequences[place]
        [found] = held.windows(asked)
        return found

    def _scores(self, model: nn.Module, sequences: Sequence[Targeted]) -> Float[Tensor, " count"]:
        """The score of each, in float64."""
        total = torch.zeros(len(sequences), dtype=torch.float64)
        for batch in target_batches(model, sequences, batch_tokens=self.batch_tokens):
            total.index_add_(0, batch.owner, self._of_targets(batch).double().cpu())
        if self.measure == "reply":
            return total.exp()
        if self.measure == "answers":
            return (total == 0).double()
        return total / torch.tensor([sum(sequence.loss_mask[1:]) for sequence in sequences], dtype=torch.float64)

    def _of_targets(self, batch: TargetBatch) -> Float[Tensor, " targets"]:
        """Per target: its log-probability, whether it is wrong, or its probability; summed over a sequence."""
        if self.measure == "answers":
            return ~agreement(batch, self.stop_ids)
        chosen = batch.logits.float().log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
        return chosen if self.measure == "reply" else chosen.exp()


def item_pool(
    model: nn.Module, chat: Any, items: Sequence[Item], *, measure: Measure = "reply", batch_tokens: int = 4096
) -> Pool:
    """A pool of graded items; see `Pool`."""

    def held(item: Item) -> Held:
        return Held(item.messages, lambda asked: [encode_item(chat, replace(item, messages=tuple(asked)))])

    encoded = [encode_item(chat, item) for item in items]
    return Pool(
        model, encoded, held=[held(item) for item in items], measure=measure, stop_ids=chat.stop_ids,
        batch_tokens=batch_tokens,
    )  # fmt: skip


def text_pool(model: nn.Module, chat: Any, blocks: Sequence[str], *, count: int) -> Pool:
    """A pool of windows of held-out text, of `WINDOW` tokens each, spread evenly over the blocks; scored by `tokens`.

    Args:
        model: The base model.
        chat: The chat form of its tokenizer.
        blocks: Text that is never learned from.
        count: How many windows; all there are if they are fewer, but not fewer than `LEAST`.

    Raises:
        FeatclError: If there is too little text.
    """
    found = [
        (window, Held(({"role": "user", "content": block},)))
        for block in blocks
        for window in cut_windows(chat.encode_text(block), max_length=WINDOW, start=chat.start_id).windows
        if sum(window.loss_mask[1:]) >= WINDOW // 4  # the mean over a few tokens says little
    ]
    if len(found) < LEAST:
        raise FeatclError(
            f"guard: features.background holds out {len(found)} windows of {WINDOW} tokens in its last fifth; its test "
            f"needs {LEAST}, so give it more text of what must not be forgotten"
        )
    step = max(1.0, len(found) / count)
    chosen = [found[int(index * step)] for index in range(min(count, len(found)))]
    windows, held = zip(*chosen, strict=True)
    return Pool(model, windows, held=held, measure="tokens")


def lab_items(count: int, *, seed: int, without: Sequence[Item] = ()) -> tuple[Item, ...]:
    """Fresh items of the laboratory's general suite, as many of each skill as there are, at least `count` in all.

    Args:
        count: How many; a few more come where it does not divide evenly.
        seed: Another seed gives other items; the suites of R have their own.
        without: Items with these questions are left out (those that R scores).

    Raises:
        FeatclError: If the laboratory has not as many.
    """
    from featcl.lab.skills import SKILLS
    from featcl.lab.suites import load_suite

    asked = {_question(item) for item in without}
    each = -(-count // len(SKILLS))
    for per_skill in (2 * each, 4 * each, 8 * each):
        found = [item for item in load_suite(items=per_skill, seed=seed) if _question(item) not in asked]
        chosen = _level(found, count)
        if len(chosen) >= count:
            return chosen
    raise FeatclError(f"guard: the laboratory has {len(chosen)} fresh items, not {count}; ask for fewer")


def _level(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """As many of each skill as it takes to get `count`: skills with few items give all they have."""
    skills: dict[str, list[Item]] = {}
    for item in items:
        skills.setdefault(item.task, []).append(item)
    share = 1
    while sum(min(share, len(found)) for found in skills.values()) < min(count, len(items)):
        share += 1
    return tuple(item for found in skills.values() for item in found[:share])


def _question(item: Item) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in item.messages)
