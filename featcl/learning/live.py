"""Talking with a learner: it replies, is judged, and learns from what was judged (`Talking` has the public methods).

With `learner.record(path)` each of these is in a journal on the disk before it acts, so that after a crash a learner
that was loaded from its last save and records to the same file is where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import wraps
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from featcl.errors import FeatclError
from featcl.learning.conversations import Conversation, Conversations, Reply, plain_messages
from featcl.learning.guard import Stopped
from featcl.learning.journal import Journal, check_of
from featcl.learning.judging import check_judgement, unusable
from featcl.learning.randomness import derived_generator
from featcl.learning.stats import UpdateStats
from featcl.models import max_context
from featcl.streams.chat import Chat
from featcl.streams.rollouts import generate
from featcl.streams.trajectory import Message

if TYPE_CHECKING:
    from featcl.learning.learner import Learner

OnText = Callable[[str], None]
P = ParamSpec("P")
T = TypeVar("T")


def acting_alone(method: Callable[Concatenate[Learner, P], T]) -> Callable[Concatenate[Learner, P], T]:
    """A method of a learner inside which its own adapter and memory act, and no other on the model."""

    @wraps(method)
    def inside(learner: Learner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with learner.alone():
            return method(learner, *args, **kwargs)

    return inside


@dataclass(frozen=True)
class Learned:
    """What `Learner.learn` did; iterates over the updates.

    Attributes:
        updates: One per conversation that was learned from (or quarantined: see `UpdateStats.quarantined`).
        left: Of each conversation that still waits, why.
    """

    updates: tuple[UpdateStats, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[UpdateStats]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


@dataclass(frozen=True)
class Redone:
    """What `Learner.record` found in the journal beyond what the learner was saved with, and did again.

    Attributes:
        records: How many acts.
        updates: What was learned among them.
        errors: What was raised when they were done first, and again.
    """

    records: int = 0
    updates: tuple[UpdateStats, ...] = ()
    errors: tuple[str, ...] = ()


class Live:
    """The talking side of one learner: its conversations and their journal.

    Args:
        learner: Whose it is.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        named = learner.adapter.name != "default"
        self.user = learner.adapter.name if named else None
        self.conversations = Conversations(f"{learner.adapter.name}-chat" if named else "chat")
        self.journal: Journal | None = None
        self._position = 0  # records of the journal that this state holds
        self._last: str | None = None  # check of the last of them

    # --- the three acts ---------------------------------------------------------------------------------------

    def chat(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, on_text: OnText | None
    ) -> Reply:
        """See `Learner.chat`."""
        learner, chat, answering = self.learner, self.learner.student.chat, self.learner.answering()
        key = self.conversations.next_id
        shown = None if on_text is None else Shown(chat, on_text)
        with learner.alone():
            prompt = chat.prompt(answering.asked(messages))
            room = max_context(learner.student.scorer.causal) - answering.taken - len(prompt)
            if room < 1:
                beside = f" beside {answering.taken} that methods take" if answering.taken else ""
                raise FeatclError(
                    f"the conversation has {len(prompt)} tokens{beside}, the model's context is full; shorten it"
                )
            with answering.of(messages):
                rollout = generate(
                    learner.student.scorer.causal,
                    [prompt],
                    max_new_tokens=min(max_new_tokens, room),
                    temperature=temperature,
                    stop_ids=chat.stop_ids,
                    generator=derived_generator(learner.seed, key, "chat"),
                    on_token=shown,
                )
        text = chat.decode_reply(rollout.token_ids[0])
        if shown is not None:
            shown.finish(text)
        conversation = Conversation(
            key, plain_messages(messages), text, tuple(prompt), tuple(rollout.token_ids[0]),
            tuple(rollout.logprobs[0]), learner.version,
        )  # fmt: skip
        self._write({"event": "reply", **conversation.to_record()})
        self.conversations.add_(conversation)
        return Reply.of(conversation)

    def feedback(self, key: str, *, reward: float | None, correction: str | None, text: str | None) -> None:
        """See `Learner.feedback`."""
        check_judgement(reward, correction, text)
        _ = self.conversations[key]
        self._write({"event": "feedback", "id": key, "reward": reward, "correction": correction, "text": text})
        self.conversations.judge_(key, reward=reward, correction=correction, feedback=text)

    def learn(self) -> Learned:
        """See `Learner.learn`."""
        updates: list[UpdateStats] = []
        left: dict[str, str] = {}
        any_use = any(reason is None for _, reason in self._waiting())
        with self._written({"event": "learn"}) if any_use else nullcontext():
            self._learn_(updates, left)
        return Learned(tuple(updates), left)

    def _learn_(self, updates: list[UpdateStats], left: dict[str, str], *, until: str | None = None) -> None:
        """Learn from what waits; what was done is in `updates` and `left` also when an error ends it.

        Args:
            updates, left: Are added to.
            until: The conversation at which it was interrupted.
        """
        for conversation, reason in self._waiting():
            if reason is not None:
                left[conversation.id] = reason
                continue
            if conversation.id == until:
                return
            try:
                updates.append(self.learner.observe(conversation.trajectory(self.user)))
            except Stopped as stop:  # the update itself was made
                self.conversations.learned_(conversation.id)
                updates += [] if stop.stats is None else [stop.stats]
                raise
            except FeatclError as error:
                self.conversations.failed_(conversation.id, str(error))
                raise
            self.conversations.learned_(conversation.id)

    def _waiting(self) -> list[tuple[Conversation, str | None]]:
        """What waits to be learned from, each with the reason why it cannot be."""
        return [(found, found.failed or self._unusable(found)) for found in self.conversations.waiting]

    def _unusable(self, conversation: Conversation) -> str | None:
        """Why neither objectives nor methods can learn from a judgement, or None."""
        reason = unusable(conversation, self.learner.terms)
        if reason is None or any(method.uses(conversation.trajectory(self.user)) for method in self.learner.methods):
            return None
        return reason

    def undo(self) -> int:
        """See `Learner.undo`."""
        version = self.learner.version - 1
        if version not in self.learner.versions:
            raise FeatclError(
                f"there is nothing to undo: of version {version}, before the last update, nothing is kept"
            )
        with self._written({"event": "undo", "version": version}):
            self.learner.rollback(version)
        return version

    # --- never lost -------------------------------------------------------------------------------------------

    def record(self, path: str | Path) -> Redone:
        """See `Learner.record`."""
        journal = Journal(path, after=self._position)
        if len(journal) < self._position or journal.known != self._last:
            journal.close()
            raise FeatclError(
                f"{path} holds {len(journal)} records, the learner was saved after {self._position} of its own: "
                "it is not this learner's journal"
            )
        if self.journal is not None:
            self.journal.close()
        self.journal = None  # what is there is not written again
        missed, journal.records = journal.records, []
        updates: list[UpdateStats] = []
        errors: list[str] = []
        try:
            for record, after in zip_longest(missed, missed[1:]):
                try:
                    self._repeat(record, after or {}, updates)
                except FeatclError as error:  # as it was raised then
                    errors.append(str(error))
                self._position, self._last = self._position + 1, check_of(record)
        except BaseException:  # what was not done again is so the next time
            journal.close()
            raise
        self.journal = journal
        return Redone(len(missed), tuple(updates), tuple(errors))

    def _repeat(self, record: Mapping[str, Any], after: Mapping[str, Any], updates: list[UpdateStats]) -> None:
        """Do what a record says; where the one after it says that it was interrupted, what it did until then."""
        content = {key: value for key, value in record.items() if key != "event"}
        interrupted = after.get("event") == "interrupted"
        if record["event"] == "reply":
            self.conversations.add_(Conversation.from_record(content))
        elif record["event"] == "feedback":
            judgement = {"reward": content["reward"], "correction": content["correction"], "feedback": content["text"]}
            self.conversations.judge_(content["id"], **judgement)
        elif record["event"] == "learn":
            self._learn_(updates, {}, until=after["id"] if interrupted else None)
        elif record["event"] == "undo" and not interrupted:
            self.learner.rollback(content["version"])

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.journal is not None:
            self._last = self.journal.append_(record)
            self._position += 1

    @contextmanager
    def _written(self, record: Mapping[str, Any]) -> Iterator[None]:
        """An act whose record is on the disk first; one that Ctrl-C or a full disk ends is not done again later.

        An error of the input is, since it is raised again by what raised it.
        """
        self._write(record)
        try:
            yield
        except FeatclError:
            raise
        except BaseException:
            waiting = (conversation.id for conversation, reason in self._waiting() if reason is None)
            with suppress(OSError):
                self._write({"event": "interrupted", "id": next(waiting, None)})
            raise

    def state(self) -> dict[str, Any]:
        """As JSON data."""
        return {**self.conversations.state(), "journal": self._position, "last": self._last}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self.conversations.load_state_(state)
        self._position, self._last = state["journal"], state["last"]


class Shown:
    """Gives a reply away piece by piece while it is written.

    What is given is always the beginning of the final text: an unfinished character and white space at the end wait.

    Args:
        chat: Decodes.
        give: Called with each new piece.
    """

    def __init__(self, chat: Chat, give: OnText) -> None:
        self.chat = chat
        self.give = give
        self._ids: list[int] = []
        self._given = ""

    def __call__(self, row: int, token: int) -> None:
        """One more token, of the only prompt."""
        self._ids.append(token)
        self._up_to(self.chat.decode_reply(self._ids).rstrip("\N{REPLACEMENT CHARACTER}").rstrip())

    def finish(self, text: str) -> None:
        """The whole reply."""
        self._up_to(text)

    def _up_to(self, text: str) -> None:
        if len(text) > len(self._given) and text.startswith(self._given):
            self.give(text[len(self._given) :])
            self._given = text
