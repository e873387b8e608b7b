"""A tiny adapted model and a conversation to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from featcl.adapters import constrain
from featcl.features import Directions
from featcl.learning import Learner
from featcl.streams import Trajectory


@dataclass
class Rig:
    """A fresh adapted model; `learner()` puts a learner on it."""

    model: Any
    tokenizer: Any
    adapter: Any

    def learner(self, **options: Any) -> Learner:
        return Learner(self.model, self.tokenizer, self.adapter, **{"lr": 1e-2, **options})


@pytest.fixture
def rig(tiny: Callable[..., tuple[Any, Any]]) -> Callable[..., Rig]:
    """`rig("gemma2", kind="write", constraint={"rank": 2})`; the same arguments give the same weights."""

    def build(
        family: str = "olmo2", *, kind: str = "both", constraint: dict[str, Any] | None = None, **shape: Any
    ) -> Rig:
        model, tokenizer = tiny(family, n_layers=2, **shape)
        vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        directions = Directions.from_vectors(vectors, layer=1)
        return Rig(model, tokenizer, constrain(model, directions, kind=kind, **(constraint or {})))

    return build


@pytest.fixture
def talk() -> Trajectory:
    """Two assistant turns."""
    return Trajectory(
        "talk-1",
        source="home",
        task="greeting",
        messages=(
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "good day"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "hello"},
        ),
        meta={"context": "say hello"},
    )
