"""The LoRA experts beside one linear, and the gate that chooses among them token by token.

y = W x + Σ_e g_e(x) B_e A_e x,     g(x) = softmax over the `top` largest of G x, 0 elsewhere
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featcl import files
from featcl.models import Site


class MixtureSite(nn.Module):
    """The experts of one linear; they live beside the model, whose modules and state stay its own.

    Attributes:
        site: The linear.
        A: Inputs of the experts.
        B: Outputs of the experts, 0 at the start.
        G: The gate.
        top: How many experts act on a token.
        off: How many `disabled()` blocks it is inside of.
    """

    A: Float[Tensor, "experts rank d_in"]
    B: Float[Tensor, "experts d_out rank"]
    G: Float[Tensor, "experts d_in"]

    def __init__(self, site: Site, linear: Any, *, experts: int, rank: int, top: int, seed: int) -> None:
        """Float32 experts: A uniform and G normal, both of the size 1/√d_in, from seed and name."""
        super().__init__()
        self.site, self.top, self.off = site, top, 0
        d_out, d_in = linear.weight.shape
        generator = torch.Generator().manual_seed(int(files.digest_bytes(f"{seed} {site.name}".encode())[:15], 16))
        size, device = 1.0 / math.sqrt(d_in), linear.weight.device
        uniform = 2.0 * torch.rand(experts, rank, d_in, generator=generator) - 1.0
        self.A = nn.Parameter((size * uniform).to(device))
        self.B = nn.Parameter(torch.zeros(experts, d_out, rank, device=device))
        self.G = nn.Parameter((size * torch.randn(experts, d_in, generator=generator)).to(device))
        self._handle: RemovableHandle = linear.register_forward_hook(self._on_output)

    @property
    def name(self) -> str:
        """Full module path of the linear."""
        return self.site.name

    def gates(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch experts"]:
        """g(x): `top` positive numbers that sum to 1, zeros for the other experts."""
        scores = x @ self.G.to(x.dtype).T
        best = scores.topk(self.top, dim=-1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return scores.masked_fill(~chosen, -torch.inf).softmax(-1)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the experts add, at least float32: the products with all A_e and B_e at once, gated in between."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            along = (x @ self.A.to(x.dtype).flatten(0, 1).T).unflatten(-1, self.A.shape[:2])
            gated = self.gates(x)[..., None] * along
            return gated.flatten(-2) @ self.B.to(x.dtype).transpose(1, 2).flatten(0, 1)

    def factors(self) -> list[tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]]:
        """(A_e, B_e) of every expert, with their gradient."""
        return list(zip(self.A.unbind(), self.B.unbind(), strict=True))

    def detach_(self) -> None:
        """Take the hook off the linear."""
        self._handle.remove()

    def _on_output(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if self.off else (output + self(inputs[0])).to(output.dtype)
