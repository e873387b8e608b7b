"""Methods whose memory lies outside the weights: they change what the model is asked, or what its attention sees.

    asked = method.context(messages, view)             in chat and evaluation: with the memory in front of the prompt
    learned = method.learned(trajectory, view)         in learning: the same
    with method.around(view): …                        what acts inside forward passes, in chat and evaluation
    reason = method.postpones_(experience, view)       why nothing is learned from an experience, or None

By default the weights stand still: an experience is remembered and not learned from. With `frozen` false both happen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from featcl.methods.method import Method, View
from featcl.objectives.experience import Experience
from featcl.streams.chat import Chat
from featcl.streams.messages import Message
from featcl.streams.trajectory import Trajectory


class Outside(Method):
    """A method that remembers nothing; a subclass overrides what it needs.

    Attributes:
        frozen: Whether the weights stand still.
    """

    name = "outside"
    frozen = True

    @property
    def keeps_still(self) -> bool:
        """As `frozen` says."""
        return self.frozen

    # --- what a subclass has, beside `context` or `around`

    def remember_(self, experience: Experience, view: View) -> None:
        """Keep what an experience holds."""

    # --- in learning

    def learned(self, trajectory: Trajectory, view: View) -> Trajectory:
        """What is encoded and given to the objectives in place of a trajectory.

        By default with its context in front; recorded tokens, which were sampled without it, are then left out. Raw
        text stays as it is.
        """
        if not trajectory.messages:
            return trajectory
        return with_messages(trajectory, self.context(trajectory.messages, view))

    def postpones_(self, experience: Experience, view: View) -> str | None:
        """Remember the experience, where the weights stand still, and say so; None: learn from it."""
        if not self.frozen:
            return None
        self.remember_(experience, view)
        return f"{self.name}: kept outside the weights"

    def after_update_(self, experience: Experience, view: View) -> None:
        """Remember what was learned from."""
        self.remember_(experience, view)


def with_messages(trajectory: Trajectory, messages: Sequence[Message]) -> Trajectory:
    """The trajectory with another conversation, which has to be tokenised anew if it is another one."""
    if tuple(messages) == trajectory.messages:
        return trajectory
    return replace(trajectory, messages=tuple(messages), token_ids=None, token_mask=None, logprobs=None)


def in_front(
    chat: Chat, messages: Sequence[Message], texts: Sequence[str], *, room: int, joiner: str = "\n"
) -> Sequence[Message]:
    """The conversation with as many of the texts in front as fit, as (part of) its system message.

    Args:
        chat: Counts tokens.
        messages: The conversation.
        texts: In order of preference: the first ones are kept; the best stands last, next to the question.
        room: Tokens that prompt and context may have together.
        joiner: Stands between two texts.

    Returns:
        `messages` itself where no text fits.
    """

    def with_first(count: int) -> Sequence[Message]:
        return chat.with_context(messages, joiner.join(reversed(texts[:count]))) if count else messages

    fits, fails = 0, len(texts) + 1
    count = _guess(chat, messages, texts, room=room, joiner=joiner) if texts else 0
    while fails - fits > 1:
        if len(chat.prompt(with_first(count))) <= room:
            fits, count = count, count + 1
        else:
            fails, count = count, count - 1
        if not fits < count < fails:
            count = (fits + fails) // 2
    return with_first(fits)


def _guess(chat: Chat, messages: Sequence[Message], texts: Sequence[str], *, room: int, joiner: str) -> int:
    """About how many texts fit, from 1 to all, by the tokens of the first few: where the search begins."""
    bare, sample = len(chat.prompt(messages)), joiner.join(texts[:8])
    each = (len(chat.prompt(chat.with_context(messages, sample))) - bare) / max(1, len(sample))
    used, count = float(bare), 0
    while count < len(texts) and used <= room:
        used += each * (len(texts[count]) + len(joiner))
        count += 1
    return max(1, count - (used > room))
