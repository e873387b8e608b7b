"""Texts of what was learned, kept outside the weights in a bounded number of bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.objectives.context import CONTEXTS, ContextKind, privileged_context
from featcl.streams.texts import message_text
from featcl.streams.trajectory import Trajectory

FORMS = ("exchanges", "sentences", *CONTEXTS)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Kept:
    """One text.

    Attributes:
        number: Of all that were ever kept, from 0.
        text: As it is shown.
        source: Id of the trajectory that it was made of.
        more: Bytes that are kept beside it, such as its vector.
    """

    number: int
    text: str
    source: str
    more: int = 0

    @property
    def nbytes(self) -> int:
        """Of the text in UTF-8, and what is kept beside it."""
        return len(self.text.encode("utf-8", "surrogatepass")) + self.more


class Texts:
    """The newest different texts that fit a budget of bytes, which is never exceeded.

    Args:
        budget_bytes: Of all texts together.
        owner: Name of the method, for errors.
    """

    def __init__(self, *, budget_bytes: int, owner: str) -> None:
        checks.count(owner, budget_bytes=budget_bytes)
        self.budget_bytes, self.owner = budget_bytes, owner
        self.kept: tuple[Kept, ...] = ()  # oldest first
        self.added = 0

    @property
    def nbytes(self) -> int:
        """Of all texts."""
        return sum(each.nbytes for each in self.kept)

    def add_(self, texts: Sequence[str], source: str, *, more: Mapping[str, int] | None = None) -> None:
        """Keep texts as the newest; the oldest go, and one that is there already becomes the newest.

        Args:
            texts: Empty ones are left out.
            source: Id of their trajectory.
            more: Bytes that are kept beside a new one, by text; 0 where it is not named.

        Raises:
            FeatclError: If a text alone is beyond the budget; none is kept then.
        """
        known = {each.text: each for each in self.kept}
        for text in dict.fromkeys(text for text in texts if text.strip()):
            new = known.pop(text, None) or Kept(self.added, text, source, (more or {}).get(text, 0))
            if new.nbytes > self.budget_bytes:
                raise FeatclError(
                    f"{self.owner}: a text of {source!r} has {new.nbytes} bytes, the budget is {self.budget_bytes}"
                )
            known[text] = new
            self.added += new.number == self.added
        kept, held = list(known.values()), sum(each.nbytes for each in known.values())
        while held > self.budget_bytes:
            held -= kept.pop(0).nbytes
        self.kept = tuple(kept)

    def state(self) -> dict[str, Any]:
        """The texts."""
        return {"kept": [[each.number, each.text, each.source, each.more] for each in self.kept], "added": self.added}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self.kept, self.added = tuple(Kept(*each) for each in state["kept"]), state["added"]


def pieces(trajectory: Trajectory, form: str) -> list[str]:
    """A trajectory as texts.

        exchanges      one text per reply: what was said since the reply before, and the reply
        sentences      one text per sentence of its note (meta["context"]) or its feedback; exchanges where it has none
        the others     one text, as `privileged_context` gives it

    Raw text is cut at empty lines; for sentences, at their ends.

    Raises:
        FeatclError: If the trajectory has not what the form shows.
    """
    if form == "sentences" and (said := trajectory.text or note(trajectory)):
        return sentences(said)
    if trajectory.text is not None:
        return [part.strip() for part in trajectory.text.split("\n\n") if part.strip()]
    if form not in ("exchanges", "sentences"):
        return [privileged_context(trajectory, cast(ContextKind, form))]
    found: list[str] = []
    lines: list[str] = []
    for message in trajectory.messages:
        lines.append(f"{message['role']}: {message_text(message)}")
        if message["role"] == "assistant":
            found.append("\n".join(lines))
            lines = []
    return found


def note(trajectory: Trajectory) -> str | None:
    """Its privileged text (meta["context"]), else its feedback."""
    found = trajectory.meta.get("context") or trajectory.feedback
    return found if isinstance(found, str) and found.strip() else None


def sentences(text: str) -> list[str]:
    """What ends in a full stop, a mark or a line feed."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def question(messages: Sequence[Mapping[str, Any]]) -> str:
    """What is asked: the last message that is not the assistant's; else all that was said."""
    asked = [message for message in messages if message["role"] != "assistant"]
    return message_text(asked[-1]) if asked else "\n".join(message_text(message) for message in messages)
