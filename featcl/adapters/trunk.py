"""The frozen trunk: blocks below the lowest adapted one compute the same for the same tokens, so once is enough.

    state = run_trunk(model, input_ids, attention_mask, layer=adapter.lowest_layer)
    with resumed(model, state):
        model(**state.inputs)          # embeds, skips to block `layer`, goes on: bit-equal to the full forward pass

Masks, rotary embeddings, the last norm and the head are the model's own: only the blocks below `layer` are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.models import blocks, residual_stream


@dataclass(frozen=True, eq=False)
class TrunkState:
    """The residual stream where the frozen trunk ends, for one batch of tokens.

    Attributes:
        layer: Block that goes on from here; with 0 there is no trunk, and `hidden` is None.
        hidden: Input of that block, without graph.
        inputs: What the model was and is to be called with: `input_ids`, and `attention_mask` where there is one.
    """

    layer: int
    hidden: Float[Tensor, "batch seq d_model"] | None
    inputs: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that `hidden` takes."""
        return 0 if self.hidden is None else self.hidden.nbytes


def run_trunk(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None = None,
    *,
    layer: int,
) -> TrunkState:
    """Run the blocks below `layer` once, without graph; the forward pass ends there.

    Args:
        model: A causal language model, adapted or not; nothing below `layer` may change while the state is used.
        input_ids: Token ids.
        attention_mask: 1 where there is a token; all of them by default.
        layer: Lowest block that may change, `adapter.lowest_layer`.

    Raises:
        FeatclError: If there is no such block.
    """
    if not 0 <= layer < (n_layers := len(blocks(model))):
        raise FeatclError(f"trunk: layer {layer} is out of range, the model has blocks 0 to {n_layers - 1}")
    inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
    hidden = residual_stream(model, input_ids, attention_mask, layer=layer - 1) if layer else None
    return TrunkState(layer, hidden, inputs)


@contextmanager
def resumed(model: nn.Module, state: TrunkState) -> Iterator[None]:
    """Inside the block, forward passes over `state.inputs` start from `state.hidden` at block `state.layer`.

    Args:
        model: The model that `run_trunk` was given; adapted, switched off or trained on since.
        state: What `run_trunk` returned.

    Raises:
        FeatclError: At a forward pass over a batch of another shape than the state's.
    """
    skipped = blocks(model)[: state.layer]
    hidden = state.hidden
    shadowed = [(block, block.__dict__.get("forward")) for block in skipped]

    def skip(stream: Tensor, *_: Any, **__: Any) -> Tensor:
        assert hidden is not None  # no block is skipped then
        if stream.shape != hidden.shape:
            raise FeatclError(f"trunk: a batch of shape {list(stream.shape)}, the state is of {list(hidden.shape)}")
        return hidden

    try:
        for block in skipped:
            block.forward = skip
        yield
    finally:
        for block, own in shadowed:  # accelerate sets `forward` on instances: put that back, or uncover the class's
            if own is None:
                del block.forward
            else:
                block.forward = own


def trunk_end(model: nn.Module) -> int:
    """The lowest block that something was put into: where a trunk that no adapter changes ends.

    Counts a PEFT layer of any adapter, active or not, and any forward hook on a module of the block; with neither in
    any block it is the number of blocks.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = blocks(model)
    for layer, block in enumerate(found):
        for module in block.modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if isinstance(module, BaseTunerLayer) or not all(_only_records(hook) for hook in hooks):
                return layer
    return len(found)


def _only_records(hook: object) -> bool:
    """Whether a hook is one of those with which transformers collects hidden states; they stay once installed."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


class TrunkCache:
    """Runs the frozen trunk of each batch once, as long as the cache lives.

    Args:
        model: A causal language model, adapted.
        max_bytes: States beyond it push out the oldest, whose trunk runs again when its batch returns.
    """

    def __init__(self, model: nn.Module, *, max_bytes: int = 1 << 30) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.layer = trunk_end(model)
        self._states: dict[int, tuple[object, TrunkState]] = {}  # by id, with the batch, so that the id stays its own

    @contextmanager
    def over(self, batch: object, input_ids: Int[Tensor, "batch seq"]) -> Iterator[None]:
        """Inside the block, forward passes over `input_ids` skip the trunk; it runs now if `batch` is new.

        Args:
            batch: The object that stands for the batch: the same object, the same tokens.
            input_ids: Its token ids; no attention mask.
        """
        if self.layer in (0, len(blocks(self.model))):
            yield
            return
        if id(batch) not in self._states:
            self._states[id(batch)] = (batch, run_trunk(self.model, input_ids, layer=self.layer))
            while self.nbytes > self.max_bytes and len(self._states) > 1:
                del self._states[next(iter(self._states))]
        with resumed(self.model, self._states[id(batch)][1]):
            yield

    @property
    def nbytes(self) -> int:
        """Bytes of the states that are kept."""
        return sum(state.nbytes for _, state in self._states.values())
