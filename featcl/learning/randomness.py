"""Randomness that a resumed run repeats: generators derived from what is done, never from global state."""

from __future__ import annotations

import hashlib

import torch


def derived_generator(seed: int, experience: str, purpose: str) -> torch.Generator:
    """A CPU generator that is a function of (seed, experience id, purpose) only."""
    digest = hashlib.sha256(f"{seed}\0{experience}\0{purpose}".encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
