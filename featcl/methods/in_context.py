"""In-context learning: all that was seen stands in front of the prompt, as far as it fits.

It is the strongest memory that the model's context can hold, and forgets what no longer fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featcl.methods import checks
from featcl.methods.method import Cost, View
from featcl.methods.outside import Outside, in_front
from featcl.methods.texts import FORMS, Texts, pieces
from featcl.objectives.experience import Experience
from featcl.streams.messages import Message

ROOM_FOR_REPLY = 64  # tokens


class InContext(Outside):
    """Puts the newest texts in front of the prompt, oldest first, as many as fit.

    Args:
        tokens: Most tokens of prompt and context together; None: the model's context but for `reply_tokens`.
        form: What is shown of a trajectory: its `exchanges`, or as a teacher's context (`auto`, `trajectory`,
            `feedback`, `document`, `demonstration`).
        budget_bytes: Of the texts kept.
        joiner: Stands between two texts.
        reply_tokens: Kept free for the reply.
        frozen: Whether the weights stand still.

    Raises:
        FeatclError: For an unknown form or a budget of zero.

    Source: Brown et al. 2020, arXiv:2005.14165, section 2 (few-shot).
    """

    name = "in_context"

    def __init__(
        self,
        *,
        tokens: int | None = None,
        form: str = "exchanges",
        budget_bytes: int = 1 << 20,
        joiner: str = "\n",
        reply_tokens: int = ROOM_FOR_REPLY,
        frozen: bool = True,
    ) -> None:
        checks.choice(self.name, FORMS, form=form)
        checks.count(self.name, tokens=tokens, reply_tokens=reply_tokens)
        self.tokens, self.form, self.joiner, self.reply_tokens = tokens, form, joiner, reply_tokens
        self.frozen = frozen
        self.texts = Texts(budget_bytes=budget_bytes, owner=self.name)

    def context(self, messages: Sequence[Message], view: View) -> Sequence[Message]:
        """The conversation with the texts in front."""
        room = view.student.max_length - self.reply_tokens
        room = room if self.tokens is None else min(room, self.tokens)
        return in_front(view.student.chat, messages, self.ranked(messages, view), room=room, joiner=self.joiner)

    def ranked(self, messages: Sequence[Message], view: View) -> Sequence[str]:
        """The texts to be shown, the most wanted first: the newest."""
        return [each.text for each in reversed(self.texts.kept)]

    def remember_(self, experience: Experience, view: View) -> None:
        """Keep what was seen."""
        self.texts.add_(pieces(experience.trajectory, self.form), experience.trajectory.id)

    def cost(self) -> Cost:
        """The texts; what is read in front of a prompt is part of asking, and not counted here."""
        return Cost(self.texts.nbytes)

    def state(self) -> dict[str, Any]:
        """The texts."""
        return {"texts": self.texts.state()}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self.texts.load_state_(state["texts"])
