"""Retrieval: the texts that fit the question best stand in front of it.

    bm25         words in common, rare ones counting more; see `Bm25`
    embedding    the base model's own activations at the tokens of question and text; see `late_interaction`

The base model makes the vectors, so that old and new ones compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.methods import checks
from featcl.methods.bm25 import Bm25
from featcl.methods.embeddings import late_interaction, token_vectors
from featcl.methods.in_context import ROOM_FOR_REPLY, InContext
from featcl.methods.method import Cost, View
from featcl.methods.texts import pieces, question
from featcl.objectives.experience import Experience
from featcl.streams.messages import Message

SEARCHES = ("bm25", "embedding")


class Retrieval(InContext):
    """Puts the `k` texts in front of the prompt that fit its question best, the best next to it, as far as they fit.

    Args:
        by: `bm25` or `embedding`.
        layer: Block after which `embedding` reads the stream: a low one, since deeper ones are about what comes next.
        k: How many; with bm25 only texts that share a word with the question.
        tokens, form, budget_bytes, joiner, reply_tokens, frozen: As for `InContext`; with `embedding` the budget holds
            the vectors also, 2 bytes times d_model for each token.

    Raises:
        FeatclError: As `InContext`; for an unknown search, or where bm25s is not installed.

    Source: Lewis et al. 2020, arXiv:2005.11401 (retrieval in front of the prompt).
    """

    name = "retrieval"

    def __init__(
        self,
        *,
        by: str = "bm25",
        k: int = 4,
        layer: int = 1,
        tokens: int | None = None,
        form: str = "exchanges",
        budget_bytes: int = 1 << 20,
        joiner: str = "\n",
        reply_tokens: int = ROOM_FOR_REPLY,
        frozen: bool = True,
    ) -> None:
        super().__init__(
            tokens=tokens, form=form, budget_bytes=budget_bytes, joiner=joiner, reply_tokens=reply_tokens, frozen=frozen
        )
        checks.choice(self.name, SEARCHES, by=by)
        checks.count(self.name, k=k)
        self.by, self.k, self.layer = by, k, layer
        self._index: Bm25 | None = Bm25(()) if by == "bm25" else None  # an error now where bm25s is missing
        self._vectors: dict[int, Float[Tensor, "tokens d_model"]] = {}  # by number of the text
        self._forward = 0

    def ranked(self, messages: Sequence[Message], view: View) -> Sequence[str]:
        """The best texts, best first; of equals the newest."""
        if not self.texts.kept or not question(messages).strip():
            return ()
        scores, floor = self._scores(question(messages), view)
        order = sorted(range(len(scores)), key=lambda place: (scores[place], place), reverse=True)
        return [self.texts.kept[place].text for place in order[: self.k] if scores[place] > floor]

    def _scores(self, asked: str, view: View) -> tuple[list[float], float]:
        """One per text, and the score that a text must exceed."""
        if self.by == "bm25":
            if self._index is None:
                self._index = Bm25([each.text for each in self.texts.kept])
            return self._index.scores(asked), 0.0
        vectors = [self._vectors[each.number] for each in self.texts.kept]
        return late_interaction(token_vectors(asked, view.student, layer=self.layer), vectors).tolist(), -torch.inf

    def remember_(self, experience: Experience, view: View) -> None:
        """Keep what was seen."""
        self.keep_(pieces(experience.trajectory, self.form), experience.trajectory.id, view)

    def keep_(self, texts: Sequence[str], source: str, view: View) -> None:
        """Keep texts, with their vectors."""
        found: dict[str, Tensor] = {}
        if self.by == "embedding":
            old = {each.text for each in self.texts.kept}
            new = [text for text in dict.fromkeys(texts) if text.strip() and text not in old]
            found = {text: token_vectors(text, view.student, layer=self.layer) for text in new}
        self._forward += sum(len(vectors) for vectors in found.values())
        self.texts.add_(texts, source, more={text: vectors.nbytes for text, vectors in found.items()})
        self._index, known = None, self._vectors
        if self.by == "embedding":
            self._vectors = {
                each.number: known[each.number] if each.number in known else found[each.text]
                for each in self.texts.kept
            }

    def cost(self) -> Cost:
        """Texts and vectors, and reading the texts to embed them; asking is not counted here, as for `InContext`."""
        return Cost(self.texts.nbytes, self._forward)

    def state(self) -> dict[str, Any]:
        """The texts."""
        return {**super().state(), "forward": self._forward}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        super().load_state_(state)
        self._index, self._forward, self._vectors = None, state["forward"], {}

    def tensors(self) -> dict[str, Tensor]:
        """The vectors by the number of their text."""
        return {str(number): vector for number, vector in self._vectors.items()}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self._vectors = {int(number): vector.cpu() for number, vector in tensors.items()}
