"""What a memory refuses, with one line that says what, where, and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.memory.state import MemoryState


def require(condition: bool, message: str) -> None:
    """Refuse an argument.

    Raises:
        FeatclError: With the message, where the condition does not hold.
    """
    if not condition:
        raise FeatclError(f"memory: {message}")


def check_tokens(x: Tensor, mask: Tensor | None, *, width: int) -> None:
    """Refuse tokens of another shape, and a mask that does not fit them.

    Raises:
        FeatclError: If so.
    """
    if x.ndim != 3 or x.shape[-1] != width or not x.is_floating_point():
        raise FeatclError(
            f"memory: tokens are [batch, seq, width = {width}] of a float dtype, not {list(x.shape)} {x.dtype}"
        )
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise FeatclError(
            f"memory: the mask is [batch, seq] = {list(x.shape[:2])} bool, not {list(mask.shape)} {mask.dtype}"
        )


def check_finite(packed: Tensor, x: Tensor, mask: Tensor | None, *, dtype: torch.dtype) -> None:
    """Refuse NaN and infinity in tokens that count, and tokens whose length overflows.

    Args:
        packed: The tokens that count.
        x: All of them, where the error looks for the place.
        mask: False where there is none.
        dtype: Of the state.

    Raises:
        FeatclError: If so.
    """
    wide = torch.promote_types(x.dtype, dtype)
    if bool(torch.linalg.vector_norm(packed, dim=-1, dtype=wide).isfinite().all()):
        return
    wrong = ~torch.linalg.vector_norm(x, dim=-1, dtype=wide).isfinite()
    row, token = (wrong if mask is None else wrong & mask).nonzero()[0].tolist()
    what = "is too large" if bool(x[row, token].isfinite().all()) else "holds NaN or infinity"
    raise FeatclError(f"memory: the input {what} in row {row}, token {token}; it must be finite")


def check_state(
    state: Any,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device | None,
    chunk_size: int,
) -> None:
    """Refuse what is no state of a memory with these shapes, this dtype and device (None: any), or holds NaN.

    Raises:
        FeatclError: If so.
    """
    if not isinstance(state, MemoryState):
        raise FeatclError(f"memory: a state is a MemoryState or None, not {type(state).__name__}")
    found = state.named()
    if differs := sorted(shapes.keys() ^ found.keys()):
        raise FeatclError(f"memory: a state of another memory: {differs[0]!r} is missing, or one too many")
    for name, shape in shapes.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape:
            raise FeatclError(f"memory: the state's {name} is {list(tensor.shape)}, this memory's {list(shape)}")
        if name != "count" and (tensor.dtype != dtype or device not in (None, tensor.device)):
            here = dtype if device is None else f"{dtype} on {device}"
            raise FeatclError(f"memory: the state's {name} is {tensor.dtype} on {tensor.device}, not {here} as here")
    if bool(((state.count < 0) | (state.count >= chunk_size)).any()):
        raise FeatclError(f"memory: the state's count must be from 0 to chunk_size - 1 = {chunk_size - 1}")
    parts = {name: tensor.detach() for name, tensor in found.items() if name != "count" and tensor.numel()}
    if not parts or bool(torch.stack(torch._foreach_norm([*parts.values()])).isfinite().all()):  # all at once: one wait
        return
    if wrong := [name for name, tensor in parts.items() if not bool(tensor.isfinite().all())]:
        raise FeatclError(f"memory: the state's {wrong[0]} holds NaN or infinity; the state is damaged")
