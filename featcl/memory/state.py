"""What a memory has stored: an explicit, immutable value of fixed size, passed in and out of the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featcl import files
from featcl.errors import FeatclError
from featcl.html import facts_card, table

PARTIAL = ("keys", "values", "gates", "tail", "count")


@dataclass(frozen=True, eq=False, repr=False)
class MemoryState:
    """The fast weights of a batch of independent memories, and the tokens of a chunk that is not closed yet.

    Nothing here is changed after it was made, and no two states share storage: an update makes a new state. Its size
    depends on the memory's shape alone, not on how much it has read. Rows of the batch are independent; they may stand
    at different places of their chunk.

    Attributes:
        weights: Of each layer, [batch, heads, d_in, d_out].
        momentum: S of each layer, of the same shape; empty where the memory has no momentum.
        keys: Of the open chunk's tokens, [batch, chunk_size - 1, heads, d_key]; zero beyond `count`.
        values: As above.
        gates: Step, momentum and decay of each of these tokens and heads.
        tail: What the short convolution saw last, [batch, kernel - 1, channels].
        count: Tokens in the open chunk of each row, int64, on the CPU.
    """

    weights: tuple[Float[Tensor, "batch heads _ _"], ...]
    momentum: tuple[Float[Tensor, "batch heads _ _"], ...]
    keys: Float[Tensor, "batch slots heads d_key"]
    values: Float[Tensor, "batch slots heads d_value"]
    gates: Float[Tensor, "batch slots heads 3"]
    tail: Float[Tensor, "batch kept channels"]
    count: Int[Tensor, " batch"]

    def __post_init__(self) -> None:
        rows = {name: tensor.shape[0] if tensor.ndim else None for name, tensor in self.named().items()}
        if len(set(rows.values())) != 1 or None in rows.values() or not self.weights:
            raise FeatclError(f"memory state: its tensors must have one batch size, not {rows}")
        if self.count.shape != (self.batch,) or self.count.dtype != torch.int64:
            raise FeatclError("memory state: count must be [batch] int64")

    # --- what it is

    @property
    def batch(self) -> int:
        """Number of independent memories."""
        return self.weights[0].shape[0]

    @property
    def heads(self) -> int:
        """Heads of each memory."""
        return self.weights[0].shape[1]

    @property
    def depth(self) -> int:
        """Layers of the memory's network."""
        return len(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.named().values())

    def norms(self) -> list[dict[str, float]]:
        """Per layer, the largest Frobenius norm of a head's weights, and of its momentum where there is one."""
        found = []
        for layer, weight in enumerate(self.weights):
            norms = {"weights": _largest_norm(weight)}
            if self.momentum:
                norms["momentum"] = _largest_norm(self.momentum[layer])
            found.append(norms)
        return found

    def equal(self, other: MemoryState) -> bool:
        """Whether both hold the same numbers, bit for bit."""
        own, others = self.named(), other.named()
        return own.keys() == others.keys() and all(
            own[name].dtype == others[name].dtype and torch.equal(own[name], others[name].to(own[name].device))
            for name in own
        )

    def __repr__(self) -> str:
        shapes = " ".join("x".join(str(size) for size in weight.shape[2:]) for weight in self.weights)
        return f"MemoryState(batch={self.batch}, heads={self.heads}, layers=[{shapes}], bytes={self.nbytes})"

    def _repr_html_(self) -> str:
        shapes = ["×".join(map(str, weight.shape[1:])) for weight in self.weights]
        layers = [
            (i, shape, *norms.values()) for i, (shape, norms) in enumerate(zip(shapes, self.norms(), strict=True))
        ]
        facts = {
            "memories": self.batch,
            "heads": self.heads,
            "bytes": f"{self.nbytes:,}",
            "tokens in the open chunk": ", ".join(map(str, self.count.tolist()[:8])),
        }
        titles = ("layer", "heads × in × out", "largest ‖weights‖", "largest ‖momentum‖")[: 4 if self.momentum else 3]
        return facts_card("Memory state", facts, table(titles, layers))

    # --- as tensors

    def tensors(self) -> dict[str, Tensor]:
        """Copies of its tensors by name: `weights.0` …, `momentum.0` …, `keys`, `values`, `gates`, `tail`, `count`."""
        return {name: tensor.clone() for name, tensor in self.named().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> MemoryState:
        """The state of which `tensors()` gave these; they are copied.

        Raises:
            FeatclError: If a tensor is missing or one too many.
        """
        layers = sum(name.startswith("weights.") for name in tensors)
        momenta = layers if "momentum.0" in tensors else 0
        names = [f"weights.{i}" for i in range(layers)] + [f"momentum.{i}" for i in range(momenta)] + [*PARTIAL]
        if layers == 0 or set(names) != set(tensors):
            differs = sorted(set(names) ^ set(tensors)) or ["weights.0"]
            raise FeatclError(f"memory state: tensor {differs[0]!r} is missing, or one too many")
        own = {name: tensors[name].clone() for name in names}
        return cls(
            tuple(own[f"weights.{i}"] for i in range(layers)),
            tuple(own[f"momentum.{i}"] for i in range(momenta)),
            **{name: own[name] for name in PARTIAL[:-1]},
            count=own["count"].cpu(),
        )

    def save(self, file: str | Path) -> None:
        """Write it as one safetensors file."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.named().items()}
        files.write_bytes(file, save(tensors, metadata={"featcl": "memory_state"}))

    @classmethod
    def load(cls, file: str | Path) -> MemoryState:
        """Read what `save` wrote; bit-equal.

        Raises:
            FeatclError: If the file is missing or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls.from_tensors(load_file(Path(file)))
        except (OSError, SafetensorError, FeatclError) as error:
            raise FeatclError(f"{file} is not a saved memory state: {error}") from error

    # --- batches of independent states

    def rows(self, indices: int | Sequence[int] | slice | Tensor) -> MemoryState:
        """The memories at these places of the batch, in this order.

        Raises:
            FeatclError: If an index is out of range.
        """
        every = torch.arange(self.batch)
        try:
            chosen = every[[indices] if isinstance(indices, int) else indices]
        except (IndexError, TypeError) as error:
            raise FeatclError(f"memory state: rows {indices!r} of a batch of {self.batch}") from error
        return self._map(lambda tensor: tensor[chosen.to(tensor.device)])

    @classmethod
    def stack(cls, states: Sequence[MemoryState]) -> MemoryState:
        """One batch of all rows of some states of one memory.

        Raises:
            FeatclError: If there are none, or their shapes differ.
        """
        named = [state.named() for state in states]
        if not named or any(_row_shapes(other) != _row_shapes(named[0]) for other in named):
            raise FeatclError("memory state: only states of one memory can be stacked, and at least one")
        return cls.from_tensors({name: torch.cat([other[name] for other in named]) for name in named[0]})

    def repeat(self, n: int) -> MemoryState:
        """Every row n times, one after the other: a state for n continuations of each."""
        return self._map(lambda tensor: tensor.repeat_interleave(n, dim=0))

    # --- copies

    def detach(self) -> MemoryState:
        """A copy that no gradient flows through."""
        return self._map(lambda tensor: tensor.detach().clone())

    def to(self, device: torch.device | str) -> MemoryState:
        """A copy on another device."""
        return self._map(lambda tensor: tensor.to(device, copy=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryState:
        return self.detach()

    def _map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        return MemoryState(
            tuple(change(weight) for weight in self.weights),
            tuple(change(momentum) for momentum in self.momentum),
            **{name: change(getattr(self, name)) for name in PARTIAL[:-1]},
            count=change(self.count).cpu(),
        )

    def named(self) -> dict[str, Tensor]:
        """Its tensors themselves by name: to look at, not to change."""
        named = {f"weights.{i}": weight for i, weight in enumerate(self.weights)}
        named |= {f"momentum.{i}": momentum for i, momentum in enumerate(self.momentum)}
        return named | {name: getattr(self, name) for name in PARTIAL}


def _largest_norm(tensor: Tensor) -> float:
    norms = torch.linalg.vector_norm(tensor.detach(), dim=(-2, -1))
    return float(norms.max()) if norms.numel() else 0.0


def _row_shapes(named: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (*tensor.shape[1:], tensor.dtype) for name, tensor in named.items()}
