"""Conversations to token ids and loss masks, through the model's own chat template.

The template's pieces are tokenised with control tokens; contents apart, with control tokens split, so that a user's
literal `<end_of_turn>` stays text. (A control marker that the vocabulary itself spells as ordinary text, such as
`<|user|>` of OLMo-2-Instruct, cannot be told from the same letters in a content.)

Without a template, the plain form is used: `user: …` and `assistant: …`, one line feed between turns, the
tokenizer's start token in front and its end token (else the line feed) after each assistant turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from featcl.errors import FeatclError
from featcl.streams.template import Template
from featcl.streams.texts import message_text, text_encoder
from featcl.streams.trajectory import Message, check_messages

Mask = Literal["assistant", "environment", "all", "none"]
LONGEST_CACHED = 512  # characters of a content whose tokens are kept
Turn = tuple[str, str]  # (role, content), role one of system, user, assistant


@dataclass(frozen=True)
class Encoded:
    """Tokens of one conversation or window of it.

    Attributes:
        input_ids: Token ids.
        loss_mask: True where the token is a target; position t is predicted from the tokens before it.
    """

    input_ids: list[int]
    loss_mask: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


class Chat:
    """The chat form of one tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer, with or without a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._template = Template(tokenizer)
        self._cached_ids = lru_cache(maxsize=1 << 16)(self._encode_content)

    # --- public -----------------------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message], *, mask: Mask = "assistant") -> Encoded:
        """Tokens of a conversation and which of them are targets.

        Args:
            messages: Chat messages, tool calls and tool results included.
            mask: `assistant`: contents of assistant turns with the token that ends them; `environment`: contents
                of user and tool turns; `all`: everything but the first token; `none`: nothing.

        Returns:
            Ids and mask of equal length.

        Raises:
            FeatclError: If no token would be a target, or the template does not render prefixes consistently.
        """
        turns = self.turns(messages)
        segments = self._template.layout(tuple(role for role, _ in turns))
        wanted = {"assistant": ("assistant",), "environment": ("user",)}.get(mask, ())
        ids = list(segments[0].ids)
        targets = [False] * len(ids)
        for index, (role, content) in enumerate(turns):
            tokens, after = self._content_ids(content), segments[index + 1]
            learned = role in wanted
            if learned and segments[index].reply_start:
                targets[-segments[index].reply_start :] = [True] * segments[index].reply_start
            ends = after.reply_end if learned else 0
            ids += tokens
            ids += after.ids
            targets += [learned] * len(tokens) + [True] * ends + [False] * (len(after.ids) - ends)
        if mask == "all":
            targets = [True] * len(ids)
        if ids:
            targets[0] = False
        if mask != "none" and not any(targets):
            raise FeatclError(f"no token to learn from: the conversation has no {mask} turn with content")
        return Encoded(ids, targets)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to and including the header of the assistant turn that follows `messages`."""
        turns = self.turns(messages)
        segments = self._template.layout(tuple(role for role, _ in turns), generation=True)
        ids = list(segments[0].ids)
        for (_, content), after in zip(turns, segments[1:], strict=True):
            ids += self._content_ids(content)
            ids += after.ids
        return ids

    def encode_text(self, text: str) -> Encoded:
        """Raw text after the tokenizer's own start token, if it uses one; every token of the text is a target."""
        start = self._start_ids
        ids = [*start, *self._encode_content(text)]
        targets = [False] * len(start) + [True] * (len(ids) - len(start))
        if ids:
            targets[0] = False
        if not any(targets):
            raise FeatclError("no token to learn from: the text has fewer than two tokens")
        return Encoded(ids, targets)

    def reply_ids(self, content: str) -> list[int]:
        """Ids of an assistant's reply with the token that ends it, as `encode` places them after a prompt."""
        segment = self._template.layout(("user", "assistant"))[-1]
        return [*self._content_ids(self._placed("assistant", content)), *segment.ids[: segment.reply_end]]

    def decode_reply(self, ids: Sequence[int]) -> str:
        """The text of a generated reply: cut at the first stop token, control tokens left out, stripped."""
        stop = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
        decode = self.tokenizer.decode
        return decode(list(ids[:stop]), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def with_context(self, messages: Sequence[Message], context: str) -> list[Message]:
        """The conversation with privileged text in front, as (part of) its system message.

        Where the family refuses a system role, `encode` and `prompt` fold it into the first user turn.
        """
        rest = list(messages)
        if rest and rest[0].get("role") in ("system", "developer"):
            return [{"role": "system", "content": f"{context}\n{message_text(rest[0])}"}, *rest[1:]]
        return [{"role": "system", "content": context}, *rest]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an assistant turn: the one the template writes there, and the tokenizer's end token."""
        return self._template.stop_ids

    @property
    def system_role(self) -> bool:
        """Whether the template accepts a system message and shows it (Gemma's raises, others drop it)."""
        return self._template.system_role

    @cached_property
    def start_id(self) -> int | None:
        """Id of the start token, if the tokenizer or its template puts one in front."""
        start = self.tokenizer.bos_token_id
        return start if start in (*self._start_ids, *self.prompt([{"role": "user", "content": "a"}])[:1]) else None

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Messages as the template will see them.

        Tool results become user turns (`tool: …`), tool calls text (`call name(arguments)`); a system message is
        folded into the first user turn where the family refuses it, and where it is not the first message becomes
        a user turn (`system: …`); neighbours of one role are joined by a line feed.

        Raises:
            FeatclError: If there are no messages or one has an unknown role or no content.
        """
        check_messages(messages, "messages")
        if not messages:
            raise FeatclError("messages are empty; a conversation needs at least one")
        turns: list[Turn] = []
        for index, message in enumerate(messages):
            role, content = self._turn(message, first=index == 0)
            if turns and turns[-1][0] == role:
                turns[-1] = (role, f"{turns[-1][1]}\n{content}")
            else:
                turns.append((role, content))
        return [(role, self._placed(role, content)) for role, content in turns]

    # --- from messages to turns -------------------------------------------------------------------------------

    def _turn(self, message: Message, *, first: bool) -> Turn:
        role, content = message["role"], message_text(message)
        if role in ("tool", "function"):
            return "user", f"tool: {content}"
        if role in ("system", "developer"):
            if first:
                return ("system" if self.system_role else "user"), content
            return "user", f"system: {content}"
        return role, content

    def _placed(self, role: str, content: str) -> str:
        """Content as the template places it: stripped where the template strips; in the plain form after a space."""
        if self._template.is_plain:
            return content.strip() if self._adds_space else f" {content.strip()}"
        return content.strip() if self._template.trims[role] else content

    # --- from text to ids -------------------------------------------------------------------------------------

    def _content_ids(self, content: str) -> list[int]:
        return self._cached_ids(content) if len(content) <= LONGEST_CACHED else self._encode_content(content)

    def _encode_content(self, content: str) -> list[int]:
        try:
            return self._split(content) if content else []
        except (TypeError, UnicodeError) as error:
            raise FeatclError(f"content is not text that can be tokenised ({error}): {content!r:.60}") from error

    @cached_property
    def _split(self) -> Callable[[str], list[int]]:
        return text_encoder(self.tokenizer, self._template.written)

    @cached_property
    def _start_ids(self) -> list[int]:
        """What the tokenizer puts in front of a text by itself."""
        whole, bare = self.tokenizer("a")["input_ids"], self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return whole[: whole.index(bare[0])] if bare[0] in whole else []

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer itself puts a space in front of a text."""
        first = self.tokenizer.convert_ids_to_tokens(self._split("a"))[0]
        return first[:1] in ("▁", "Ġ")
