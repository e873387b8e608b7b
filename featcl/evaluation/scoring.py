"""Scores of graded items and of held-out text.

An item with an exact answer needs no generation: the greedy reply is the answer exactly if, with the answer given as
input, the most likely token is the next answer token at every position, the end of the turn included. Only code that
is not word for word the answer is generated and graded for what it means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from featcl.errors import FeatclError
from featcl.evaluation.forward import Targeted, target_batches
from featcl.lab.items import Item, grade


@dataclass(frozen=True)
class Reply:
    """A prompt with the reply that is right: ids, and True where a token of the reply stands."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    @property
    def prompt(self) -> list[int]:
        """The ids before the reply."""
        return list(self.input_ids[: self.loss_mask.index(True)])


class ItemScorer:
    """Tokenises items once and scores any number of models on them.

    Args:
        chat: The chat form of the model's tokenizer (`featcl.streams.chat.Chat`).
        items: Questions with their answers.
        batch_tokens: Padded tokens per forward.
    """

    def __init__(self, chat: Any, items: Sequence[Item], *, batch_tokens: int = 4096) -> None:
        self.chat = chat
        self.items = tuple(items)
        self.batch_tokens = batch_tokens
        self.replies = [encode_item(chat, item) for item in self.items]

    def score(self, model: nn.Module, answering: Any = None, *, tasks: Sequence[str] | None = None) -> list[bool]:
        """Whether the greedy reply to each item is right, in the order of the items.

        Args:
            model: A causal language model, adapted or not.
            answering: How questions are answered with methods (`featcl.methods.answering.Answering`); None: as they
                are asked, by the model as it is.
            tasks: Where each item comes from, for methods that are told; None: its own task.
        """
        if answering is None:
            return self._right(model, range(len(self.items)), self.replies)
        known = [item.task for item in self.items] if tasks is None else list(tasks)
        replies = self.asked(answering, known)
        right = [False] * len(self.items)
        for places, state in answering.grouped([item.messages for item in self.items], known):
            with state:
                found = self._right(model, places, [replies[place] for place in places])
            for place, value in zip(places, found, strict=True):
                right[place] = value
        return right

    def asked(self, answering: Any, tasks: Sequence[str]) -> list[Reply]:
        """Every item as the model is asked it, with what methods put in front."""
        found = []
        for item, reply, task in zip(self.items, self.replies, tasks, strict=True):
            messages = answering.asked(item.messages, task)
            same = messages is item.messages
            found.append(reply if same else encode_item(self.chat, replace(item, messages=tuple(messages))))
        return found

    def _right(self, model: nn.Module, places: Sequence[int], replies: Sequence[Reply]) -> list[bool]:
        """Of the items at these places, as they are asked."""
        right = word_for_word(model, replies, stop_ids=self.chat.stop_ids, batch_tokens=self.batch_tokens)
        unsure = [n for n, place in enumerate(places) if self.items[place].grader == "code" and not right[n]]
        said = self._generate(model, [replies[n] for n in unsure])
        for n, reply in zip(unsure, said, strict=True):
            right[n] = grade(self.items[places[n]], reply)
        return right

    def _generate(self, model: nn.Module, replies: Sequence[Reply]) -> list[str]:
        """Greedy replies, in batches of prompts of like length; twice the right answer's length is room enough."""
        from featcl.streams.rollouts import generate

        texts: dict[int, str] = {}
        order = sorted(range(len(replies)), key=lambda index: len(replies[index].prompt))
        lengths = {index: sum(reply.loss_mask) for index, reply in enumerate(replies)}
        pad = self.chat.tokenizer.pad_token_id
        while order:
            longest = len(replies[order[-1]].prompt) + 2 * max(lengths.values()) + 8
            batch, order = order[: max(1, self.batch_tokens // longest)], order[max(1, self.batch_tokens // longest) :]
            rollout = generate(
                model,
                [replies[index].prompt for index in batch],
                max_new_tokens=2 * max(lengths[index] for index in batch) + 8,
                temperature=0.0,
                stop_ids=self.chat.stop_ids,
                pad_id=0 if pad is None else pad,
                generator=None,
            )
            texts |= {i: self.chat.decode_reply(ids) for i, ids in zip(batch, rollout.token_ids, strict=True)}
        return [texts[index] for index in range(len(replies))]


def score_items(model: nn.Module, chat: Any, items: Sequence[Item], *, batch_tokens: int = 4096) -> list[bool]:
    """Whether the model's greedy reply to each item is right.

    Keep an `ItemScorer` where the same items are scored again: it tokenises once.

    Args:
        model: A causal language model, adapted or not.
        chat: The chat form of its tokenizer.
        items: Questions with their answers.
        batch_tokens: Padded tokens per forward.

    Returns:
        One truth value per item, in order.
    """
    return ItemScorer(chat, items, batch_tokens=batch_tokens).score(model)


def heldout_nll(model: nn.Module, encoded: Sequence[Targeted], *, batch_tokens: int = 4096) -> list[float]:
    """Negative log-likelihood of the target tokens of each window, in nats per token.

    Args:
        model: A causal language model, adapted or not.
        encoded: Windows of held-out text with their target masks.
        batch_tokens: Padded tokens per forward.

    Returns:
        One mean per window, in order; `weighted_nll` joins them to a mean over all tokens.
    """
    total = torch.zeros(len(encoded), dtype=torch.float64)
    count = torch.zeros(len(encoded), dtype=torch.float64)
    for batch in target_batches(model, encoded, batch_tokens=batch_tokens):
        loss = torch.cat(
            [
                nn.functional.cross_entropy(logits.float(), targets, reduction="none")
                for logits, targets in zip(batch.logits.split(1024), batch.targets.split(1024), strict=True)
            ]
        )
        total.index_add_(0, batch.owner, loss.double().cpu())
        count.index_add_(0, batch.owner, torch.ones(len(loss), dtype=torch.float64))
    return (total / count).tolist()


def weighted_nll(nlls: Sequence[float], encoded: Sequence[Targeted]) -> float:
    """Mean over all target tokens of several windows, from each window's own mean."""
    weights = [sum(window.loss_mask[1:]) for window in encoded]
    if not sum(weights):
        raise FeatclError("no target token in any window; nothing to average")
    return sum(nll * weight for nll, weight in zip(nlls, weights, strict=True)) / sum(weights)


def lasting_items(items: Sequence[Item], n_tasks: int) -> tuple[Item, ...]:
    """The items whose answer still holds after a stream of `n_tasks` tasks; superseded ones leave R."""
    return tuple(item for item in items if item.valid_until is None or item.valid_until >= n_tasks)


def encode_item(chat: Any, item: Item) -> Reply:
    """Prompt and right reply of an item as ids, with the reply as the target.

    Raises:
        FeatclError: If the reply does not end in a token that ends the turn: then word for word would not be enough.
    """
    prompt, reply = chat.prompt(item.messages), chat.reply_ids(item.answer)
    if not prompt or not reply or reply[-1] not in chat.stop_ids:
        raise FeatclError(
            f"item {item.id!r} ({item.task}): its reply has no turn-ending token; check the chat template"
        )
    return Reply((*prompt, *reply), (False,) * len(prompt) + (True,) * len(reply))


def word_for_word(
    model: nn.Module, replies: Sequence[Reply], *, stop_ids: frozenset[int], batch_tokens: int = 4096
) -> list[bool]:
    """Whether greedy decoding would give each reply token for token; any token that ends a turn may end it."""
    right = torch.ones(len(replies), dtype=torch.bool)
    for batch in target_batches(model, replies, batch_tokens=batch_tokens):
        right[batch.owner[~agreement(batch, stop_ids).cpu()]] = False
    return right.tolist()


def agreement(batch: Any, stop_ids: frozenset[int]) -> torch.Tensor:
    """Per target, whether the most likely token is the target, or ends the turn where the target is the last."""
    likely = batch.logits.argmax(dim=-1)
    stops = torch.tensor(sorted(stop_ids), device=likely.device)
    return (likely == batch.targets) | (batch.last.to(likely.device) & torch.isin(likely, stops))
