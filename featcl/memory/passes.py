"""What a forward pass of the decoder was asked: which positions are tokens, which cache it goes on with.

A block gets its mask in a prepared form, which depends on the attention's implementation. What the model itself was
given says it plainly, so hooks on the decoder and on the module around it write that down (a conditional-generation
class prepares the masks one level above its decoder).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.memory.carried import Carried
from featcl.models import residual_map

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "cache")
"""With these a row holds several conversations: continuous batching, or packed sequences."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The arguments of a call that matter here.

    Attributes:
        batch: Rows.
        seq: Positions per row.
        input_ids: Token ids, or None where embeddings were given.
        mask: False where there is padding; None: none.
        cache: The key-value cache that was given, or None.
        tokens: Tokens per row in it.
    """

    batch: int
    seq: int
    input_ids: Int[Tensor, "batch seq"] | None
    mask: Bool[Tensor, "batch seq"] | None
    cache: Any
    tokens: int


@dataclass(eq=False)
class Pass:
    """One forward pass under way.

    Attributes:
        asked: Its arguments.
        start: Where the memory stood before it.
        user: Whose it is.
        writes: Whether the kept state will be what the pass ends with.
        end: Where the memory stands after it, once the block has run.
    """

    asked: Asked
    start: Carried
    user: str | None
    writes: bool
    end: Carried | None = None


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, also those that were given by place."""
    if not args:
        return dict(kwargs)
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | dict(kwargs)


def asked(given: Mapping[str, Any], mask: Any, *, layer: int) -> Asked:
    """What the decoder was asked.

    Args:
        given: Its arguments by name.
        mask: The attention mask that the model was called with.
        layer: The memory's block, for the error.

    Raises:
        FeatclError: If rows hold several conversations, the mask does not say which positions are tokens, or the
            cache is of an unknown kind.
    """
    if mixed := [name for name in VARLEN if given.get(name) is not None]:
        raise FeatclError(
            f"memory at layer {layer}: with {mixed[0]} a row holds several conversations, which would share one state; "
            "give every conversation a row of its own (plain batches instead of continuous or packed ones)"
        )
    ids, embeddings, cache = (given.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
    shaped = embeddings if ids is None else ids
    if shaped is None:
        raise FeatclError(f"memory at layer {layer}: the model was called without input_ids and without inputs_embeds")
    batch, seq = shaped.shape[:2]
    if cache is not None and not hasattr(cache, "layers"):
        raise FeatclError(f"memory at layer {layer}: a {type(cache).__name__} cannot carry a state; use a DynamicCache")
    tokens = 0 if cache is None else int(cache.get_seq_length())
    return Asked(batch, seq, ids, token_mask(mask, batch, seq, layer=layer), cache, tokens)


def token_mask(mask: Any, batch: int, seq: int, *, layer: int) -> Bool[Tensor, "batch seq"] | None:
    """False where there is padding, over the positions of this pass; None where there is none.

    Raises:
        FeatclError: For a mask that is prepared already, of another shape, or not of 0 and 1.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        what = f"{mask.ndim}-D" if isinstance(mask, Tensor) else f"a {type(mask).__name__} of prepared masks"
        raise FeatclError(
            f"memory at layer {layer}: the attention mask is {what}, from which padding cannot be told; pass a 2-D "
            "mask of 0 and 1 (generate: a static cache prepares its masks, use the default one)"
        )
    if len(mask) != batch or mask.shape[1] < seq:
        raise FeatclError(
            f"memory at layer {layer}: an attention mask of shape {list(mask.shape)} for {batch} rows of {seq} tokens"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise FeatclError(f"memory at layer {layer}: the attention mask holds other values than 0 and 1")
    real = mask[:, mask.shape[1] - seq :].bool()
    return None if bool(real.all()) else real


def decoder_paths(model: nn.Module) -> tuple[str, str]:
    """Module paths of what runs the blocks and of the module around it (the empty path: the model itself)."""
    decoder = residual_map(model).layers_path.rpartition(".")[0]
    return decoder, decoder.rpartition(".")[0]
