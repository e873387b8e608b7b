"""Small SAEs built by hand, so that what they should do is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae-lens is not installed")


def make_sae(
    architecture: str = "jumprelu", *, d_model: int = 32, d_sae: int = 48, seed: int = 0, **config: Any
) -> Any:
    """A random SAE with every parameter different from its default, for `blocks.1.hook_resid_post`."""
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    generator = torch.Generator().manual_seed(seed)
    metadata = config.pop("metadata", {"hook_name": "blocks.1.hook_resid_post", "prepend_bos": True, "source": "test"})
    sae = SAE.from_dict({"architecture": architecture, "d_in": d_model, "d_sae": d_sae, **config})
    sae.cfg.metadata = SAEMetadata(**metadata)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise.abs() if name == "threshold" else noise
    return sae.eval().requires_grad_(False)


@pytest.fixture
def sae() -> Callable[..., Any]:
    """`sae("topk", k=4)` -> a random SAE."""
    return make_sae


@pytest.fixture
def sae_folder(tmp_path: Path) -> Callable[..., Path]:
    """`sae_folder("jumprelu")` -> such an SAE, saved by SAELens."""

    def build(*arguments: Any, **config: Any) -> Path:
        make_sae(*arguments, **config).save_model(tmp_path / "sae")
        return tmp_path / "sae"

    return build
