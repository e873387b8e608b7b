"""A memory confined to chosen features: it reads their activations and writes along their directions, nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.features.directions import Directions
from featcl.memory import packing
from featcl.memory.base import StreamMemory, Tokens
from featcl.memory.checks import require
from featcl.memory.convolution import short_convolution
from featcl.memory.gates import AT_REST
from featcl.memory.network import predict
from featcl.memory.state import MemoryState
from featcl.subspace import lowdin


@dataclass(frozen=True)
class StoredLink:
    """What a memory gives along one feature's direction when another is active alone.

    Attributes:
        reads: Id of the feature that is active.
        reads_name: Where known, else empty.
        writes: Id of the feature along whose unit decoder row something is given.
        writes_name: As above.
        strength: Signed, in units of the stream's root mean square.
        share: `strength`² as a share of the sum of squares over all links.
    """

    reads: int
    reads_name: str
    writes: int
    writes_name: str
    strength: float
    share: float

    def __str__(self) -> str:
        return (
            f"feature {_named(self.reads, self.reads_name)} gives {self.strength:+.4g} of feature "
            f"{_named(self.writes, self.writes_name)}  ({self.share:.1%})"
        )


@dataclass(frozen=True, eq=False)
class StoredContent:
    """What a feature memory holds.

    Attributes:
        table: [k_write, k_read]: what each feature, active alone, gives along each unit decoder row.
        links: Its strongest entries, strongest first; entries of 0 are left out.
    """

    table: Float[Tensor, "k_write k_read"]
    links: tuple[StoredLink, ...]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Links as dictionaries, for `pandas.DataFrame(content.to_dicts())` or JSON."""
        return [asdict(link) for link in self.links]

    def __str__(self) -> str:
        return "\n".join(str(link) for link in self.links) or "nothing is stored"


