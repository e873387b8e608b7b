"""What every memory does with a stream of tokens: close full chunks, keep the open one, read at chunk starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from featcl.memory import packing
from featcl.memory.checks import check_finite, check_state, check_tokens, require
from featcl.memory.chunk import SHORTEST, scan
from featcl.memory.coefficients import chunk_coefficients
from featcl.memory.gates import GRADIENT, default_max_step, gate_values, norm_bound
from featcl.memory.network import predict
from featcl.memory.state import MemoryState

PIECE = 1024
"""Tokens of a batch that are projected at a time where no gradient is wanted: their projections stay in the cache."""


class Tokens(NamedTuple):
    """What a memory makes of its input tokens, and the tail of its convolution after them."""

    queries: Float[Tensor, "batch time heads d_key"]
    keys: Float[Tensor, "batch time heads d_key"]
    values: Float[Tensor, "batch time heads d_value"]
    gates: Float[Tensor, "batch time heads gates"]  # step, momentum, decay, and how far the output is opened
    tail: Float[Tensor, "batch kept channels"]


class StreamMemory(nn.Module):
    """The part of a memory that knows the recurrence and the state, and not where keys and values come from.

        S_t = η_t S_{t-1} - θ_t ∇ℓ(M_c; k_t, v_t)        M_t = (1 - α_t) M_{t-1} + S_t        y_t = M_c(q_t)

    for every head, with ℓ = ‖M(k) - v‖², keys and queries of length one, and M_c the memory at the start of t's chunk:
    a token reads nothing of its own chunk. Gradients longer than `max_gradient` in a layer are clipped to that length.

    Attributes:
        width: Of the tokens.
        heads, depth, head_dim, chunk_size, expansion, max_step: As given.
        has_momentum, has_decay: As given; η or α is 0 where not.
        layer_sizes: (d_in, d_out) of each layer.
        max_gradient: Longest gradient of one token in one layer: 8 √head_dim.
        initial: M_0, trained: an empty last layer, below it random features.

    Source: Titans, Behrouz et al., arXiv:2501.00663, eqs. 12-18; clipping: Pascanu et al. 2013, arXiv:1211.5063.
    """

    tail_shape: tuple[int, int] = (0, 0)

    def __init__(
        self, *, width: int, heads: int, head_dim: int, depth: int, chunk_size: int, expansion: float, momentum: bool,
        decay: bool, max_step: float | None, generator: torch.Generator,
    ) -> None:  # fmt: skip
        """The shape of the state, and M_0.

        Raises:
            FeatclError: For a size that is none.
        """
        super().__init__()
        for name, size in {"heads": heads, "head_dim": head_dim, "depth": depth, "chunk_size": chunk_size}.items():
            require(isinstance(size, int) and size >= 1, f"{name} must be a whole number, at least 1, not {size!r}")
        require(0.0 < expansion < math.inf, f"expansion must be above 0 and finite, not {expansion}")
        hidden = max(1, round(expansion * head_dim))
        require(max_step is None or 0.0 < max_step < math.inf, f"max_step must be above 0, not {max_step}")
        self.width, self.heads, self.head_dim, self.depth = width, heads, head_dim, depth
        self.chunk_size, self.expansion, self.has_momentum, self.has_decay = chunk_size, expansion, momentum, decay
        self.max_step = default_max_step(chunk_size, head_dim) if max_step is None else max_step
        self.max_gradient = GRADIENT * math.sqrt(head_dim)
        sizes = [head_dim, *[hidden] * (depth - 1), head_dim]
        self.layer_sizes = tuple(itertools.pairwise(sizes))
        self.initial = nn.ParameterList(
            nn.Parameter(torch.randn(heads, *size, generator=generator) * float(layer < depth - 1))
            for layer, size in enumerate(self.layer_sizes)
        )

    @property
    def norm_bound(self) -> float:
        """How much longer than at the start a layer of a head can get, in the Frobenius norm."""
        return norm_bound(self.max_step, self.max_gradient, momentum=self.has_momentum, decay=self.has_decay)

    def extra_repr(self) -> str:
        """For `print(memory)`."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        state: MemoryState | None = None,
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq width"], MemoryState]:
        """Read and write a piece of a stream; any split into pieces gives what one call gives.

        Args:
            x: Tokens, any float dtype.
            state: What the memory holds before them; None begins anew.
            mask: False where there is no token: it neither reads nor writes, wherever it stands.

        Returns:
            What each token read, in the dtype of `x`, zeros where there is none; and the state after the last.

        Raises:
            FeatclError: For another width, a state of another memory or batch, or NaN or infinity in a token.
        """
        with torch.autocast(x.device.type, enabled=False):
            fresh, output = state is None, None
            packed, lengths, state = self._entered(x, state, mask)
            for place, inside in self._pieces(packed, lengths, state):
                tokens = self._tokens(packed[:, place], state, inside)
                reads, state = self._run(tokens, state, inside, spent=fresh)
                part, fresh = self._output(reads, tokens), True  # from here on the state is of our own making
                if part.shape[1] == packed.shape[1]:
                    output = part
                else:
                    output = part.new_empty(packed.shape) if output is None else output
                    output[:, place] = part
            assert output is not None
            return packing.unpack(output, mask).to(x.dtype), state

    @torch.no_grad()
    def surprise(
        self,
        x: Float[Tensor, "batch seq width"],
        state: MemoryState | None = None,
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq"]:
        """How badly each token's value was predicted at the start of its chunk: ℓ, averaged over heads; 0 for padding.

        Args and errors as for a call; no gradient flows, and what the tokens write is not kept.

        Source: Titans, arXiv:2501.00663, eq. 12.
        """
        with torch.autocast(x.device.type, enabled=False):
            packed, lengths, state = self._entered(x, state, mask)
            losses = []
            for place, inside in self._pieces(packed, lengths, state):
                tokens = self._tokens(packed[:, place], state, inside)
                found, state = self._run(tokens._replace(queries=tokens.keys), state, inside)
                losses.append((found - tokens.values).square().sum(dim=-1).mean(dim=-1))
            return packing.unpack(torch.cat(losses, dim=1), mask)

    def settle(self, state: MemoryState) -> MemoryState:
        """Close the open chunks early, so that what they hold can be read."""
        self._check_state(state)
        size = packing.longest(state.count)
        if size == 0:
            return state
        tokens = [part[:, :size] for part in (state.keys, state.keys, state.values, state.gates)]
        _, weights, momentum = self._scanned(state, *tokens, closed=state.count, size=size)
        empty = {name: torch.zeros_like(getattr(state, name)) for name in ("keys", "values", "gates", "count")}
        return MemoryState(weights, momentum, tail=state.tail.clone(), **empty)

    def initial_state(self, batch: int) -> MemoryState:
        """What the memory holds before any token, for each of `batch` streams; gradients flow to M_0."""
        initial = {f"weights.{layer}": weight[None].to(self.state_dtype) for layer, weight in enumerate(self.initial)}
        empty = {
            name: torch.zeros(shape, dtype=self.state_dtype, device=self.initial[0].device)
            for name, shape in self.state_shapes(1).items()
            if name not in initial
        }
        state = MemoryState.from_tensors(initial | empty | {"count": torch.zeros(1, dtype=torch.int64)})
        return self._begun(state).repeat(batch)

    @torch.no_grad()
    def gates_at_rest(self) -> Float[Tensor, "heads 3"]:
        """Step, momentum and decay of a token that says nothing about them."""
        return self._gated(self.gate_bias.to(self.state_dtype)[None, None])[0, 0, :, :3]

    def written(self, tokens: Tokens, state: MemoryState) -> MemoryState:
        """The state after keys and values that are given, rather than made of the stream's tokens."""
        return self._run(tokens, state, torch.full((state.batch,), tokens.keys.shape[1]))[1]

    def read(
        self, queries: Float[Tensor, "batch time heads d_key"], state: MemoryState
    ) -> Float[Tensor, "batch time heads d_value"]:
        """What the closed chunks hold under some queries."""
        return _read(state.weights, queries)

    @property
    def state_dtype(self) -> torch.dtype:
        """Of states: float32, or float64 where the memory's own parameters are."""
        return torch.promote_types(self.initial[0].dtype, torch.float32)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a state, by name."""
        layers = [(batch, self.heads, *size) for size in self.layer_sizes]
        shapes: dict[str, tuple[int, ...]] = {f"weights.{i}": layer for i, layer in enumerate(layers)}
        if self.has_momentum:
            shapes |= {f"momentum.{i}": layer for i, layer in enumerate(layers)}
        slots = (batch, self.chunk_size - 1, self.heads)
        shapes |= {"keys": (*slots, self.layer_sizes[0][0]), "values": (*slots, self.layer_sizes[-1][1])}
        return shapes | {"gates": (*slots, 3), "tail": (batch, *self.tail_shape), "count": (batch,)}

    def settings(self) -> dict[str, Any]:
        """The arguments with which a memory of the same shape is made."""
        raise NotImplementedError

    # --- what a kind of memory says

    gate_bias: nn.Parameter

    def _tokens(self, x: Tensor, state: MemoryState, lengths: packing.Places) -> Tokens:
        """Queries, keys, values and gates of packed tokens; their state's dtype."""
        raise NotImplementedError

    def _output(self, reads: Tensor, tokens: Tokens) -> Float[Tensor, "batch time width"]:
        """From what the heads read to the stream's width."""
        raise NotImplementedError

    def _begun(self, state: MemoryState) -> MemoryState:
        """What every stream begins with, from M_0 alone."""
        return state

    # --- the stream

    def _gated(self, raw: Float[Tensor, "batch time gates_heads"]) -> Float[Tensor, "batch time heads gates"]:
        """Of what the sigmoids are taken of."""
        return gate_values(
            raw, heads=self.heads, max_step=self.max_step, momentum=self.has_momentum, decay=self.has_decay
        )

    def _pieces(self, x: Tensor, lengths: packing.Places, state: MemoryState) -> Iterator[tuple[slice, packing.Places]]:
        """Cut a long input, at chunk boundaries, where no backward pass needs all of it; at least one piece.

        Yields the piece's columns, and how many of its tokens each row has.
        """
        batch, time = x.shape[:2]
        length = max(1, PIECE // (max(batch, 1) * self.chunk_size)) * self.chunk_size
        first = length - (int(state.count[0]) if batch else 0)
        cuts = [] if torch.is_grad_enabled() else range(first, time, length)
        for start, stop in itertools.pairwise([0, *cuts, time]):
            yield slice(start, stop), (lengths - start).clamp(0, stop - start)

    def _run(
        self, tokens: Tokens, state: MemoryState, lengths: packing.Places, *, spent: bool = False
    ) -> tuple[Tensor, MemoryState]:
        """Read and write packed tokens behind the open chunk; a state that is spent may be overwritten."""
        size, count, ends = self.chunk_size, state.count, state.count + lengths
        closed = ends // size * size  # of each row: tokens of chunks that are full now
        full = packing.longest(closed)
        new = {"keys": tokens.keys, "values": tokens.values, "gates": tokens.gates[..., :3]}
        lines = {name: packing.join(getattr(state, name), count, part, lengths) for name, part in new.items()}
        if full == 0:
            weights, momentum = (tuple(layer.clone() for layer in part) for part in (state.weights, state.momentum))
            reads = _read(weights, tokens.queries)
        else:
            queries = packing.join(torch.zeros_like(state.keys), count, tokens.queries, lengths)
            line = [part[:, :full] for part in (queries, *lines.values())]
            reads, weights, momentum = self._scanned(state, *line, closed=closed, size=size, spent=spent)
            if queries.shape[1] > full:
                reads = torch.cat([reads, _read(weights, queries[:, full:])], dim=1)
            reads = packing.cut(reads, count, tokens.queries.shape[1], ends)
        kept = {name: packing.cut(line, closed, size - 1, ends).clone() for name, line in lines.items()}
        return reads, MemoryState(weights, momentum, **kept, tail=tokens.tail, count=ends - closed)

    def _scanned(
        self, state: MemoryState, queries: Tensor, keys: Tensor, values: Tensor, gates: Tensor, *,
        closed: packing.Places, size: int, spent: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
        """Chunks of `size` tokens; in each row only the first `closed` tokens count."""
        step, momentum, decay = gates.unflatten(1, (gates.shape[1] // size, size)).permute(4, 0, 3, 1, 2)
        inside = packing.within(closed, keys.shape[1], keys.device)
        valid = None if inside is None else inside.unflatten(1, (step.shape[2], size))[:, None].expand_as(step)
        found = scan(
            state.weights, state.momentum, queries=queries, keys=keys, values=values,
            coefficients=chunk_coefficients(step, momentum, decay, valid=valid), max_gradient=self.max_gradient,
            spent=spent,
        )  # fmt: skip
        return found.reads, found.weights, found.momentum

    # --- checks

    def _entered(
        self, x: Tensor, state: MemoryState | None, mask: Tensor | None
    ) -> tuple[Tensor, packing.Places, MemoryState]:
        """The tokens that count, how many each row has, and the state they meet."""
        check_tokens(x, mask, width=self.width)
        packed, lengths = packing.pack(x, mask)
        check_finite(packed, x, mask, dtype=self.state_dtype)
        if state is None:
            return packed, lengths, self.initial_state(x.shape[0])
        self._check_state(state, x.shape[0])
        return packed, lengths, state

    def _check_state(self, state: MemoryState, batch: int | None = None) -> None:
        shapes = self.state_shapes(getattr(state, "batch", 0) if batch is None else batch)
        check_state(state, shapes, dtype=self.state_dtype, device=self.initial[0].device, chunk_size=self.chunk_size)


def _read(weights: tuple[Tensor, ...], queries: Tensor) -> Tensor:
    unit = nn.functional.normalize(queries, dim=-1, eps=SHORTEST)
    return predict(weights, unit.transpose(1, 2)).transpose(1, 2)
