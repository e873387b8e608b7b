"""Texts of a conversation: what of a message is learned from, and its tokens with control tokens spelled out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from featcl.errors import FeatclError
from featcl.streams.trajectory import Message


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


def text_encoder(tokenizer: Any, template: str) -> Callable[[str], list[int]]:
    """An encoder of text in which control tokens are spelled out; a private copy, since it is a setting."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend).__module__.split(".")[0] != "tokenizers":
        return lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    backend = _guarded(backend, template + "".join(tokenizer.all_special_tokens))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _guarded(backend: Any, control: str) -> Any:
    """A copy in which every added token that occurs in `control` is a control token, whatever its flag says."""
    added = backend.get_added_tokens_decoder().values()
    if all(token.special for token in added if token.content in control):
        return copy.deepcopy(backend)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    return type(backend).from_str(json.dumps(state))
