"""Forgetting inside the memory: how well stored items are read back, by how much was stored after them, and by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.memory.base import StreamMemory, Tokens
from featcl.memory.checks import require
from featcl.memory.state import MemoryState


@dataclass(frozen=True, eq=False)
class RecallCurve:
    """How well the i-th item is read back after n more.

    An item counts as recalled where the value read under its key is nearer, by cosine, to its own value than to every
    other item's.

    Attributes:
        after: n, ascending.
        recalled: Share of items recalled after n more, in [0, 1].
        cosine: Mean cosine of what is read to the item's value.
        items: How many items each share is of, over streams and heads.
        chance: The share that guessing gets.
        nbytes: Of the state that held them, of one stream.
    """

    after: tuple[int, ...]
    recalled: Float[Tensor, " points"]
    cosine: Float[Tensor, " points"]
    items: tuple[int, ...]
    chance: float
    nbytes: int

    def __str__(self) -> str:
        rows = zip(self.after, self.recalled.tolist(), self.cosine.tolist(), strict=True)
        head = f"{'after':>8}{'recalled':>10}{'cosine':>8}   (chance {self.chance:.3f}, {self.nbytes} bytes)"
        return "\n".join([head, *(f"{n:8d}{share:10.3f}{cosine:8.3f}" for n, share, cosine in rows)])


@dataclass(frozen=True)
class Capacity:
    """How much of a stream of items a memory still holds at its end.

    Attributes:
        nbytes: Of its state, of one stream.
        stored: Numbers of items, ascending.
        recalled: Share of all of them that is recalled after the last, for each number.
        cosine: Mean cosine of what is read to the item's value.
    """

    nbytes: int
    stored: tuple[int, ...]
    recalled: tuple[float, ...]
    cosine: tuple[float, ...]

    def held(self, share: float = 0.9) -> int:
        """The largest number of items of which at least this share is recalled, all smaller numbers too; else 0."""
        largest = 0
        for count, recalled in zip(self.stored, self.recalled, strict=True):
            if recalled < share:
                break
            largest = count
        return largest


@torch.no_grad()
def recall_curve(
    memory: StreamMemory,
    *,
    items: int = 512,
    after: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256),
    streams: int = 4,
    shuffled: bool = False,
    gates: tuple[float, float, float] | None = None,
    seed: int = 0,
) -> RecallCurve:
    """Store random items one after the other and read each back after n more.

    Keys and values are given to the memory itself, not to its projections. All items are read at the end of the stream,
    where the i-th has `items` - 1 - i after it. So one state answers for every n, and whichever n an item counts for,
    the same number of items competes with it. Each n stands for the items with n ± n / 4 after them.

    Args:
        memory: Any; its slow weights beside M_0 do not matter.
        items: Length of the stream.
        after: Every n, below `items`.
        streams: Independent streams to average over, with every head of each.
        shuffled: Whether each item is asked for under another's key, which is a negative control.
        gates: Step, momentum and decay of every item; None: what the memory has for a token of zeros.
        seed: Of the items.

    Returns:
        The curve.

    Raises:
        FeatclError: For an n that no item can have.
    """
    within = bool(after) and 0 <= min(after) <= max(after) < items
    require(within, f"after {tuple(after)} must be from 0 to {items - 1}")
    points = tuple(sorted(set(after)))
    state, keys, values = _stored(memory, items, streams=streams, gates=gates, seed=seed)
    hit, cosine = _read_back(memory, state, keys, values, shuffled=shuffled)
    place = torch.arange(items - 1, -1, -1)  # how many came after each
    bands = [(place - n).abs() <= n // 4 for n in points]
    return RecallCurve(
        after=points,
        recalled=torch.stack([hit[band].mean() for band in bands]),
        cosine=torch.stack([cosine[band].mean() for band in bands]),
        items=tuple(int(band.sum()) * streams * memory.heads for band in bands),
        chance=1.0 / items,
        nbytes=state.rows(0).nbytes,
    )


@torch.no_grad()
def capacity(
    memory: StreamMemory,
    *,
    stored: Sequence[int] = (16, 32, 64, 128, 256, 512),
    streams: int = 4,
    gates: tuple[float, float, float] | None = None,
    seed: int = 0,
) -> Capacity:
    """How many random items a memory holds: for each number, all are read back after the last.

    Args:
        memory: Any; memories of several sizes give capacity by state size.
        stored: Numbers of items.
        streams: Independent streams to average over, with every head of each.
        gates: As for `recall_curve`.
        seed: Of the items.

    Raises:
        FeatclError: For a number below 2.
    """
    counts = tuple(sorted(set(stored)))
    require(bool(counts) and counts[0] >= 2, f"stored {counts} must be 2 or more items")
    shares, cosines = [], []
    for count in counts:
        state, keys, values = _stored(memory, count, streams=streams, gates=gates, seed=seed)
        hit, cosine = _read_back(memory, state, keys, values)
        shares.append(float(hit.mean()))
        cosines.append(float(cosine.mean()))
    return Capacity(memory.initial_state(1).nbytes, counts, tuple(shares), tuple(cosines))


def _stored(
    memory: StreamMemory, items: int, *, streams: int, gates: tuple[float, float, float] | None, seed: int
) -> tuple[MemoryState, Tensor, Tensor]:
    """The state after a stream of random items, and their keys and values [streams, items, heads, d]."""
    require(streams >= 1, f"streams must be at least 1, not {streams}")
    require(gates is None or len(gates) == 3, f"gates {gates} must be step, momentum and decay")
    state = memory.initial_state(streams)
    generator, like = torch.Generator().manual_seed(seed), state.weights[0]
    shape = (streams, items, memory.heads, memory.head_dim)
    keys, values = (torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device) for _ in range(2))
    used = memory.gates_at_rest() if gates is None else like.new_tensor(gates)
    every = used.expand(streams, items, memory.heads, 3)
    tokens = Tokens(queries=keys, keys=keys, values=values, gates=every, tail=state.tail)
    after = memory.written(tokens, state)
    return memory.settle(after), keys, values


def _read_back(
    memory: StreamMemory, state: MemoryState, keys: Tensor, values: Tensor, *, shuffled: bool = False
) -> tuple[Float[Tensor, "items streams_heads"], Float[Tensor, "items streams_heads"]]:
    """Whether each item is recalled, and the cosine of what is read to its value."""
    asked = keys.roll(1, dims=1) if shuffled else keys
    found = torch.nn.functional.normalize(memory.read(asked, state), dim=-1).transpose(1, 2).flatten(0, 1)
    unit = torch.nn.functional.normalize(values, dim=-1).transpose(1, 2).flatten(0, 1)
    cosines = found @ unit.mT  # [streams · heads, items asked for, items there are]
    own = cosines.diagonal(dim1=1, dim2=2).clone()
    cosines.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # so that the largest is that of another item
    return (own > cosines.amax(dim=-1)).to(own.dtype).T, own.T
