"""Conversations to token ids and loss masks, through the model's own chat template.

A template is rendered once per pattern of roles, with placeholders for the contents. The pieces between the
placeholders are tokenised with control tokens; the contents apart, with control tokens split, so that a user's
literal `<end_of_turn>` stays text. (A control marker that the vocabulary itself spells as ordinary text, such as
`<|user|>` of OLMo-2-Instruct, cannot be told from the same letters in a content.)

Which tokens are the assistant's is found by prefix differences: what `messages[: i + 1]` renders beyond
`messages[:i]` with its generation prompt. Templates' own generation marks are not used: the official Gemma and
OLMo templates carry none.

Without a template, the plain form is used: `user: …` and `assistant: …`, one line feed between turns, the
tokenizer's start token in front and its end token (else the line feed) after each assistant turn.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from featcl.errors import FeatclError
from featcl.streams.trajectory import Message, check_messages

Mask = Literal["assistant", "environment", "all", "none"]
Turn = tuple[str, str]  # (role, content), role one of system, user, assistant

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'] + ':' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
)


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


@dataclass(frozen=True)
class _Segment:
    """Tokens of the template between two contents: `reply_end` first ones end an assistant turn, `reply_start`
    last ones are the template's own start of an assistant turn beyond the generation prompt."""

    ids: tuple[int, ...]
    reply_end: int = 0
    reply_start: int = 0


