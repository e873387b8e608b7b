"""The hooks of a memory: on one block, on the decoder that runs it, and on the module around that.

The decoder's hooks begin and end a pass, the block's hook does what the memory's form says. All that can be wrong with
a call is found when it begins; what a pass changes, the cache's state and the kept one, is changed when it has ended.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featcl.errors import FeatclError
from featcl.memory.branch import Branch
from featcl.memory.carried import Carried, carried_in, carry_
from featcl.memory.kept import Kept
from featcl.memory.passes import Asked, Pass, arguments, asked, decoder_paths
from featcl.memory.state import MemoryState
from featcl.models import hidden_of, inner_model, residual_map

SHELF = "_featcl_memories"
"""Attribute of the Hugging Face model that lists what is attached to it."""


class HookedMemory(Kept):
    """A branch on a block, and the states that it starts from and ends with.

    Args:
        model: The Hugging Face model, or a PeftModel around it.
        branch: What is added to the stream.
        layer: The block.
    """

    def __init__(self, model: Any, branch: Branch, *, layer: int) -> None:
        super().__init__(branch.memory)
        self.model, self.branch, self.layer = model, branch, layer
        self._key = uuid.uuid4().hex  # not the object itself: caches are copied, and so are models
        self._off = 0
        self._passes: dict[int, Pass] = {}  # under way, by thread: those of several threads must not meet
        self._outer_masks: dict[int, Any] = {}  # what the module around the decoder was given, if it was called
        self._measured: list[Tensor] | None = None
        self._handles: list[RemovableHandle] = []
        self._attach_()

    # --- on the model

    def _attach_(self) -> None:
        causal, path = inner_model(self.model), residual_map(self.model).layers_path
        block = causal.get_submodule(f"{path}.{self.layer}")
        decoder, around = (causal.get_submodule(name) for name in decoder_paths(causal))
        self._place_(next(block.parameters()).device)
        self._handles = [
            around.register_forward_pre_hook(self._on_outer_call, with_kwargs=True),
            decoder.register_forward_pre_hook(self._on_call, with_kwargs=True),
            decoder.register_forward_hook(self._on_return, always_call=True),
        ]
        if self.branch.form == "layer":
            self._handles.append(block.register_forward_pre_hook(self._on_input, prepend=True))
        else:
            self._handles.append(block.register_forward_hook(self._on_output))
            for key, hook in list(block._forward_hooks.items()):  # who only listens shall hear what the memory said
                if not str(getattr(hook, "__module__", "")).startswith("featcl."):
                    block._forward_hooks.move_to_end(key)
        vars(causal).setdefault(SHELF, []).append(self)

    def _place_(self, device: torch.device) -> None:
        self.branch.to(device)

    def _remove_(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        shelf = vars(inner_model(self.model)).get(SHELF, [])
        shelf[:] = [other for other in shelf if other is not self]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """As `Kept.writing`.

        Raises:
            FeatclError: If the memory is detached, where nothing would be written.
        """
        if not self._handles:
            raise FeatclError(f"memory at layer {self.layer}: it is detached, so it reads and writes nothing")
        with super().writing():
            yield

    # --- a pass begins and ends

    def _on_outer_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._outer_masks[get_ident()] = arguments(module, args, kwargs).get("attention_mask")

    def _on_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        thread = get_ident()
        self._passes.pop(thread, None)
        given = arguments(module, args, kwargs)
        mask = given.get("attention_mask")
        outer = self._outer_masks.pop(thread, mask)
        if self._off:
            return
        if isinstance(mask, Mapping):
            mask = outer
        self._passes[thread] = self._begun(asked(given, mask, layer=self.layer))

    def _begun(self, call: Asked) -> Pass:
        """The pass that a call begins, with where it starts from; every objection is raised here, before it runs."""
        writes = self._writing
        layer = None if call.cache is None else carried_in(call.cache, self._key)
        if call.tokens == 0:
            if writes:
                self._check_not_repeated(call)
            return Pass(call, Carried(self._start(call, writes=writes)), self._user, writes)
        if layer is None or layer.carried is None or layer.tokens != call.tokens:
            seen = 0 if layer is None else layer.tokens
            raise FeatclError(
                f"memory at layer {self.layer}: the cache holds {call.tokens} tokens, of which the memory has read "
                f"{seen} (switched off, attached later, cut, or a pass that failed); begin with a new cache"
            )
        if layer.user != self._user:
            raise FeatclError(
                f"memory at layer {self.layer}: the cache was begun for {_whose(layer.user)}, now it is "
                f"{_whose(self._user)}; keep one cache per user"
            )
        if writes:
            self._check_continues(call, layer.carried)
        return Pass(call, layer.carried, self._user, writes)

    def _start(self, call: Asked, *, writes: bool) -> MemoryState | None:
        """The kept state, in as many rows as the call has; one row may be read by many, but not written by them."""
        state = self._state
        if state is None or state.batch == call.batch:
            return state
        if state.batch != 1 or writes:
            raise FeatclError(
                f"memory at layer {self.layer}: the kept state has {state.batch} rows, the call has {call.batch}"
                + ("; only as many rows can be written" if writes else "")
            )
        return state.repeat(call.batch)

    def _check_continues(self, call: Asked, carried: Carried) -> None:
        if call.batch > 1:
            raise FeatclError(
                f"memory at layer {self.layer}: {call.batch} rows are decoded inside writing(), where rows that have "
                "stopped would be written padding; decode one row, or inside held() and write the replies after it"
            )
        if not _equal(carried.state, self._state):
            raise FeatclError(
                f"memory at layer {self.layer}: the kept state is not the one that this cache stands at, and would be "
                "lost by writing; begin with a new cache"
            )

    def _check_not_repeated(self, call: Asked) -> None:
        """Generation without a cache reads the whole text again for each token: it would be written as often."""
        last = self._last_ids
        if last is None or call.input_ids is None or call.input_ids.shape != (len(last), last.shape[1] + 1):
            return
        if torch.equal(call.input_ids[:, :-1], last):
            raise FeatclError(
                f"memory at layer {self.layer}: inside writing() the same text comes again, one token longer: "
                "generation with use_cache=False would write it once per token; use a cache"
            )

    def _on_return(self, _module: nn.Module, _args: Any, output: Any) -> None:
        done = self._passes.pop(get_ident(), None)
        if done is None or done.end is None or output is None:  # off, ended before the block, or failed
            return
        cache = done.asked.cache if done.asked.cache is not None else _cache_of(output)
        if cache is not None:
            carry_(cache, self._key, done.user, done.end, tokens=done.asked.tokens + done.asked.seq)
        if done.writes:
            self._state, self._last_ids = done.end.state, done.asked.input_ids if cache is None else None

    # --- its block runs

    def _on_input(self, block: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if self._off:
            return None
        changed = self._changed(block, inputs[0], inputs[0])
        return (changed, *inputs[1:])

    def _on_output(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self._off:
            return None  # the block's own output, untouched
        hidden = hidden_of(output)
        changed = self._changed(block, hidden if self.branch.constrained else inputs[0], hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _changed(
        self, block: nn.Module, read: Float[Tensor, "batch seq d_model"], stream: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        """The stream with what the memory adds, cast back to its dtype; notes where the memory stands then."""
        run = self._passes.get(get_ident())
        if run is None or run.end is not None:
            raise FeatclError(
                f"memory at layer {self.layer}: its block ran outside a forward pass of the model, or twice in one"
            )
        # a block that is skipped gives the trunk's end, to which this update would be added a second time
        if getattr(block.__dict__.get("forward"), "__module__", None) == "featcl.adapters.trunk":
            raise FeatclError(
                f"memory at layer {self.layer}: a frozen trunk that ends above it skips its block; end the trunk at "
                f"block {self.layer} or below (trunk_end)"
            )
        if self.branch.gate.device != stream.device:  # the model was moved after the memory was attached
            self._place_(stream.device)
        mask = None if run.asked.mask is None else run.asked.mask.to(stream.device)
        start = run.start.to(stream.device)
        if self._measured is not None:
            self._measured.append(self.memory.surprise(self.branch.normalised(read, mask)[0], start.state, mask=mask))
        update, run.end = self.branch(read, start, mask=mask)
        return (stream + update).to(stream.dtype)  # promotes to the wider of the two


def _cache_of(output: Any) -> Any:
    """The cache that a pass made of itself, if it did."""
    parts = output if isinstance(output, tuple) else output.values()
    return next((part for part in parts if hasattr(part, "layers") and hasattr(part, "get_seq_length")), None)


def _equal(state: MemoryState | None, other: MemoryState | None) -> bool:
    return state is other or (state is not None and other is not None and state.equal(other))


def _whose(user: str | None) -> str:
    return "nobody in particular" if user is None else f"user {user!r}"
