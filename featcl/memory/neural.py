"""A memory that learns while it is used: keys, values and gates are projections of the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl.memory import packing
from featcl.memory.base import StreamMemory, Tokens
from featcl.memory.checks import require
from featcl.memory.convolution import short_convolution
from featcl.memory.gates import AT_REST
from featcl.memory.state import MemoryState


class NeuralMemory(StreamMemory):
    """Titans' long-term memory: a small network per head whose weights are the memory, changed with every chunk.

    `retrieved, state = memory(x, state)`. The module's own parameters are the slow weights; what is stored is in the
    state. Tokens are scaled to unit root mean square first, so their length does not matter.

    The step is at most `max_step`, momentum at most 0.99, decay at least 0.0001, and a token's gradient in a layer at
    most 8 √head_dim long. So no layer of a head is ever longer than its start plus `norm_bound`; without decay it grows
    by at most 100 `max_step` 8 √head_dim a token. A data-dependent step alone would not bound depth 2 and more, since
    there the gradient grows with the weights.

    Attributes:
        kernel: Of the short convolution; 0 for none. The others are those of `StreamMemory`.

    Source: Titans, Behrouz et al., arXiv:2501.00663, section 3; persistent tokens: eq. 19.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        depth: int = 1,
        chunk_size: int = 64,
        head_dim: int | None = None,
        expansion: float = 2.0,
        conv: int = 0,
        persistent: int = 0,
        momentum: bool = True,
        decay: bool = True,
        max_step: float | None = None,
        out_gate: bool = True,
        seed: int = 0,
    ) -> None:
        """Random slow weights; a linear memory starts empty, a deeper one with random features and an empty last layer.

        Args:
            width: Of the tokens, d_model.
            heads: Independent memories.
            depth: Layers of each; 1 is a linear memory, more have SiLU between them.
            chunk_size: Tokens whose gradients are taken at the same weights; 1 is the paper's recurrence.
            head_dim: Width of a head's keys and values; None divides `width` by `heads`.
            expansion: Hidden width over `head_dim`.
            conv: Kernel of a short convolution of keys, values and queries; 0 for none.
            persistent: Trained tokens that every stream begins with.
            momentum: False puts η to 0.
            decay: False puts α to 0.
            max_step: θ_max; None: (1 + √(chunk_size / head_dim))⁻².
            out_gate: Whether a sigmoid of the token scales each head's output.
            seed: Of the slow weights.

        Raises:
            FeatclError: For a size that is none.
        """
        whole = isinstance(width, int) and isinstance(heads, int) and min(width, heads) >= 1
        require(whole, f"width {width!r} and heads {heads!r} must be whole numbers, at least 1")
        require(head_dim is not None or width % heads == 0, f"width {width} is no multiple of {heads} heads")
        require(min(conv, persistent) >= 0, f"conv {conv} and persistent {persistent} must be 0 (none) or more")
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            width=width, heads=heads, head_dim=width // heads if head_dim is None else head_dim, depth=depth,
            chunk_size=chunk_size, expansion=expansion, momentum=momentum, decay=decay, max_step=max_step,
            generator=generator,
        )  # fmt: skip
        inner, self.kernel = heads * self.head_dim, conv
        self.tail_shape = (conv - 1, 3 * inner) if conv else (0, 0)

        def random(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator))

        rest = torch.tensor([*AT_REST.values()][: 3 + out_gate])
        self.projection = random(3, inner, width, scale=width**-0.5)
        self.gates = random(len(rest) * heads, width, scale=0.1 * width**-0.5)
        self.gate_bias = nn.Parameter(rest.repeat_interleave(heads))
        self.out = random(width, inner, scale=inner**-0.5)
        self.persistent = random(persistent, width, scale=1.0) if persistent else None
        self.convolution = random(3 * inner, conv, scale=0.02) if conv else None
        if self.convolution is not None:
            self.convolution.data[:, -1] += 1.0

    def settings(self) -> dict[str, Any]:
        """The arguments with which a memory of the same shape is made."""
        return {
            "width": self.width, "heads": self.heads, "depth": self.depth, "chunk_size": self.chunk_size,
            "head_dim": self.head_dim, "expansion": self.expansion, "conv": self.kernel,
            "persistent": 0 if self.persistent is None else len(self.persistent), "momentum": self.has_momentum,
            "decay": self.has_decay, "max_step": self.max_step, "out_gate": len(self.gates) > 3 * self.heads,
        }  # fmt: skip

    def _tokens(self, x: Float[Tensor, "batch time width"], state: MemoryState, lengths: packing.Places) -> Tokens:
        """Source: Titans, arXiv:2501.00663, eq. 11; gates: their section 3.1."""
        x = x.to(torch.promote_types(x.dtype, self.out.dtype))
        wide = torch.promote_types(x.dtype, torch.float32)
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide) * self.width**-0.5
        x = (x * rms.clamp(min=1e-6).reciprocal()).to(x.dtype)  # in float16 the factor itself may be infinite
        # three products rather than one: their derivatives need not be put together
        mixed = [x @ part.to(x.dtype).T for part in self.projection]
        mixed, tail = self._convolved(mixed, state, lengths)
        queries, keys, values = (part.to(self.state_dtype).unflatten(-1, (self.heads, self.head_dim)) for part in mixed)
        raw = nn.functional.linear(x, self.gates.to(x.dtype), self.gate_bias.to(x.dtype)).to(self.state_dtype)
        return Tokens(queries, keys, values, self._gated(raw), tail)

    def _convolved(
        self, mixed: list[Tensor], state: MemoryState, lengths: packing.Places
    ) -> tuple[list[Tensor], Tensor]:
        if self.convolution is None:
            return mixed, state.tail.clone()
        line, tail = short_convolution(torch.cat(mixed, dim=-1), state.tail, lengths, weight=self.convolution)
        return list(line.chunk(3, dim=-1)), tail

    def _output(self, reads: Tensor, tokens: Tokens) -> Float[Tensor, "batch time width"]:
        opening = tokens.gates[..., 3:]
        if opening.shape[-1]:
            reads = reads * opening if reads.requires_grad or opening.requires_grad else reads.mul_(opening)
        wide = torch.promote_types(self.out.dtype, reads.dtype)
        return reads.flatten(2).to(wide) @ self.out.to(wide).T

    def _begun(self, state: MemoryState) -> MemoryState:
        """Every stream begins with the persistent tokens.

        Source: Titans, arXiv:2501.00663, eq. 19.
        """
        if self.persistent is None:
            return state
        lengths = torch.tensor([len(self.persistent)])
        return self._run(self._tokens(self.persistent[None], state, lengths), state, lengths)[1]
