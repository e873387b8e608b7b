"""Texts to padded token batches: windows of the model's context, grouped by length, BOS and padding marked."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from featcl.errors import FeatclError

Text: TypeAlias = str | Sequence[int]
"""A text, or its token ids where the caller has tokenised it already (a chat, for example)."""


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded windows; `counted` is True on the tokens that statistics are taken over."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    counted: Bool[Tensor, "batch seq"]
    """Neither padding nor the BOS token at the start of a window."""

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device), self.counted.to(device))


def read_texts(path: str | Path) -> list[str]:
    """Documents of a UTF-8 text file (`.txt` or `.txt.gz`); a form feed separates documents.

    Raises:
        FeatclError: If the file is missing, not text, or empty.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise FeatclError(f"text file {path} does not exist") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FeatclError(f"text file {path} cannot be read as UTF-8 text or gzip of it: {error}") from None
    documents = [part.strip("\n") for part in text.split("\f")]
    documents = [part for part in documents if part.strip()]
    if not documents:
        raise FeatclError(f"text file {path} holds no text")
    return documents


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts its BOS token in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]


def token_windows(
    tokenizer: Any, texts: Iterable[Text], *, context: int, prepend_bos: bool | None = None
) -> Iterator[list[int]]:
    """Windows of at most `context` tokens, one or more per text, each starting with BOS where that is the convention.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: Strings, or token ids; a BOS that a text already carries is not doubled.
        context: Longest window, BOS included.
        prepend_bos: None follows the tokenizer; True or False overrides it (an SAE records how it was trained).

    Raises:
        FeatclError: If `context` leaves no room for a token.
    """
    bos = tokenizer.bos_token_id
    wanted = adds_bos(tokenizer) if prepend_bos is None else prepend_bos
    prefix: list[int] = [bos] if wanted and bos is not None else []
    room = context - len(prefix)
    if room < 1:
        raise FeatclError(f"a context of {context} tokens leaves no room for text")
    for text in texts:
        ids = (
            tokenizer(text, add_special_tokens=False, verbose=False).input_ids if isinstance(text, str) else list(text)
        )
        if prefix and ids[:1] == prefix:
            ids = ids[1:]
        for start in range(0, len(ids), room):
            yield prefix + ids[start : start + room]


def token_batches(
    windows: Iterable[Sequence[int]], tokenizer: Any, *, batch_tokens: int = 8192, lookahead: int = 256
) -> Iterator[TokenBatch]:
    """Batches of windows of like length, in bounded memory.

    Args:
        windows: Token ids; order is kept up to sorting by length within `lookahead` windows.
        tokenizer: Names the BOS and padding ids.
        batch_tokens: Most positions in one batch, padding included (a longer window makes a batch of its own).
        lookahead: How many windows are sorted together.
    """
    pending = iter(windows)
    while group := sorted(islice(pending, lookahead), key=len):
        start = 0
        while start < len(group):
            stop = start + 1
            while stop < len(group) and len(group[stop]) * (stop + 1 - start) <= batch_tokens:
                stop += 1
            yield _pad(group[start:stop], tokenizer)
            start = stop


def texts_digest(texts: Iterable[Text]) -> str:
    """SHA-256 of the texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8") if isinstance(text, str) else repr(list(text)).encode()
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()


def _pad(windows: Sequence[Sequence[int]], tokenizer: Any) -> TokenBatch:
    width = max(len(window) for window in windows)
    input_ids = torch.full((len(windows), width), tokenizer.pad_token_id or 0, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, window in enumerate(windows):
        input_ids[row, : len(window)] = torch.tensor(window, dtype=torch.long)
        attention_mask[row, : len(window)] = 1
    counted = attention_mask.bool()
    if tokenizer.bos_token_id is not None:
        counted[:, 0] &= input_ids[:, 0] != tokenizer.bos_token_id
    return TokenBatch(input_ids, attention_mask, counted)
