"""How well each experience is predicted just before it is learned: its likelihood, and the share of right replies.

One forward for each; the base model's likelihoods of a task are scored together, when its first experience comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from featcl.evaluation.forward import Targeted, target_batches
from featcl.evaluation.material import as_held
from featcl.evaluation.online import BASE_NLL, NLL, SCORE, TOKENS
from featcl.evaluation.scoring import heldout_nll, weighted_nll
from featcl.streams import Chat, Trajectory, encode_trajectory
from featcl.streams.chat import Mask


class BeforeLearning:
    """Scores of experiences by the model that has learned from those before them.

    Args:
        adapter: A `ConstrainedAdapter`; switched off, it is the base model.
        chat: The chat form of its tokenizer.
        tasks: Task -> its trajectories; those that the model plays itself are not among them.
        length: Longest window in tokens.
        max_windows: At most so many windows of a longer trajectory.
        mask: What is learned from; replies are scored where it is `assistant`.
        answering: How questions are answered now; None where no method has a say.
    """

    def __init__(
        self, adapter: Any, chat: Chat, tasks: Mapping[str, Sequence[Trajectory]], *, length: int, max_windows: int,
        mask: Mask, answering: Callable[[], Any],
    ) -> None:  # fmt: skip
        self.adapter, self.chat, self.mask, self.answering = adapter, chat, mask, answering
        self._encode = partial(encode_trajectory, chat=chat, max_length=length, mask=mask, max_windows=max_windows)
        self._tasks = {task: {each.id: each for each in found} for task, found in tasks.items()}
        self._base: tuple[str, dict[str, float]] = ("", {})

    def prepare(self, task: str) -> None:
        """Score a task's experiences with the base model; done again where a run is resumed in the middle of it."""
        if self._base[0] == task or not self._tasks.get(task):
            return
        found = {id: self._encode(each).windows for id, each in self._tasks[task].items()}
        with self.adapter.disabled():
            nlls = iter(heldout_nll(self.adapter.model, [window for each in found.values() for window in each]))
        self._base = (task, {id: weighted_nll([next(nlls) for _ in each], each) for id, each in found.items()})

    def score(self, trajectory: Trajectory, task: str) -> dict[str, float]:
        """`online/…` of an experience of a task; of an episode that the model has played, its reward."""
        if trajectory.id not in self._tasks.get(task, {}):
            return {} if trajectory.reward is None else {SCORE: trajectory.reward}
        windows = self._encode(trajectory).windows
        nll, right = self._now(trajectory, task, windows)
        replies = {SCORE: sum(right) / len(right)} if trajectory.text is None and self.mask == "assistant" else {}
        tokens = sum(sum(window.loss_mask[1:]) for window in windows)
        self.prepare(task)
        return {**replies, NLL: nll, TOKENS: tokens, BASE_NLL: self._base[1][trajectory.id]}

    def _now(self, trajectory: Trajectory, task: str, windows: Sequence[Targeted]) -> tuple[float, list[bool]]:
        """Nats per target token, and of each reply whether it is right."""
        answering, state = self.answering(), nullcontext()
        if answering is not None:
            held = as_held(trajectory, self._encode)
            asked = answering.asked(held.question, task)
            if held.windows is not None and asked is not held.question:
                windows = held.windows(asked)
            [(_, state)] = answering.grouped([held.question], [task])
        with state:
            return _read(self.adapter.model, windows, self.chat.stop_ids)


def _read(model: nn.Module, windows: Sequence[Targeted], stop_ids: frozenset[int]) -> tuple[float, list[bool]]:
    """Nats per target token, and of each run of targets whether the most likely tokens are the targets.

    At the end of a run, which is the end of a reply, any token that ends a turn is right.
    """
    total, tokens = 0.0, 0
    right: list[bool] = []
    stops = torch.tensor(sorted(stop_ids))
    for batch in target_batches(model, windows):
        log_p = batch.logits.float().log_softmax(-1)
        total -= float(log_p.gather(-1, batch.targets[:, None]).sum(dtype=torch.float64))
        tokens += len(batch.targets)
        likely, targets = batch.logits.argmax(-1).cpu(), batch.targets.cpu()
        same = (likely == targets) | (torch.isin(likely, stops) & torch.isin(targets, stops))
        start = 0
        for owner in batch.owner.unique_consecutive().tolist():
            for length in _runs(windows[owner].loss_mask):
                right.append(bool(same[start : start + length].all()))
                start += length
    return total / tokens, right


def _runs(mask: Sequence[bool]) -> list[int]:
    """Lengths of the runs of targets after the first position."""
    edges = [place for place in range(1, len(mask)) if mask[place] and (place == 1 or not mask[place - 1])]
    ends = [place for place in range(1, len(mask)) if mask[place] and (place == len(mask) - 1 or not mask[place + 1])]
    return [end - start + 1 for start, end in zip(edges, ends, strict=True)]
