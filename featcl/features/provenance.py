"""Where directions come from, and that no selector sees the future: texts compared by digest.

A text and its token ids count as the same text: ids are decoded without control tokens, and runs of white space are
one space. A given document (a string) counts also by its longer lines and its blocks of lines, so that a file of which
one part is kept for evaluation is recognised when it is given whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from featcl.errors import FeatclError
from featcl.features.tokens import Text
from featcl.files import digest_bytes

Digests: TypeAlias = frozenset[str]
"""What `text_digests` makes of texts."""

BLOCK = 1200
"""Characters of a document that make one block."""

LINE_WORDS = 4
"""Words from which on a line of a given document, or a message of a conversation, counts by itself."""

LONG_LINE = 8
"""The same for a line of a held-out document: shorter ones may stand in many."""


def text_digests(texts: Iterable[Text], tokenizer: Any, *, lines: int | None = None) -> Digests:
    """SHA-256 of every text's content, and of the parts of a document, where asked.

    Args:
        texts: Strings or token ids.
        tokenizer: Reads the token ids.
        lines: A string counts also by its blocks (`text_blocks`), and by its lines of at least so many words.
    """
    found: set[str] = set()
    for text in texts:
        plain = (
            [text, *(_parts(text, lines) if lines else ())] if isinstance(text, str) else [_decoded(text, tokenizer)]
        )
        found |= {digest_bytes(one.encode("utf-8")) for piece in plain if (one := " ".join(piece.split()))}
    return frozenset(found)


def _parts(text: str, words: int) -> list[str]:
    return [*text_blocks(text), *(line for line in text.split("\n") if len(line.split()) >= words)]


def text_blocks(text: str) -> list[str]:
    """Runs of whole lines of about `BLOCK` characters."""
    blocks, lines, size = [], [], 0
    for line in text.split("\n"):
        lines.append(line)
        size += len(line) + 1
        if size >= BLOCK:
            blocks.append("\n".join(lines))
            lines, size = [], 0
    blocks.append("\n".join(lines))
    return [block for block in blocks if len(block.strip()) > 1]


def refuse_overlap(
    given: Mapping[str, Collection[Text]],
    held_out: Collection[Text] | Digests,
    tokenizer: Any,
    *,
    parts: bool = True,
) -> None:
    """Raise if a text that features are selected on is one of those still to come, or kept for evaluation.

    Args:
        given: What the texts are (`positive`, `stream`, …) -> texts.
        held_out: Texts, or their digests.
        tokenizer: Reads token ids.
        parts: Whether a given document counts by its parts, too.

    Raises:
        FeatclError: Naming the first argument with an overlap, and how many texts it shares.
    """
    unseen = held_out if isinstance(held_out, frozenset) else text_digests(held_out, tokenizer, lines=LONG_LINE)
    words = LINE_WORDS if parts else None
    for name, texts in given.items():
        if shared := [text for text in texts if not unseen.isdisjoint(text_digests([text], tokenizer, lines=words))]:
            raise FeatclError(
                f"features would be selected on what they are tested on: {len(shared)} of the {len(texts)} texts in "
                f"{name} belong to the stream still to come or to the evaluation ({_shown(shared[0], tokenizer)}); "
                "select on a calibration split, or on experiences already observed"
            )


def without_overlap(texts: Iterable[Text], held_out: Digests, tokenizer: Any) -> list[Text]:
    """The texts that are not, word for word, among `held_out`."""
    return [text for text in texts if held_out.isdisjoint(text_digests([text], tokenizer))]


def _decoded(ids: Any, tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _shown(text: Text, tokenizer: Any) -> str:
    plain = " ".join((text if isinstance(text, str) else _decoded(text, tokenizer)).split())
    return repr(plain[:40] + ("…" if len(plain) > 40 else ""))
