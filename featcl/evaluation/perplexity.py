"""Perplexity of frozen text in bits per byte, so that models with different tokenizers can be compared.

A document longer than the context is read in windows that move on by `stride` tokens. Every token counts once, in the
first window that holds it, so it has at least `context − stride` tokens before it (fewer only near the start). What is
reported falls as the stride does; at a stride of 1 every token has the longest context that the model can take.

    bits per byte = Σ −log2 p(token | those before it in its window) / bytes of the text in UTF-8
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from featcl.errors import FeatclError
from featcl.evaluation.scoring import heldout_nll
from featcl.models import max_context
from featcl.streams.chat import Encoded


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts some text.

    Attributes:
        bits_per_byte: Σ NLL / (ln 2 · bytes); does not depend on the tokenizer.
        perplexity: exp(Σ NLL / tokens); does.
        nll: Nats per token.
        tokens: How many were predicted: all of the text.
        bytes: Length of the text in UTF-8.
        documents: How many.
        context: Longest window in tokens.
        stride: By how many tokens it moves on.
    """

    bits_per_byte: float
    perplexity: float
    nll: float
    tokens: int
    bytes: int
    documents: int
    context: int
    stride: int

    def record(self, name: str) -> dict[str, float]:
        """Flat scalars by the names that the trackers use."""
        return {f"general/{name}_bits_per_byte": self.bits_per_byte, f"general/{name}_perplexity": self.perplexity}

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def text_perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 4096,
) -> Perplexity:
    """Score documents with a sliding window.

    The first token of a document is predicted from the tokenizer's BOS token, or where it has none from its
    end-of-text token, which separates documents in pre-training. That token itself is never scored.

    Args:
        model: A causal language model, adapted or not.
        tokenizer: Its tokenizer.
        texts: Documents; `featcl.features.read_texts` reads them from a file.
        context: Longest window in tokens; None: the model's, at most 2048.
        stride: How far the window moves on; None: half the context.
        batch_tokens: Padded tokens per forward.

    Raises:
        FeatclError: If there is no text, no token to start from, or the stride is not between 1 and context − 1.

    Source: Gao et al. 2020, arXiv:2101.00027, section 3.1 (bits per byte); the strided window is that of transformers'
        guide "Perplexity of fixed-length models".
    """
    context, stride = check_window(model, context, stride)
    start, windows = _start(tokenizer), []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        windows += list(_windows([start, *ids], context=context, stride=stride))
    if not windows:
        raise FeatclError("perplexity: the texts hold no token")
    counts = [sum(window.loss_mask) for window in windows]
    nlls = heldout_nll(model, windows, batch_tokens=max(batch_tokens, context))
    total, tokens = sum(nll * count for nll, count in zip(nlls, counts, strict=True)), sum(counts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    return Perplexity(
        bits_per_byte=total / (math.log(2) * size),
        perplexity=math.exp(min(total / tokens, 700.0)),
        nll=total / tokens,
        tokens=tokens,
        bytes=size,
        documents=len(texts),
        context=context,
        stride=stride,
    )


def check_window(model: nn.Module, context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride that a model takes, arguments as for `text_perplexity`.

    Raises:
        FeatclError: If one of them does not fit.
    """
    longest = max_context(model)
    context = min(2048, longest) if context is None else context
    stride = context // 2 if stride is None else stride
    if not 2 <= context <= longest:
        raise FeatclError(f"perplexity: a context of {context} tokens; this model takes 2 to {longest}")
    if not 1 <= stride < context:
        raise FeatclError(f"perplexity: a stride of {stride} does not fit a context of {context}: 1 to {context - 1}")
    return context, stride


def _start(tokenizer: Any) -> int:
    found = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    if not found:
        raise FeatclError("perplexity: the tokenizer has neither a BOS nor an end-of-text token to start a text with")
    return int(found[0])


def _windows(ids: Sequence[int], *, context: int, stride: int) -> Iterator[Encoded]:
    """Windows of `context` ids; each id but the first is a target in the first window that holds it."""
    scored = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        if end > scored:
            yield Encoded(list(ids[begin:end]), [place >= scored for place in range(begin, end)])
            scored = end
        if end == len(ids):
            return
