"""Scoring tokens without a (batch, seq, vocab) tensor: hidden states once, logits only where a token is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featcl.adapters.trunk import TrunkCache
from featcl.errors import FeatclError
from featcl.models import inner_model
from featcl.streams.chat import Encoded

CHUNK_LOGITS = 1 << 25  # logits that may exist at one time in float32: 134 MB


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Sequences, padded on the right, and which of their tokens are targets.

    Attributes:
        input_ids: Token ids; what stands right of a sequence is never seen by it (attention is causal).
        positions: Places in the flattened (batch, seq) whose hidden state predicts a target.
        targets: The target of each of them.
    """

    input_ids: Int[Tensor, "batch seq"]
    positions: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]

    @property
    def tokens(self) -> int:
        """Number of targets."""
        return self.targets.numel()


def pack(encoded: Sequence[Encoded], *, device: torch.device | str = "cpu", max_tokens: int = 8192) -> list[TokenBatch]:
    """Batches of at most `max_tokens` padded tokens each (or one sequence), in the given order."""
    groups: list[list[Encoded]] = []
    longest = 0
    for sequence in encoded:
        longest = max(longest, len(sequence))
        if not groups or longest * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
            longest = len(sequence)
        groups[-1].append(sequence)
    return [pack_group(group, device=device) for group in groups]


def pack_group(group: Sequence[Encoded], *, device: torch.device | str = "cpu") -> TokenBatch:
    """One batch of all sequences.

    Raises:
        FeatclError: If a first token is a target; nothing predicts it.
    """
    longest = max(len(sequence) for sequence in group)
    positions, targets = [], []
    for row, sequence in enumerate(group):
        if sequence.loss_mask[0]:
            raise FeatclError("the first token of a sequence cannot be a target: nothing predicts it")
        places = [place for place, target in enumerate(sequence.loss_mask) if target]
        positions += [row * longest + place - 1 for place in places]
        targets += [sequence.input_ids[place] for place in places]
    rows = [sequence.input_ids + [0] * (longest - len(sequence)) for sequence in group]
    return TokenBatch(
        torch.tensor(rows, device=device),
        torch.tensor(positions, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
    )


@dataclass(frozen=True, eq=False)
class Head:
    """Hidden states to logits: logits = cap · tanh(W h / cap), or W h where the model has no cap.

    Source: Gemma 2 report, arXiv:2408.00118, section 2 (logit soft-capping).
    """

    linear: nn.Module
    softcap: float | None

    def __call__(self, hidden: Float[Tensor, "targets d_model"]) -> Float[Tensor, "targets vocab"]:
        logits = self.linear(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Scorer:
    """A causal language model, split at its last hidden state.

    Args:
        model: A Hugging Face causal language model, adapted or not.

    Raises:
        FeatclError: If the model's logits are not its head on its last hidden state (a scale or a bias outside the
            head, for instance); the losses would be wrong.
    """

    def __init__(self, model: Any) -> None:
        self.causal: Any = inner_model(model)
        self.trunk = self.causal.base_model
        self.head = Head(
            self.causal.get_output_embeddings(),
            getattr(self.causal.config.get_text_config(), "final_logit_softcapping", None),
        )
        self._trunks: TrunkCache | None = None
        self._verify()

    @property
    def device(self) -> torch.device:
        return next(self.causal.parameters()).device

    def hidden(self, batch: TokenBatch) -> Float[Tensor, "targets d_model"]:
        """Last hidden states at the positions that predict a target."""
        kept = None if self.trunk._forward_pre_hooks else self._trunks  # a hook on the body changes the trunk too
        with nullcontext() if kept is None else kept.over(batch.input_ids, batch.input_ids):
            output = self.trunk(input_ids=batch.input_ids, use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)

    @contextmanager
    def trunks_kept(self) -> Iterator[None]:
        """Inside the block, what lies below the lowest adapter runs once per tensor of token ids, bit-equal."""
        self._trunks = TrunkCache(self.causal)
        try:
            yield
        finally:
            self._trunks = None

    @property
    def logit_width(self) -> int:
        """Number of logits per token."""
        return self.head.linear.weight.shape[0]  # type: ignore[union-attr,return-value]

    @torch.no_grad()
    def _verify(self) -> None:
        ids = torch.arange(4, device=self.device)[None]
        expected = self.causal(input_ids=ids, use_cache=False).logits
        found = self.head(self.trunk(input_ids=ids, use_cache=False).last_hidden_state)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise FeatclError(
                f"{type(self.causal).__name__}: logits are not the output head on the last hidden state; "
                "its logits are made in a way that the losses do not know"
            )


def row_chunks(*tensors: Tensor, width: int, limit: int) -> list[tuple[Tensor, ...]]:
    """The same rows of each tensor, so many at a time that at most `limit` logits of `width` exist."""
    size = max(1, limit // width)
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def sum_in_chunks(
    function: Callable[..., Float[Tensor, ""]], *tensors: Tensor, width: int, limit: int = CHUNK_LOGITS
) -> Float[Tensor, ""]:
    """Sum of `function` over chunks of tokens; a chunk's logits live only while it is computed.

    Where a gradient is wanted, each chunk's is taken at once, so that backward needs neither the logits nor a second
    product with the output head: what is kept is ∂f/∂x, as large as `tensors`, which backward scales. Where `function`
    uses something else that is trained (a head), backward computes the chunk again instead.

    Args:
        function: Takes rows of each tensor, returns the sum of its values over them.
        tensors: Equal first axis: tokens.
        width: Logits per token.
        limit: Logits that may exist at one time.
    """
    chunks = row_chunks(*tensors, width=width, limit=limit)
    if len(chunks) == 1:
        return function(*tensors)
    if not torch.is_grad_enabled():
        return torch.stack([function(*chunk).float() for chunk in chunks]).sum()
    gradients = [torch.empty_like(tensor) if tensor.requires_grad else None for tensor in tensors]
    sums, size = [], len(chunks[0][0])
    for number, chunk in enumerate(chunks):
        leaves = [rows.detach().requires_grad_(rows.requires_grad) for rows in chunk]
        value = function(*leaves)
        if number == 0 and _uses_others(value, leaves):
            return torch.stack([checkpoint(function, *each, use_reentrant=False).float() for each in chunks]).sum()
        _store_gradients_(value, leaves, gradients, slice(number * size, number * size + size))
        sums.append(value.detach().float())
    return _WithGradients.apply(torch.stack(sums).sum(), gradients, *tensors)  # type: ignore[no-any-return]


def _store_gradients_(value: Tensor, leaves: list[Tensor], gradients: Sequence[Tensor | None], rows: slice) -> None:
    """Write ∂value/∂leaf into the rows of each gradient that is wanted; zeros where it does not depend on it."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in wanted]
    if value.requires_grad:
        found = torch.autograd.grad(value, wanted, materialize_grads=True)
    kept = (gradient for gradient in gradients if gradient is not None)
    for gradient, part in zip(kept, found, strict=True):
        gradient[rows] = part


def _uses_others(value: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a gradient of `value` would reach a tensor that is none of the leaves."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            return True
        waiting += [parent for parent, _ in node.next_functions]
    return False


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to tensors are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        scaled = [None if gradient is None else (scale * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return (None, None, *scaled)
