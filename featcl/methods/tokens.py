"""Counting and repeating: what methods do with experiences that are not the one at hand."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from featcl.errors import FeatclError
from featcl.methods.method import View
from featcl.objectives.experience import Experience
from featcl.objectives.scoring import TokenBatch
from featcl.streams.trajectory import Trajectory

CODECS = ("text", "zlib")


def tokens_read(batches: Sequence[TokenBatch]) -> int:
    """Tokens that a forward pass over these batches reads, padding included."""
    return sum(batch.input_ids.numel() for batch in batches)


def again(trajectory: Trajectory, view: View, *, weight: float, purpose: str) -> Experience:
    """A trajectory to be learned from once more, with randomness of this update.

    Args:
        trajectory: From an earlier update, or from elsewhere.
        view: Encodes it.
        weight: What its loss counts, against 1 for the update's own experience.
        purpose: Tells its randomness from that of others.
    """

    def generator(more: str) -> torch.Generator:
        return view.generator(f"{purpose}/{trajectory.id}/{more}")

    return replace(view.encode(trajectory), weight=weight, generator=generator)


def packed(trajectory: Trajectory, codec: str) -> bytes:
    """A trajectory as bytes: its JSON record, or that compressed.

    Raises:
        FeatclError: If its meta holds something else than JSON values.
    """
    try:
        text = json.dumps(trajectory.to_record(), ensure_ascii=False, separators=(",", ":"))
    except TypeError as error:
        raise FeatclError(
            f"trajectory {trajectory.id!r} cannot be kept: its meta holds what is no JSON ({error})"
        ) from error
    data = text.encode("utf-8", "surrogatepass")
    return zlib.compress(data, 9) if codec == "zlib" else data


def unpacked(data: bytes, codec: str) -> Trajectory:
    """What `packed` was given."""
    return Trajectory.from_record(json.loads(zlib.decompress(data) if codec == "zlib" else data))