class FeatureMemory(StreamMemory):
    """A `NeuralMemory` of one head whose keys and queries are f_S(h), the chosen features' own activations.

        y = rms(h) Q_w M(f_S(h)),    M learns  f_S(h) → V Q_wᵀ h / rms(h)

    with Q_w the orthonormal basis of the features' decoder rows. So what is returned lies in span(Q_w) exactly; a token
    on which no chosen feature fires reads nothing and stores nothing; and the content can be read as a table from
    feature to feature. Slow weights are V, the gates, M_0 and the short convolution.

    It must be given the stream at the SAE's own hook point, unscaled (`reads_output`).

    Attributes:
        directions: The features.
        kernel: Of the short convolution; 0 for none. The others are those of `StreamMemory`.

    Source: Titans, arXiv:2501.00663, for the memory; for the reading the SAE's encoder.
    """

    reads_output = True

    def __init__(
        self,
        directions: Directions,
        *,
        depth: int = 1,
        chunk_size: int = 64,
        expansion: float = 2.0,
        conv: int = 0,
        momentum: bool = True,
        decay: bool = True,
        max_step: float | None = None,
        out_gate: bool = True,
        seed: int = 0,
    ) -> None:
        """An empty memory; V is the identity.

        Args:
            directions: Features with their encoder.
            depth: Layers; 1 is a linear memory, whose table is its whole content.
            chunk_size: Tokens whose gradients are taken at the same weights.
            expansion: Hidden width over the number of features.
            conv: Kernel of a short convolution of each feature's activations in time, for keys and for queries; it
                starts as none with the keys, where it is 2 or more, those of the token before. 0 for none.
            momentum: False puts η to 0.
            decay: False puts α to 0.
            max_step: θ_max; None: (1 + √(chunk_size / k))⁻².
            out_gate: Whether a sigmoid of the token scales the output.
            seed: Of the slow weights.

        Raises:
            FeatclError: For directions without an encoder, near-dependent directions, or a size that is none.
        """
        if directions.encoder is None:
            raise FeatclError("a feature memory reads activations: these directions have no SAE encoder")
        require(conv >= 0, f"conv must be 0 (none) or more, not {conv}")
        generator, k = torch.Generator().manual_seed(seed), directions.k
        super().__init__(
            width=directions.d_model, heads=1, head_dim=k, depth=depth, chunk_size=chunk_size, expansion=expansion,
            momentum=momentum, decay=decay, max_step=max_step, generator=generator,
        )  # fmt: skip
        self.directions, self.encoder, self.kernel = directions, directions.encoder, conv
        self.tail_shape = (conv - 1, k) if conv else (0, 0)
        found = lowdin(directions.vectors, names=directions.labels, dtype=torch.float64)
        self._basis, self._mixing = found.basis, found.mixing  # no buffers: a cast of the module must not bend the span
        rest = torch.tensor([*AT_REST.values()][: 3 + out_gate])
        self.values = nn.Parameter(torch.eye(k))
        self.gates = nn.Parameter(0.1 * self.width**-0.5 * torch.randn(len(rest), self.width, generator=generator))
        self.gate_bias = nn.Parameter(rest)
        self.convolution = nn.Parameter(torch.zeros(k, 2, conv)) if conv else None  # of each feature: key and query
        if self.convolution is not None:
            self.convolution.data[:, 0, max(conv - 2, 0)] = 1.0
            self.convolution.data[:, 1, -1] = 1.0

    def settings(self) -> dict[str, Any]:
        """The arguments with which a memory of the same shape is made for the same directions."""
        return {
            "depth": self.depth, "chunk_size": self.chunk_size, "expansion": self.expansion, "conv": self.kernel,
            "momentum": self.has_momentum, "decay": self.has_decay, "max_step": self.max_step,
            "out_gate": len(self.gates) > 3,
        }  # fmt: skip

    @torch.no_grad()
    def content(self, state: MemoryState, *, row: int = 0, top: int = 32) -> StoredContent:
        """What is stored, from feature to feature, the open chunk included.

        Args:
            state: Of this memory.
            row: Which of its batch.
            top: How many links to list.

        Raises:
            FeatclError: If the state is of another memory, or there is no such row.
        """
        self._check_state(state)
        settled = self.settle(state.rows(row).detach())
        each = torch.eye(self.directions.k, dtype=self.state_dtype, device=settled.weights[0].device)
        given = predict([weight[0, 0] for weight in settled.weights], each).double()  # [k_read, k], along Q_w
        table = self._mixing.to(given.device) @ given.T
        return StoredContent(table.float().cpu(), self._strongest(table.cpu(), top))

    def _strongest(self, table: Tensor, top: int) -> tuple[StoredLink, ...]:
        ids, names = self.directions.feature_ids, self.directions.names or ("",) * self.directions.k
        total, links = float(table.square().sum()), []
        for place in torch.sort(table.abs().flatten(), descending=True, stable=True).indices[:top].tolist():
            writes, reads = divmod(place, table.shape[1])
            if (strength := float(table[writes, reads])) == 0.0:
                break
            share = strength**2 / total
            links.append(StoredLink(ids[reads], names[reads], ids[writes], names[writes], strength, share))
        return tuple(links)

    def _tokens(self, x: Float[Tensor, "batch time d_model"], state: MemoryState, lengths: packing.Places) -> Tokens:
        if self.encoder.W_enc.device != x.device:
            self.encoder = self.encoder.to(x.device)
        x = x.to(self.state_dtype)
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6) * self.width**-0.5
        acts, tail = self.encoder(x).to(self.state_dtype), state.tail.clone()
        queries = keys = acts
        if self.convolution is not None:
            mixed, tail = short_convolution(acts, state.tail, lengths, weight=self.convolution.flatten(0, 1))
            keys, queries = mixed.unflatten(-1, (-1, 2)).unbind(-1)
        values = (x / rms) @ self._basis.to(x) @ self.values.to(x.dtype).T
        raw = nn.functional.linear(x / rms, self.gates.to(x.dtype), self.gate_bias.to(x.dtype))
        gates = self._gated(raw)
        opening = gates[..., 3:] if gates.shape[-1] == 4 else torch.ones_like(gates[..., :1])
        gates = torch.cat([gates[..., :3], opening * rms[..., None]], dim=-1)
        return Tokens(queries[:, :, None], keys[:, :, None], values[:, :, None], gates, tail)

    def _output(self, reads: Tensor, tokens: Tokens) -> Float[Tensor, "batch time d_model"]:
        return (reads * tokens.gates[..., 3:])[:, :, 0] @ self._basis.to(reads).T


def _named(feature: int, name: str) -> str:
    return f"{feature} ({name})" if name else str(feature)
