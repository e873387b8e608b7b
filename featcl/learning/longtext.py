"""Long texts in consecutive windows, and batches of them, both whole and window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.streams.chat import Encoded


@dataclass(frozen=True, eq=False)
class LongText:
    """A text in consecutive windows.

    Attributes:
        windows: Its tokens, and which of them are targets: also a window's first one, which the window before predicts.
        start: The start token, which who reads window by window finds in front of each; None where there is none.
    """

    windows: tuple[Encoded, ...]
    start: int | None = None

    def __len__(self) -> int:
        return sum(len(window) for window in self.windows)


def cut(encoded: Encoded, ends: Sequence[int], *, start: int | None = None) -> LongText:
    """The text whose windows end before these places; `start` is the tokenizer's start token."""
    begins = [0, *ends[:-1]]
    windows = [Encoded(encoded.input_ids[b:e], encoded.loss_mask[b:e]) for b, e in zip(begins, ends, strict=True)]
    return LongText(tuple(windows), start if encoded.input_ids[:1] == [start] else None)


def pieces(ids: Sequence[int], *, window: int, context: int, start: int | None = None) -> Iterator[LongText]:
    """Texts of `context` tokens each, in windows of `window`; what is left at the end is too short, and left out.

    Args:
        ids: Tokens of a document.
        window: Tokens of a window.
        context: Tokens of a text.
        start: The tokenizer's start token; a document that begins with it has it in front of every text.
    """
    lead = [start] if start is not None and ids[:1] == [start] else []
    rest, size = ids[len(lead) :], context - len(lead)
    for begin in range(0, len(rest) - size + 1, size):
        whole = [*lead, *rest[begin : begin + size]]
        targets = [False] + [True] * (context - 1)
        yield cut(Encoded(whole, targets), [*range(window, context, window), context], start=start)


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """One window of several texts, padded on the right.

    Attributes:
        input_ids: Token ids.
        real: False where there is padding.
        positions: Places in the flattened (batch, seq) that predict a target.
        within: The same places in the flattened whole texts.
        targets: What follows there.
        rows: The text of each.
    """

    input_ids: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    positions: Int[Tensor, " targets"]
    within: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    rows: Int[Tensor, " targets"]


@dataclass(frozen=True, eq=False)
class LongBatch:
    """Several texts, whole (padded on the right) and in windows."""

    whole: Int[Tensor, "batch length"]
    windows: tuple[WindowBatch, ...]

    @classmethod
    def of(cls, texts: Sequence[LongText], *, device: torch.device | str = "cpu") -> LongBatch:
        """Texts with equally many windows.

        Raises:
            FeatclError: If their numbers of windows differ, or no token is a target.
        """
        counts = sorted({len(text.windows) for text in texts})
        if len(counts) != 1:
            raise FeatclError(f"long texts: one batch has texts of {counts} windows; all need as many")
        ids = [[id for window in text.windows for id in window.input_ids] for text in texts]
        targets = [[target for window in text.windows for target in window.loss_mask] for text in texts]
        followed = [[*row[1:], False] for row in targets]
        whole = _padded(ids, device)
        windows, begins = [], [0] * len(texts)
        for number in range(counts[0]):
            parts = [text.windows[number].input_ids for text in texts]
            leads = [[text.start] if number and text.start is not None else [] for text in texts]
            windows.append(_window(parts, leads, ids, followed, begins, length=whole.shape[1], device=device))
            begins = [begin + len(part) for begin, part in zip(begins, parts, strict=True)]
        if not any(len(window.targets) for window in windows):
            raise FeatclError("long texts: no token is a target")
        return cls(whole, tuple(windows))

    @property
    def tokens(self) -> int:
        """Number of targets."""
        return sum(len(window.targets) for window in self.windows)


def _window(
    parts: Sequence[list[int]],
    leads: Sequence[list[int]],
    ids: Sequence[list[int]],
    followed: Sequence[list[bool]],
    begins: Sequence[int],
    *,
    length: int,
    device: torch.device | str,
) -> WindowBatch:
    """The window whose tokens are `leads` and then `parts`, which begin at `begins` of the whole texts."""
    read = [[*lead, *part] for lead, part in zip(leads, parts, strict=True)]
    longest = max(map(len, read))
    places = [
        (row, place) for row, part in enumerate(parts) for place in range(len(part))
        if followed[row][begins[row] + place]
    ]  # fmt: skip

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return WindowBatch(
        input_ids=_padded(read, device),
        real=torch.tensor([[place < len(row) for place in range(longest)] for row in read], device=device),
        positions=column([row * longest + len(leads[row]) + place for row, place in places]),
        within=column([row * length + begins[row] + place for row, place in places]),
        targets=column([ids[row][begins[row] + place + 1] for row, place in places]),
        rows=column([row for row, _ in places]),
    )


def _padded(rows: Sequence[list[int]], device: torch.device | str) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
