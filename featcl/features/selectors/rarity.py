"""Features that are active on the stream and rare on background."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featcl.features.activity import activity
from featcl.features.selectors.base import Ranking
from featcl.features.tokens import Text


def rarity(sae: Any, model: Any, tokenizer: Any, *, stream: Sequence[Text], background: Sequence[Text]) -> Ranking:
    """TF-IDF with tokens as documents: tf · log(tf / background frequency), half a token added to each count."""
    seen, usual = (activity(sae, model, tokenizer, texts) for texts in (stream, background))
    on_stream, on_background = ((found.active.double() + 0.5) / (found.tokens + 1) for found in (seen, usual))
    score = on_stream * (on_stream / on_background).log()
    order = score.argsort(descending=True, stable=True)
    scores = {"tf_idf": score, "on_stream": on_stream, "on_background": on_background}
    return Ranking(order[seen.active[order] > 0], scores)
