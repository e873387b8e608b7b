"""BM25 over a few thousand short texts, by the library bm25s.

    score(q, d) = Σ_{t in q} idf(t) · tf / (tf + k₁ (1 − b + b |d| / mean |d|)),
    idf(t) = ln(1 + (N − n_t + 1/2) / (n_t + 1/2))

Words are runs of letters and digits in lower case; nothing is stemmed or left out, so that code and names are found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from featcl.errors import FeatclError

_WORD = re.compile(r"[^\W_]+")


class Bm25:
    """An index of texts.

    Args:
        texts: What is searched.
        k1: How soon more of one word counts less.
        b: How much a long text is discounted.

    Raises:
        FeatclError: If bm25s is not installed.

    Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, section 3; in Lucene's form, Kamphuis
    et al. 2020, as bm25s computes it (Lù 2024, arXiv:2407.03618).
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> None:
        try:
            from bm25s import BM25  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise FeatclError("retrieval by bm25 needs the package bm25s: pip install featcl[retrieval]") from error
        self.size = len(texts)
        found = [words(text) for text in texts]
        self._known = {word for text in found for word in text}
        self._index = BM25(k1=k1, b=b, method="lucene")
        if self._known:
            self._index.index(found, show_progress=False)

    def scores(self, query: str) -> list[float]:
        """One per text, 0 where no word is shared."""
        asked = [word for word in words(query) if word in self._known]
        return self._index.get_scores(asked).tolist() if asked else [0.0] * self.size


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(text.lower())
