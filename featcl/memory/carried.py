"""A memory's state inside a key-value cache: it goes where the cache goes.

transformers keeps one layer object per block in a cache and reorders, repeats, copies or resets them together. The
state is one more such layer, behind those of the blocks, so beam search, dropped rows, copied prompts and the end of a
conversation need no code of their own: what happens to the keys happens to the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from featcl.errors import FeatclError
from featcl.memory.context import Past
from featcl.memory.state import MemoryState


@dataclass(frozen=True, eq=False)
class Carried:
    """Where a memory stands in the middle of a sequence.

    Attributes:
        state: Of the memory; None: nothing read yet.
        past: Of the attention read of the form `context`.
    """

    state: MemoryState | None = None
    past: Past | None = None

    def rows(self, indices: Int[Tensor, " rows"]) -> Carried:
        """These rows of the batch, in this order."""
        state = None if self.state is None else self.state.rows(indices)
        return Carried(state, None if self.past is None else self.past.rows(indices))

    def to(self, device: torch.device) -> Carried:
        """The same on a device; no copy where it is there."""
        if self.state is None or self.state.weights[0].device == device:
            return self
        return Carried(self.state.to(device), None if self.past is None else self.past.to(device))


class CarriedLayer(CacheLayerMixin):
    """The cache's layer of one memory.

    Args:
        owner: Which memory it belongs to.
        user: Whose conversation the cache holds.
        sliding: As the cache's first layer, so that the first layer of a kind, which sizes the masks, stays the first.

    Attributes:
        carried: Where the memory stands.
        tokens: How many tokens per row it has seen; the same as the cache's, unless something went wrong.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, owner: str, user: str | None, *, sliding: bool) -> None:
        super().__init__()
        self.owner, self.user, self.is_sliding = owner, user, sliding
        self.carried: Carried | None = None
        self.tokens = 0

    def get_seq_length(self) -> int:
        """Tokens per row so far."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(Number of keys, place of the first) that so many new queries would look at."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """No limit: the state is of a fixed size."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases

    def reset(self) -> None:
        """Back to before the first token."""
        self.carried, self.tokens = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows, in this order; a row may be named more than once; or with those that are True."""
        if self.carried is not None and self.carried.state is not None:
            self.carried = self.carried.rows(torch.arange(self.carried.state.batch)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.carried is not None and self.carried.state is not None:
            self.carried = self.carried.rows(torch.arange(self.carried.state.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Only by nothing.

        Raises:
            FeatclError: For any number of tokens; what was read cannot be unread.
        """
        if tokens_to_remove:
            raise FeatclError(
                f"{abs(tokens_to_remove)} tokens cannot be taken back from a cache with a memory, which has read them: "
                "decode without an assistant model or prompt look-up, or with attached.disabled()"
            )

    def offload(self) -> None:
        """Stays where it is: it is small."""

    def prefetch(self) -> None:
        """Stays where it is."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Not a layer of keys and values."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Not a layer of keys and values."""
        raise NotImplementedError


def carried_in(cache: Any, owner: str) -> CarriedLayer | None:
    """The layer of a memory in a cache, if there is one."""
    return next((layer for layer in cache.layers if isinstance(layer, CarriedLayer) and layer.owner == owner), None)


def carry_(cache: Any, owner: str, user: str | None, carried: Carried, *, tokens: int) -> None:
    """Put where a memory stands, `tokens` tokens per row into the conversation, into its cache.

    Not into a cache that has not taken part in the pass, as with gradient checkpointing: it stands somewhere else.
    """
    if int(cache.get_seq_length()) != tokens:
        return
    layer = carried_in(cache, owner)
    if layer is None:
        layer = CarriedLayer(owner, user, sliding=bool(getattr(cache.layers[0], "is_sliding", False)))
        cache.layers.append(layer)
    layer.carried, layer.tokens, layer.user = carried, tokens, user