class Chat:
    """The chat form of one tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer, with or without a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._content_ids = lru_cache(maxsize=1 << 16)(self._encode_content)
        self._layouts: dict[tuple[tuple[str, ...], bool], tuple[_Segment, ...]] = {}
        self._pieces: dict[tuple[tuple[str, ...], bool], tuple[str, ...]] = {}

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
        segments = self._layout(tuple(role for role, _ in turns), False)
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
        segments = self._layout(tuple(role for role, _ in turns), True)
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
        segment = self._layout(("user", "assistant"), False)[-1]
        return [*self._content_ids(self._placed("assistant", content)), *segment.ids[: segment.reply_end]]

    def decode_reply(self, ids: Sequence[int]) -> str:
        """The text of a generated reply: cut at the first stop token, control tokens left out, stripped."""
        stop = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(list(ids[:stop]), skip_special_tokens=True).strip()

    def with_context(self, messages: Sequence[Message], context: str) -> list[Message]:
        """The conversation with privileged text in front, as (part of) its system message.

        Where the family refuses a system role, `encode` and `prompt` fold it into the first user turn.
        """
        rest = list(messages)
        if rest and rest[0]["role"] in ("system", "developer"):
            return [{"role": "system", "content": f"{context}\n{message_text(rest[0])}"}, *rest[1:]]
        return [{"role": "system", "content": context}, *rest]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an assistant turn: the one the template writes there, and the tokenizer's end token."""
        end = self.tokenizer.eos_token_id
        written = self._turn_end_id
        return frozenset(token for token in (written, end) if token is not None)

    @cached_property
    def start_id(self) -> int | None:
        """Id of the start token, if the tokenizer or its template puts one in front."""
        start = self.tokenizer.bos_token_id
        return start if start in (*self._start_ids, *self.prompt([{"role": "user", "content": "a"}])[:1]) else None

    @cached_property
    def system_role(self) -> bool:
        """Whether the template accepts a system message and shows it (Gemma's raises, others drop it)."""
        try:
            self._render_pieces(("system", "user"), False)
        except FeatclError:
            return False
        return True

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
        if not self.has_template:
            return content.strip() if self._adds_space else f" {content.strip()}"
        return content.strip() if self._trims[role] else content

    @cached_property
    def _trims(self) -> dict[str, bool]:
        """Whether the template strips contents of a role."""
        roles = ("system", "user", "assistant") if self.system_role else ("user", "assistant")
        plain = _placeholders(len(roles))
        text = self._render(roles, plain, False)
        trims = {"system": False}
        for index, role in enumerate(roles):
            padded = [f" {name} " if place == index else name for place, name in enumerate(plain)]
            trims[role] = self._render(roles, padded, False) == text
        return trims

    # --- from roles to template tokens ------------------------------------------------------------------------

    def _layout(self, roles: tuple[str, ...], generation: bool) -> tuple[_Segment, ...]:
        key = (roles, generation)
        if key not in self._layouts:
            self._layouts[key] = self._build_layout(roles, generation)
        return self._layouts[key]

    def _build_layout(self, roles: tuple[str, ...], generation: bool) -> tuple[_Segment, ...]:
        pieces = self._render_pieces(roles, generation)
        segments = []
        for index, piece in enumerate(pieces):
            before = roles[index - 1] if index else None
            after = roles[index] if index < len(roles) else None
            header = self._header(roles, index, pieces) if after == "assistant" else piece
            beyond = self._control_ids(piece[len(header) :])
            ids = [*self._control_ids(header), *beyond]
            end = self._reply_end(ids) if before == "assistant" else 0
            segments.append(_Segment(tuple(ids), reply_end=end, reply_start=len(beyond)))
        return tuple(segments)

    def _header(self, roles: tuple[str, ...], index: int, pieces: tuple[str, ...]) -> str:
        """The generation prompt before assistant turn `index`; it must be a prefix of what the template renders."""
        if index == 0:
            return pieces[0]
        prefix = self._render_pieces(roles[:index], True)
        if prefix[:-1] != pieces[:index] or not pieces[index].startswith(prefix[-1]):
            raise FeatclError(
                f"chat template is not prefix-consistent before assistant turn {index} of roles {list(roles)}: "
                f"with a generation prompt it ends in {prefix[-1]!r}, in the whole conversation {pieces[index]!r}; "
                "loss masks would be wrong"
            )
        return prefix[-1]

    def _reply_end(self, ids: Sequence[int]) -> int:
        """How many first tokens of a piece belong to the reply: up to and including the token that ends it."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None:
            raise FeatclError("chat template ends an assistant turn without one of the stop tokens")
        return end + 1

    @cached_property
    def _turn_end_id(self) -> int | None:
        """The first control token, or else the first token, that the template writes after a reply."""
        ids = self._control_ids(self._render_pieces(("user", "assistant"), False)[-1])
        special = set(self.tokenizer.all_special_ids)
        return next((token for token in ids if token in special), ids[0] if ids else None)

    def _render_pieces(self, roles: tuple[str, ...], generation: bool) -> tuple[str, ...]:
        """The template's text before, between and after the contents of `roles`."""
        key = (roles, generation)
        if key not in self._pieces:
            names = _placeholders(len(roles))
            rest, pieces = self._render(roles, names, generation), []
            for name, role in zip(names, roles, strict=True):
                piece, found, rest = rest.partition(name)
                if not found or name in rest:
                    raise FeatclError(f"chat template shows a {role} message not exactly once; roles: {list(roles)}")
                pieces.append(piece)
            self._pieces[key] = (*pieces, rest)
        return self._pieces[key]

    def _render(self, roles: Sequence[str], contents: Sequence[str], generation: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        options: dict[str, Any] = {}
        if not self.has_template:
            options = {"chat_template": PLAIN_TEMPLATE}
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **options
            )
        except TemplateError as error:
            raise FeatclError(f"chat template refuses roles {list(roles)}: {error}") from error

    # --- from text to ids -------------------------------------------------------------------------------------

    def _control_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _encode_content(self, content: str) -> list[int]:
        return self._split(content) if content else []

    @cached_property
    def _split(self) -> Callable[[str], list[int]]:
        roles = ("system", "user", "assistant") if self.system_role else ("user", "assistant")
        return _split_encoder(self.tokenizer, "".join(self._render_pieces(roles, False)) if self.has_template else "")

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


def _placeholders(count: int) -> list[str]:
    return [f"zq{index}contentq{index}z" for index in range(count)]


def message_text(message: Message) -> str:
    """Content of a message as text, its tool calls appended as `call name(arguments)`."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "\n".join(_part(part) for part in content)
    lines = [content] if content else []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        lines.append(f"call {function.get('name')}({arguments})")
    return "\n".join(lines)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise FeatclError(f"only text parts can be learned from, got {part!r:.80}")


def _split_encoder(tokenizer: Any, template: str) -> Callable[[str], list[int]]:
    """An encoder of text in which control tokens are spelled out; a private copy, since it is a setting."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend).__module__.split(".")[0] != "tokenizers":
        return lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    backend = _guarded(backend, template)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _guarded(backend: Any, template: str) -> Any:
    """A copy in which every added token that the template writes is a control token, whatever its flag says."""
    state = json.loads(backend.to_str()) if template else {"added_tokens": ()}
    plain = [token for token in state["added_tokens"] if token["content"] in template and not token["special"]]
    if not plain:
        return copy.deepcopy(backend)
    for token in plain:
        token["special"] = True
    return type(backend).from_str(json.dumps(state))
