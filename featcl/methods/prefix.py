"""Keys and values that stand before everything the model reads: a context without its tokens.

    attention of token t over [K₁ … K_p, k_1 … k_t], [V₁ … V_p, v_1 … v_t]        in every layer

Read from the model itself, K and V are what it would attend to after those tokens, so that its logits are those of the
tokens followed by the text. They can then be trained. It acts by a hook on the model's body, so that every forward
pass sees it: scoring, evaluation, decoding.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.models import inner_model
from featcl.streams.cache import RoomLayer


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys (0) and values (1) of every layer, float32; keys carry their positions.

    Attributes:
        sink: Of the first tokens, which are not trained: attention rests on them.
        rest: Of the others.
    """

    sink: Float[Tensor, "layers 2 heads frozen head_dim"]
    rest: Float[Tensor, "layers 2 heads others head_dim"]

    @property
    def tokens(self) -> int:
        """p."""
        return self.sink.shape[3] + self.rest.shape[3]

    @property
    def nbytes(self) -> int:
        """Of both parts."""
        return self.sink.nbytes + self.rest.nbytes

    def whole(self) -> Float[Tensor, "layers 2 heads tokens head_dim"]:
        """All tokens, with the gradient of `rest`."""
        return torch.cat([self.sink, self.rest], dim=3)


@torch.no_grad()
def read_prefix(model: Any, ids: Sequence[int], *, frozen: int = 1) -> Prefix:
    """What the model attends to after these tokens.

    Args:
        model: A Hugging Face causal language model, adapted or not; as it is now.
        ids: Token ids, at least one.
        frozen: So many of the first tokens are `sink`.

    Raises:
        FeatclError: If there are too few tokens, or layers differ in their heads.
    """
    from transformers import DynamicCache

    if not 0 <= frozen <= len(ids) or not ids:
        raise FeatclError(f"a prefix of {len(ids)} tokens cannot have {frozen} frozen ones in front")
    causal = inner_model(model)
    cache = DynamicCache()
    device = next(causal.parameters()).device
    causal.base_model(input_ids=torch.tensor([list(ids)], device=device), past_key_values=cache, use_cache=True)
    pairs = [torch.stack([layer.keys[0], layer.values[0]]).float() for layer in cache.layers]  # type: ignore[index]
    if len({pair.shape for pair in pairs}) > 1:
        raise FeatclError(f"{type(causal).__name__} has layers with different heads: it cannot take a prefix")
    whole = torch.stack(pairs)
    return Prefix(whole[:, :, :, :frozen].clone(), whole[:, :, :, frozen:].clone())


@contextmanager
def attached(model: Any, prefix: Prefix) -> Iterator[None]:
    """Inside the block every forward pass of the model goes on after the prefix.

    Args:
        model: A Hugging Face causal language model, adapted or not.
        prefix: Gradients reach its parts where they ask for them.

    Raises:
        FeatclError: At a forward pass that goes on from a cache which was begun without it, has a mask of its own
            form, reads more than the model's context holds beside it, or pads prompts beyond a sliding window.
    """
    body: nn.Module = inner_model(model).base_model
    begun: weakref.WeakSet[Any] = weakref.WeakSet()
    handle = body.register_forward_pre_hook(partial(_before, prefix, begun), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _before(
    prefix: Prefix, begun: weakref.WeakSet[Any], body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the prefix into the cache, and shift mask and positions by its length."""
    from transformers import DynamicCache

    found = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if args or found is None:
        raise FeatclError(f"{type(body).__name__} was called without input_ids by name: a prefix cannot be put before")
    cache, mask, positions = (kwargs.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
    if cache is None or cache.get_seq_length() == 0:
        cache = DynamicCache() if cache is None else cache
        _fill_(cache, prefix, rows=found.shape[0], dtype=next(body.parameters()).dtype)
        begun.add(cache)
    elif cache not in begun:
        raise FeatclError("a forward pass goes on from a cache that was begun without the prefix")
    _check_room(body, prefix, cache.get_seq_length() + found.shape[1])
    changed: dict[str, Any] = {"past_key_values": cache}
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise FeatclError("a prefix needs an attention mask of one value per token (batch, seq), or none")
        changed["attention_mask"] = torch.cat([mask.new_ones(len(mask), prefix.tokens), mask], dim=1)
        _check_window(body, changed["attention_mask"])
    if positions is not None:
        changed["position_ids"] = positions + prefix.tokens
    return args, {**kwargs, **changed}


def _check_room(body: Any, prefix: Prefix, total: int) -> None:
    """Beyond the model's context positions are none that it knows."""
    longest = body.config.get_text_config().max_position_embeddings
    if total > longest:
        raise FeatclError(
            f"a prefix of {prefix.tokens} tokens and {total - prefix.tokens} to read are more than the model's context "
            f"of {longest}: take a shorter prefix, or shorten what is read"
        )


def _check_window(body: Any, mask: Tensor) -> None:
    """Padding stands between prefix and prompt: where a window slides, the prefix would leave it too early."""
    config = body.config.get_text_config()
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if slides and mask.shape[1] > config.sliding_window and not bool(mask.bool().all()):
        raise FeatclError(
            f"prefix and prompt have {mask.shape[1]} tokens, more than the sliding window of {config.sliding_window}, "
            "and prompts differ in length: read those of one length together, or take a shorter prefix"
        )


def _fill_(cache: Any, prefix: Prefix, *, rows: int, dtype: torch.dtype) -> None:
    """The same keys and values for each row."""
    for index, (keys, values) in enumerate(prefix.whole().to(dtype)):
        if index < len(cache.layers) and isinstance(cache.layers[index], RoomLayer):
            cache.layers[index].length += prefix.tokens  # which was measured without it
        cache.update(keys[None].expand(rows, -1, -1, -1), values[None].expand(rows, -1, -1, -1), index)
