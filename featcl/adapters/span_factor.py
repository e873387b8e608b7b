"""A LoRA factor that can only move in a span, as a parametrisation of PEFT's own linear."""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class SpanFactor(nn.Module):
    """Parametrisation of a LoRA factor that can only move in a span: `Q C₂` as columns, `C₂ Qᵀ` as rows."""

    basis: Tensor

    def __init__(self, basis: Float[Tensor, "d_model k"], side: Literal["columns", "rows"]) -> None:
        super().__init__()
        self.side = side
        self.holding = False
        self.held: Tensor | None = None
        self._handles: tuple[RemovableHandle, ...] = ()
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, coordinates: Tensor) -> Tensor:
        """The factor's weight for these coordinates."""
        if not self.holding:
            return self.product(coordinates)
        if self.held is None:
            self.held = self.product(coordinates)
        return self.held

    def product(self, coordinates: Tensor) -> Tensor:
        """Q C₂, or C₂ Qᵀ."""
        return self.basis @ coordinates if self.side == "columns" else coordinates @ self.basis.T

    def hold_during_(self, layer: nn.Module) -> None:
        """Form the product once in each forward pass of PEFT's layer, which asks for a reader's weight twice.

        What is held never outlives the pass, so it cannot be stale, and a recomputed pass forms its own.
        """
        self._handles = (
            layer.register_forward_pre_hook(self._hold),
            layer.register_forward_hook(self._release, always_call=True),
        )

    def let_go_(self) -> None:
        """Take the hooks of `hold_during_` off, when the factor leaves the layer."""
        for handle in self._handles:
            handle.remove()

    def _hold(self, *_: Any) -> None:
        self.holding, self.held = True, None

    def _release(self, *_: Any) -> None:
        self.holding, self.held = False, None
