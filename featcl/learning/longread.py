"""A long text read in three ways: whole, window by window, and window by window with a memory.

Nothing but the memory's state passes from one window to the next. At the end of a window its open chunk is closed, as a
learner does after each trajectory that it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featcl.learning.longtext import LongBatch, LongText
from featcl.objectives.experience import divergence_sum
from featcl.objectives.scoring import CHUNK_LOGITS, Scorer, TokenBatch, row_chunks

READERS = ("memory", "truncated", "full")
Hidden = list[Float[Tensor, "targets d_model"]]  # one per window


@torch.no_grad()
def full_hidden(scorer: Scorer, attached: Any, batch: LongBatch) -> Hidden:
    """Last hidden states at every window's targets of the model without memory, which reads the texts whole."""
    within = torch.cat([window.within for window in batch.windows])
    targets = torch.cat([window.targets for window in batch.windows])
    with attached.disabled():
        hidden = scorer.hidden(TokenBatch(batch.whole, within, targets))
    return list(hidden.split([len(window.targets) for window in batch.windows]))


def window_hidden(scorer: Scorer, attached: Any, batch: LongBatch, *, memory: bool = True) -> Hidden:
    """The same of the model that reads one window at a time.

    Args:
        scorer: The model.
        attached: Its memory, which starts empty, is written, and is left as it was.
        batch: The texts.
        memory: False: with the memory switched off nothing passes from window to window.
    """
    found = []
    with attached.using(None), attached.writing() if memory else attached.disabled():
        for window in batch.windows:
            output = scorer.trunk(input_ids=window.input_ids, attention_mask=window.real.long(), use_cache=False)
            found.append(output.last_hidden_state.flatten(0, 1).index_select(0, window.positions))
            if memory:
                attached.state = attached.memory.settle(attached.state)
    return found


def divergences(scorer: Scorer, student: Hidden, teacher: Hidden) -> list[Float[Tensor, ""]]:
    """Σ KL(teacher ‖ student) of every window."""
    return [divergence_sum(own, other, scorer, scorer, alpha=0.0) for own, other in zip(student, teacher, strict=True)]


@torch.no_grad()
def read_texts(scorer: Scorer, attached: Any, texts: Sequence[LongText], *, at_once: int = 32) -> Readings:
    """What the three readers make of texts of as many windows."""
    total = Readings()
    for start in range(0, len(texts), at_once):
        batch = LongBatch.of(texts[start : start + at_once], device=scorer.device)
        hidden = {
            "memory": window_hidden(scorer, attached, batch),
            "truncated": window_hidden(scorer, attached, batch, memory=False),
            "full": full_hidden(scorer, attached, batch),
        }
        total.add_(Readings.of(scorer, batch, hidden))
    return total


@dataclass(eq=False)
class Readings:
    """Sums over texts; windows are counted from the front.

    Attributes:
        tokens: Targets by window.
        nll: Reader -> Σ −log p of the targets by window, in nats.
        kl: Reader -> Σ KL(full ‖ reader) by window, in nats.
        right: Reader -> of each text, whether all targets of its last window were most likely.
        moved: Targets where the full context makes another token most likely than the truncated one.
        agreed: Those among them where the memory makes the full context's token most likely.
    """

    tokens: list[int] = field(default_factory=list)
    nll: dict[str, list[float]] = field(default_factory=dict)
    kl: dict[str, list[float]] = field(default_factory=dict)
    right: dict[str, list[bool]] = field(default_factory=dict)
    moved: int = 0
    agreed: int = 0

    @classmethod
    def of(cls, scorer: Scorer, batch: LongBatch, hidden: dict[str, Hidden]) -> Readings:
        """Of one batch, given every reader's last hidden states."""
        found = cls(tokens=[len(window.targets) for window in batch.windows])
        likely: dict[str, list[Tensor]] = {}
        for reader, states in hidden.items():
            scored = [_scored(scorer, own, window.targets) for own, window in zip(states, batch.windows, strict=True)]
            found.nll[reader] = [float(nll) for nll, _ in scored]
            found.kl[reader] = [float(kl) for kl in divergences(scorer, states, hidden["full"])]
            likely[reader] = [best for _, best in scored]
            last = batch.windows[-1]
            wrong = last.rows[likely[reader][-1] != last.targets]
            found.right[reader] = (~_among(wrong, len(batch.whole))).tolist()
        memory, truncated, full = (torch.cat(likely[reader]) for reader in READERS)
        found.moved = int((full != truncated).sum())
        found.agreed = int(((full != truncated) & (memory == full)).sum())
        return found

    def add_(self, other: Readings) -> None:
        """Another batch's."""
        self.tokens = _sums(self.tokens, other.tokens)
        for mine, others in ((self.nll, other.nll), (self.kl, other.kl)):
            mine |= {reader: _sums(mine.get(reader, []), values) for reader, values in others.items()}
        self.right = {reader: [*self.right.get(reader, []), *values] for reader, values in other.right.items()}
        self.moved, self.agreed = self.moved + other.moved, self.agreed + other.agreed

    def measures(self, *, asked: bool) -> dict[str, float]:
        """Means per target: loss by reader and window (`loss_full/window_2`), divergences, and what of it is closed."""
        tokens = sum(self.tokens)
        values = {
            f"loss_{reader}/window_{number}": nll / count
            for reader, sums in self.nll.items()
            for number, (nll, count) in enumerate(zip(sums, self.tokens, strict=True))
            if count
        }
        values |= {f"loss_{reader}": sum(sums) / tokens for reader, sums in self.nll.items()}
        kl = {reader: sum(self.kl[reader]) / tokens for reader in ("memory", "truncated")}
        values |= {f"kl_{reader}": value for reader, value in kl.items()}
        if kl["truncated"] > 0:
            values["closed"] = 1.0 - kl["memory"] / kl["truncated"]
        if self.moved:
            values["agreement"] = self.agreed / self.moved
        if asked:
            values |= {f"recall_{reader}": sum(right) / len(right) for reader, right in self.right.items()}
        return values


def _scored(
    scorer: Scorer, hidden: Float[Tensor, "targets d_model"], targets: Tensor
) -> tuple[Float[Tensor, ""], Tensor]:
    """Σ −log p of the targets, and the most likely token at each."""
    nll, likely = hidden.new_zeros((), dtype=torch.float32), []
    for own, wanted in row_chunks(hidden, targets, width=scorer.logit_width, limit=CHUNK_LOGITS):
        logits = scorer.head(own).float()
        nll = nll + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        likely.append(logits.argmax(-1))
    return nll, torch.cat(likely)


def _among(rows: Tensor, count: int) -> Bool[Tensor, " count"]:
    found = torch.zeros(count, dtype=torch.bool, device=rows.device)
    found[rows] = True
    return found


def _sums(one: list[Any], other: list[Any]) -> list[Any]:
    """Place by place; the shorter has zeros at its end."""
    size = max(len(one), len(other))
    return [a + b for a, b in zip([*one, *[0] * (size - len(one))], [*other, *[0] * (size - len(other))], strict=True)]
