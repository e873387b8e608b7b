"""One forward per batch of sequences of like length, and the logits at the target positions only.

What many sequences begin with (instructions, documents, examples put in front of every question) is read once per
batch, and the rest goes on from its keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.streams.cache import new_cache
from featcl.streams.folded import folded

# At most this many logits per forward: 256 MB in float32, which also bounds a batch when the vocabulary is large.
MAX_LOGITS = 1 << 26
# What a forward costs whatever is in it, in tokens: 8 ms of Python, measured on the laboratory's models.
FORWARD_TOKENS = 160
# A shared beginning has at least so many tokens; going on from keys and values costs a little more per token.
SHARED_TOKENS = 32
# Where a beginning is shared, a batch keeps keys and values of at most so many times its tokens.
KEPT = 4


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


@dataclass(frozen=True)
class Group:
    """Sequences of one forward.

    Attributes:
        members: Their indices, the longest first.
        shared: So many first tokens are the same in all of them and are read once; 0 for none.
    """

    members: tuple[int, ...]
    shared: int = 0


def target_batches(model: Any, sequences: Sequence[Targeted], *, batch_tokens: int = 4096) -> Iterator[TargetBatch]:
    """Teacher-forced logits at the targets of every sequence, in batches of like length.

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
    for group in plan_groups(sequences, plans, batch_tokens=batch_tokens, vocab=vocab):
        members, places = [sequences[index] for index in group.members], [plans[index] for index in group.members]
        with _evaluating(model), folded(model):
            batch = _forward(model, members, places, shared=group.shared)
        owner = torch.tensor([index for index in group.members for _ in plans[index]])
        yield TargetBatch(*batch, owner=owner, last=torch.cat([owner[1:] != owner[:-1], torch.tensor([True])]))


def _positions(index: int, sequence: Targeted) -> list[int]:
    positions = [place for place, wanted in enumerate(sequence.loss_mask) if wanted and place > 0]
    if not positions:
        raise FeatclError(f"sequence {index} has no target token after its first; nothing to score")
    return positions


# --- which sequences go together


def plan_groups(
    sequences: Sequence[Targeted], plans: Sequence[Sequence[int]], *, batch_tokens: int, vocab: int
) -> Iterator[Group]:
    """The forwards: those that share a long beginning together, the rest by length; the same every time.

    Args:
        sequences: Token ids.
        plans: Positions of each one's targets, ascending.
        batch_tokens: Padded tokens per forward.
        vocab: Logits per token.
    """
    for shared, members in _families(sequences, plans):
        yield from (Group(group, shared) for group in _batches(plans, members, shared, batch_tokens, vocab))


def _batches(
    plans: Sequence[Sequence[int]], members: Sequence[int], shared: int, batch_tokens: int, vocab: int
) -> Iterator[tuple[int, ...]]:
    """Longest first, packed so that neither tokens nor logits exceed their bound; a batch ends where its padding
    would cost more than another forward."""
    group: list[int] = []
    width = first = padding = 0
    for index in sorted(members, key=lambda index: (-plans[index][-1], plans[index][0], index)):
        short, size = width - plans[index][-1], len(group) + 1
        begin = min(first, plans[index][0])
        logits = size * (width - begin + 1) * vocab
        tokens = max(size * (width - shared), size * width / KEPT if shared else 0)
        if group and (tokens > batch_tokens or logits > MAX_LOGITS or padding + short > FORWARD_TOKENS):
            yield tuple(group)
            group = []
        if not group:
            width, begin, padding, short = plans[index][-1], plans[index][0], 0, 0
        group.append(index)
        first, padding = begin, padding + short
    if group:
        yield tuple(group)


def _families(sequences: Sequence[Targeted], plans: Sequence[Sequence[int]]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(Tokens that all begin with, members) where reading them once saves two forwards; then (0, all others).

    Neighbours in the order of their ids: a family grows as long as it saves more with one more member.
    """
    rest: list[int] = []
    family: list[int] = []
    shared = 0
    order = sorted(range(len(plans)), key=lambda index: (tuple(sequences[index].input_ids), index))
    for index in order:
        here = min(shared, plans[index][0] - 1)
        both = _common(sequences[family[0]].input_ids, sequences[index].input_ids, here) if family else 0
        if both >= SHARED_TOKENS and len(family) * both >= (len(family) - 1) * shared:
            family.append(index)
            shared = both
            continue
        if _pays(family, shared):
            yield shared, tuple(family)
        else:
            rest += family
        family, shared = [index], plans[index][0] - 1
    if _pays(family, shared):
        yield shared, tuple(family)
    else:
        rest += family
    if rest:
        yield 0, tuple(rest)


def _pays(family: Sequence[int], shared: int) -> bool:
    return (len(family) - 1) * shared > 2 * FORWARD_TOKENS


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many first tokens are the same, of at most `most`."""
    if list(a[:most]) == list(b[:most]):
        return most
    return next(place for place in range(most) if a[place] != b[place])


# --- one forward


def _forward(
    model: Any, sequences: Sequence[Targeted], positions: Sequence[Sequence[int]], *, shared: int
) -> tuple[Float[Tensor, "targets vocab"], Int[Tensor, " targets"]]:
    width = max(places[-1] for places in positions)  # the token at the last target is predicted, not read
    device = next(model.parameters()).device
    ids = torch.zeros(len(sequences), width - shared, dtype=torch.long)
    for row, (sequence, places) in enumerate(zip(sequences, positions, strict=True)):
        ids[row, : places[-1] - shared] = torch.tensor(sequence.input_ids[shared : places[-1]])
    begin = min(places[0] for places in positions) - 1
    keep = torch.arange(begin - shared, width - shared, device=device)
    cache = _read_once(model, sequences[0].input_ids[:shared], rows=len(sequences), room=width) if shared else None
    logits = model(
        input_ids=ids.to(device), past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep
    ).logits
    rows = torch.tensor([row for row, places in enumerate(positions) for _ in places], device=device)
    columns = torch.tensor([place - 1 - begin for places in positions for place in places], device=device)
    targets = [
        sequence.input_ids[place] for sequence, places in zip(sequences, positions, strict=True) for place in places
    ]
    return logits[rows, columns], torch.tensor(targets, device=device)


def _read_once(model: Any, ids: Sequence[int], *, rows: int, room: int) -> Any:
    """Keys and values of a beginning, for so many rows; a memory's state and a prefix travel in the same cache."""
    device = next(model.parameters()).device
    cache = new_cache(model.config, room)
    model(input_ids=torch.tensor([list(ids)], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(torch.zeros(rows, dtype=torch.long, device=device))
    return cache


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
