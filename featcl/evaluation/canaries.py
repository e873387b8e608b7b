"""A small fixed set of items, scored every N updates: loss, KL to the base model, and which answers flipped.

The curves are descriptive. A fixed set is looked at again and again, so no alarm is raised from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from featcl.errors import FeatclError
from featcl.evaluation.forward import TargetBatch, Targeted, target_batches
from featcl.evaluation.scoring import agreement, encode_item
from featcl.lab.items import Item


@dataclass(frozen=True)
class CanaryReading:
    """One look at the canaries.

    Attributes:
        loss: Group ("tasks", "general") -> nats per target token.
        kl_to_base: Group -> KL(base || now) in nats per target token; 0 exactly for the base model.
        score: Task or suite -> share of right answers; for text without answers, minus the nats per token.
        forgetting: Task -> best score so far, base included, minus the score now (positive = forgotten).
        right_to_wrong: Ids of items that the base model had right and that are wrong now.
        wrong_to_right: The other way round.
    """

    loss: Mapping[str, float]
    kl_to_base: Mapping[str, float]
    score: Mapping[str, float]
    forgetting: Mapping[str, float]
    right_to_wrong: tuple[str, ...]
    wrong_to_right: tuple[str, ...]

    def record(self) -> dict[str, float]:
        """Flat scalars by the names that the trackers use."""
        suites = {name: value for name, value in self.score.items() if name not in self.forgetting}
        return {
            **{f"canary/loss_{group}": value for group, value in self.loss.items()},
            **{f"canary/kl_{group}": value for group, value in self.kl_to_base.items()},
            **{f"score/{task}": self.score[task] for task in self.forgetting},
            **{f"forgetting/{task}": value for task, value in self.forgetting.items()},
            **{f"general/{suite}": value for suite, value in suites.items()},
            "canary/right_to_wrong": len(self.right_to_wrong),
            "canary/wrong_to_right": len(self.wrong_to_right),
        }


@dataclass(frozen=True)
class _Group:
    """A task, a suite or a source: where its sequences lie in the list of all."""

    name: str
    general: bool
    graded: bool
    start: int
    stop: int


class Canaries:
    """Scores a fixed set of items and windows of text; the base model's logits are kept.

    Code items count as right here when they are right word for word; R grades what they mean.

    Args:
        model: The base model (an adapter switched off, or still at its zero start).
        chat: The chat form of its tokenizer.
        items: Items of the stream's tasks; grouped by `item.task`.
        suites: Name -> items of general ability.
        windows: Source -> encoded text to learn from, where there are no graded items.
        background: Name -> encoded text that should stay as likely as it was.
        questions: Name -> what each text opens with, as messages: by it methods know which adapter answers.
        batch_tokens: Padded tokens per forward.

    Raises:
        FeatclError: If there is nothing to score, or two items have one id.
    """

    def __init__(
        self,
        model: nn.Module,
        chat: Any,
        items: Sequence[Item] = (),
        *,
        suites: Mapping[str, Sequence[Item]] | None = None,
        windows: Mapping[str, Sequence[Targeted]] | None = None,
        background: Mapping[str, Sequence[Targeted]] | None = None,
        questions: Mapping[str, Sequence[Sequence[Any]]] | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        self.chat = chat
        self.batch_tokens = batch_tokens
        self._questions = questions or {}
        self._sequences: list[Targeted] = []
        self._items: list[Item | None] = []
        self._ids: list[str] = []
        self._groups: list[_Group] = []
        for task in dict.fromkeys(item.task for item in items):
            self._add_items(task, [item for item in items if item.task == task], general=False)
        for name, members in (suites or {}).items():
            self._add_items(name, members, general=True)
        for name, texts in (windows or {}).items():
            self._add_group(name, texts, general=False)
        for name, texts in (background or {}).items():
            self._add_group(name, texts, general=True)
        self._check()
        self._base: list[torch.Tensor] = [torch.empty(0)] * len(self._sequences)  # logits of each sequence
        for batch in target_batches(model, self._sequences, batch_tokens=batch_tokens):
            places, counts = batch.owner.unique_consecutive(return_counts=True)
            for place, logits in zip(places.tolist(), batch.logits.split(counts.tolist()), strict=True):
                self._base[place] = logits
        self._base_right, _, score = self._measure(model)
        self._first = {name: value for name, value in score.items() if not self._group(name).general}
        self._best = dict(self._first)

    def score(self, model: nn.Module, answering: Any = None) -> CanaryReading:
        """Score the canaries now, and remember each task's best score for its forgetting.

        Args:
            model: The model as it is now.
            answering: How questions are answered with methods (`featcl.methods.answering.Answering`); nothing stands in
                front of text. None: as they are asked, by the model as it is.
        """
        right, sums, score = self._measure(model, answering)
        self._best = {name: max(best, score[name]) for name, best in self._best.items()}
        loss, kl = self._by_kind(sums)
        lost = [name for name, was, now in zip(self._ids, self._base_right, right, strict=True) if was and not now]
        won = [name for name, was, now in zip(self._ids, self._base_right, right, strict=True) if now and not was]
        return CanaryReading(
            loss=loss,
            kl_to_base=kl,
            score=score,
            forgetting={name: best - score[name] for name, best in self._best.items()},
            right_to_wrong=tuple(lost),
            wrong_to_right=tuple(won),
        )

    def restart_(self) -> None:
        """The model is the base model again: nothing has been learned that could be forgotten."""
        self._best = dict(self._first)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs to repeat itself: each task's best score so far."""
        return dict(self._best)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`.

        Raises:
            FeatclError: If it belongs to other tasks.
        """
        if set(state) != set(self._best):
            raise FeatclError(f"canary state is of tasks {sorted(state)}; these canaries have {sorted(self._best)}")
        self._best = {name: float(state[name]) for name in self._best}

    def _add_items(self, name: str, items: Sequence[Item], *, general: bool) -> None:
        self._add_group(name, [encode_item(self.chat, item) for item in items], general=general, graded=True)
        self._ids[-len(items) :] = [item.id for item in items]
        self._items[-len(items) :] = items

    def _add_group(self, name: str, texts: Sequence[Targeted], *, general: bool, graded: bool = False) -> None:
        if not texts:
            raise FeatclError(f"canaries of {name!r} are empty; leave it out or give it items")
        start = len(self._sequences)
        self._groups.append(_Group(name, general, graded, start, start + len(texts)))
        self._sequences += texts
        self._items += [None] * len(texts)
        self._ids += [f"{name}#{index}" for index in range(len(texts))]

    def _check(self) -> None:
        if not self._groups:
            raise FeatclError("canaries need items, suites or text; none was given")
        names = [group.name for group in self._groups]
        for kind, values in (("group", names), ("item id", self._ids)):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise FeatclError(f"canaries hold the {kind} {twice!r} twice; each needs its own")

    def _group(self, name: str) -> _Group:
        return next(group for group in self._groups if group.name == name)

    def _measure(self, model: nn.Module, answering: Any = None) -> tuple[list[bool], torch.Tensor, dict[str, float]]:
        """Right or wrong per sequence, its sums (loss, KL, tokens), and the score of each group."""
        right = torch.ones(len(self._sequences), dtype=torch.bool)
        sums = torch.zeros(len(self._sequences), 3, dtype=torch.float64)
        for batch in self._batches(model, answering):
            base = torch.cat([self._base[place] for place in batch.owner.unique_consecutive().tolist()])
            sums.index_add_(0, batch.owner, _loss_and_kl(batch, base).cpu())
            right[batch.owner[~agreement(batch, self.chat.stop_ids).cpu()]] = False
        score = {}
        for group in self._groups:
            loss, _, tokens = sums[group.start : group.stop].sum(0).tolist()
            score[group.name] = (
                right[group.start : group.stop].double().mean().item() if group.graded else -loss / tokens
            )
            if not group.graded:
                right[group.start : group.stop] = False  # text is neither right nor wrong, so it cannot flip
        return right.tolist(), sums, score

    def _batches(self, model: nn.Module, answering: Any) -> Iterator[TargetBatch]:
        """All sequences, as they are asked and by the adapter that answers them."""
        if answering is None:
            yield from target_batches(model, self._sequences, batch_tokens=self.batch_tokens)
            return
        questions, tasks = self._asking()
        sequences = [self._asked(place, answering, task) for place, task in enumerate(tasks)]
        for places, state in answering.grouped(questions, tasks):
            with state:
                asked = [sequences[place] for place in places]
                for batch in target_batches(model, asked, batch_tokens=self.batch_tokens):
                    yield replace(batch, owner=torch.tensor(places)[batch.owner])

    def _asking(self) -> tuple[list[Sequence[Any]], list[str]]:
        """What each sequence asks, and the task or suite that it is of."""
        questions: list[Sequence[Any]] = []
        tasks: list[str] = []
        for group in self._groups:
            for place in range(group.start, group.stop):
                item = self._items[place]
                questions.append(self._questions[group.name][place - group.start] if item is None else item.messages)
                tasks.append(group.name)
        return questions, tasks

    def _asked(self, place: int, answering: Any, task: str) -> Targeted:
        """A sequence with what methods put in front."""
        item = self._items[place]
        asked = () if item is None else answering.asked(item.messages, task)
        if item is None or asked is item.messages:
            return self._sequences[place]
        return encode_item(self.chat, replace(item, messages=tuple(asked)))

    def _by_kind(self, sums: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
        loss, kl = {}, {}
        for kind, general in (("tasks", False), ("general", True)):
            rows = [sums[group.start : group.stop] for group in self._groups if group.general == general]
            if rows:
                total = torch.cat(rows).sum(0)
                loss[kind], kl[kind] = (total[:2] / total[2]).tolist()
        return loss, kl


def _loss_and_kl(batch: TargetBatch, base: torch.Tensor) -> torch.Tensor:
    """[targets, 3] per target: -log p(target); KL(base || now) = sum_v b_v (log b_v - log p_v); and 1."""
    now = batch.logits.float().log_softmax(-1)
    reference = base.float().log_softmax(-1)
    loss = -now.gather(-1, batch.targets[:, None])[:, 0]
    kl = (reference.exp() * (reference - now)).sum(-1)
    return torch.stack([loss.double(), kl.double(), torch.ones_like(loss).double()], dim=-1)
