"""Rows of unequal length in one batch: packed to the left, lined up behind what an open chunk kept, cut at any place.

Lengths, counts and places are int64 tensors [batch] on the CPU, since they decide shapes.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Places: TypeAlias = Int[Tensor, " batch"]


def pack(x: Tensor, mask: Bool[Tensor, "batch seq"] | None) -> tuple[Tensor, Places]:
    """The tokens [batch, seq, …] that count, moved to the left of their rows in order, zeros after them.

    Returns:
        The packed tokens, as many columns as the longest row needs, and the rows' lengths.
    """
    batch, seq = x.shape[:2]
    if mask is None:
        return x, torch.full((batch,), seq)
    lengths = mask.sum(dim=1).cpu()
    if _same(lengths) and (batch == 0 or int(lengths[0]) == seq):
        return x, lengths
    order = torch.argsort(~mask, dim=1, stable=True)[:, : longest(lengths)]
    return _zeroed(_taken(x, order), lengths), lengths


def unpack(packed: Tensor, mask: Bool[Tensor, "batch seq"] | None) -> Tensor:
    """Back to where the mask is True; zeros elsewhere."""
    if mask is None or (packed.shape[1] == mask.shape[1] and bool(mask.all())):
        return packed
    if packed.shape[1] == 0:
        return packed.new_zeros(*mask.shape, *packed.shape[2:])
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return torch.where(_wide(mask, packed), _taken(packed, places), 0.0)


def join(kept: Tensor, count: Places, new: Tensor, lengths: Places) -> Tensor:
    """Every row's line: the first `count` of what was kept, then its new tokens, then zeros.

    Args:
        kept: [batch, slots, …].
        count: How many slots of each row are in use.
        new: [batch, time, …], packed.
        lengths: How many of them each row has.
    """
    if _same(count):
        first = int(count[0]) if len(count) else 0
        return new if first == 0 else torch.cat([kept[:, :first], new], dim=1)
    time = torch.arange(longest(count + lengths))
    places = torch.where(time < count[:, None], time, time - count[:, None] + kept.shape[1])
    both = torch.cat([kept, new], dim=1)
    line = _taken(both, places.clamp(max=both.shape[1] - 1).to(both.device))
    return _zeroed(line, count + lengths)


def cut(line: Tensor, starts: Places, length: int, ends: Places) -> Tensor:
    """`length` columns of every row from its start; zeros from its end on."""
    if _same(starts) and _same(ends):
        start, end = (int(places[0]) if len(places) else 0 for places in (starts, ends))
        part = line[:, start : min(start + length, end)]
        return _padded(part, length)
    if line.shape[1] == 0:
        return _padded(line, length)
    places = (starts[:, None] + torch.arange(length)).clamp(max=line.shape[1] - 1)
    return _zeroed(_taken(line, places.to(line.device)), ends - starts)


def within(lengths: Places, time: int, device: torch.device) -> Bool[Tensor, "batch time"] | None:
    """Which of `time` columns lie within each row's length; None where all do."""
    if bool((lengths >= time).all()):
        return None
    return (torch.arange(time) < lengths[:, None]).to(device)


def _padded(part: Tensor, length: int) -> Tensor:
    missing = length - part.shape[1]
    if missing == 0:
        return part
    return torch.cat([part, part.new_zeros(part.shape[0], missing, *part.shape[2:])], dim=1)


def _zeroed(line: Tensor, lengths: Places) -> Tensor:
    inside = within(lengths, line.shape[1], line.device)
    return line if inside is None else torch.where(_wide(inside, line), line, 0.0)


def _taken(line: Tensor, places: Int[Tensor, "batch time"]) -> Tensor:
    rows = torch.arange(line.shape[0], device=line.device)[:, None]
    return line[rows, places]


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *([1] * (like.ndim - 2)))


def _same(places: Places) -> bool:
    return len(places) == 0 or bool((places == places[0]).all())


def longest(lengths: Places) -> int:
    """The largest of them, 0 where there is none."""
    return int(lengths.max()) if len(lengths) else 0
