"""The methods of a learner that one talks with; what they do is in `live.py`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from featcl.learning.conversations import Conversations, Reply
from featcl.learning.live import Learned, Live, OnText, Redone
from featcl.learning.remembering import Remembering, alone
from featcl.streams.trajectory import Message


class Talking:
    """A learner that replies, is judged, and learns from what was judged.

    reply = learner.chat([{"role": "user", "content": "when does the bakery open?"}])
    learner.feedback(reply.id, correction="At seven.")
    learner.learn()
    """

    adapter: Any
    _live: Live
    _remembering: Remembering | None

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        on_text: OnText | None = None,
    ) -> Reply:
        """The present model's reply to a conversation; learns nothing until it was judged.

        Args:
            messages: Chat messages, the last one usually the user's.
            max_new_tokens: Longest reply in tokens.
            temperature: 0 is greedy.
            on_text: Called with each piece of the reply while it is written.

        Returns:
            A string with an `id`, for `feedback`.

        Raises:
            FeatclError: If the messages fill the model's context.
        """
        return self._live.chat(messages, max_new_tokens=max_new_tokens, temperature=temperature, on_text=on_text)

    def feedback(
        self,
        trajectory_id: str,
        *,
        reward: float | None = None,
        correction: str | None = None,
        text: str | None = None,
    ) -> None:
        """Say what a reply was worth; `learn` learns from it.

        Args:
            trajectory_id: The reply's `id`.
            reward: How good it was; above 0 is good.
            correction: What should have been said: the target of `sft`, and what `preference` prefers to the reply.
            text: What there is to say about it, as context for `self_distillation`.

        Raises:
            FeatclError: For an unknown reply, or no judgement.
        """
        self._live.feedback(trajectory_id, reward=reward, correction=correction, text=text)

    def learn(self) -> Learned:
        """One update for each conversation that was judged and not learned from since, oldest first.

        Tokens are learned from as they were sampled. What the present objectives cannot use keeps waiting: a reply
        that was judged bad, for instance, cannot be imitated.

        Returns:
            The updates, and what was left with the reason.

        Raises:
            FeatclError: From `observe`; that conversation waits for another judgement, and the others are whole.
        """
        return self._live.learn()

    def undo(self) -> int:
        """Go back to the version before the last update, exactly; what it was learned from does not wait again.

        Returns:
            The version that is restored.

        Raises:
            FeatclError: If no earlier version is kept.
        """
        return self._live.undo()

    def record(self, path: str | Path) -> Redone:
        """Keep a journal: from here on, replies, judgements and learning are on the disk before they act.

        What the file holds beyond what this learner was saved with is done again first: replies as they were said,
        updates as they were made. Together, `save` and the journal lose nothing.

        Args:
            path: A JSONL file; it is made, or continued.

        Returns:
            What was done again.

        Raises:
            FeatclError: If the file is damaged, or is not this learner's.
        """
        return self._live.record(path)

    @property
    def conversations(self) -> Conversations:
        """What was said, and what waits to be learned from."""
        return self._live.conversations

    def alone(self) -> AbstractContextManager[None]:
        """Inside the block the model is this learner's, where several adapters or memories share it."""
        return alone(self.adapter, self._remembering)
