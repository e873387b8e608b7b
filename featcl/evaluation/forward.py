"""One forward per batch of sequences of like length, and the logits at the target positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featcl.errors import FeatclError

# At most this many logits per forward: 256 MB in float32, which also bounds a batch when the vocabulary is large.
MAX_LOGITS = 1 << 26


@runtime_checkable
class Targeted(Protocol):
    """Tokens and which of them are targets, such as `featcl.streams.chat.Encoded`."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def loss_mask(self) -> Sequence[bool]: ...


@dataclass(frozen=True)
class TargetBatch:
    """Predictions of one batch, flattened over all its targets; targets of one sequence are neighbours, in order.

    Attributes:
        logits: Scores of the token that stands at each target position, given those before it.
        targets: The token that stands there.
        owner: Index of the sequence in the list that was given.
        last: Whether it is the last target of its sequence.
    """

    logits: Float[Tensor, "targets vocab"]
    targets: Int[Tensor, " targets"]
    owner: Int[Tensor, " targets"]
    last: Bool[Tensor, " targets"]


def target_batches(model: Any, sequences: Sequence[Targeted], *, batch_tokens: int = 4096) -> Iterator[TargetBatch]:
    """Teacher-forced logits at the targets of every sequence, in batches sorted by length.

    Sequences are padded on the right and cut after their last target: causal attention then needs no padding mask,
    and each sequence gets the logits that it would get alone. The head is applied only from the batch's first
    target on.

    Args:
        model: A causal language model, adapted or not; evaluated without dropout, its mode is restored.
        sequences: Token ids with a target mask; position 0 cannot be a target.
        batch_tokens: Padded tokens per forward.

    Raises:
        FeatclError: If a sequence has no target after its first token.
    """
    vocab = int(model.config.get_text_config().vocab_size)
    plans = [_positions(index, sequence) for index, sequence in enumerate(sequences)]
    for members in _groups(plans, batch_tokens=batch_tokens, vocab=vocab):
        with _evaluating(model):
            batch = _forward(model, [sequences[index] for index in members], [plans[index] for index in members])
        owner = torch.tensor([index for index in members for _ in plans[index]])
        yield TargetBatch(*batch, owner=owner, last=torch.cat([owner[1:] != owner[:-1], torch.tensor([True])]))


def _positions(index: int, sequence: Targeted) -> list[int]:
    positions = [place for place, wanted in enumerate(sequence.loss_mask) if wanted and place > 0]
    if not positions:
        raise FeatclError(f"sequence {index} has no target token after its first; nothing to score")
    return positions


def _groups(plans: Sequence[list[int]], *, batch_tokens: int, vocab: int) -> Iterator[list[int]]:
    """Indices in order of length, packed so that neither padded tokens nor logits exceed their bound."""
    order = sorted(range(len(plans)), key=lambda index: (plans[index][-1], plans[index][0], index))
    group: list[int] = []
    first = 0
    for index in order:
        width = plans[index][-1]
        begin = min(first, plans[index][0]) if group else plans[index][0]
        size = len(group) + 1
        if group and (size * width > batch_tokens or size * (width - begin + 1) * vocab > MAX_LOGITS):
            yield group
            group, begin = [], plans[index][0]
        group.append(index)
        first = begin
    if group:
        yield group


def _forward(
    model: Any, sequences: Sequence[Targeted], positions: Sequence[list[int]]
) -> tuple[Float[Tensor, "targets vocab"], Int[Tensor, " targets"]]:
    width = positions[-1][-1]  # the longest is last; the token at the last target is predicted, not read
    device = next(model.parameters()).device
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, (sequence, places) in enumerate(zip(sequences, positions, strict=True)):
        ids[row, : places[-1]] = torch.tensor(sequence.input_ids[: places[-1]])
    begin = min(places[0] for places in positions) - 1
    keep = torch.arange(begin, width, device=device)
    logits = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=keep).logits
    rows = torch.tensor([row for row, places in enumerate(positions) for _ in places], device=device)
    columns = torch.tensor([place - 1 - begin for places in positions for place in places], device=device)
    targets = [
        sequence.input_ids[place] for sequence, places in zip(sequences, positions, strict=True) for place in places
    ]
    return logits[rows, columns], torch.tensor(targets, device=device)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode that was is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
