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
        with nullcontext() if self._trunks is None else self._trunks.over(batch, batch.input_ids):
            output = self.trunk(input_ids=batch.input_ids, use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)

    @contextmanager
    def trunks_kept(self) -> Iterator[None]:
        """Inside the block, what lies below the lowest adapter runs once per batch object; numbers stay bit-equal."""
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


def sum_in_chunks(
    function: Callable[..., Float[Tensor, ""]], *tensors: Tensor, width: int, limit: int = CHUNK_LOGITS
) -> Float[Tensor, ""]:
    """Sum of `function` over chunks of tokens; backward recomputes a chunk rather than keeping its logits.

    Args:
        function: Takes rows of each tensor, returns the sum of its values over them.
        tensors: Equal first axis: tokens.
        width: Logits per token.
        limit: Logits that may exist at one time.
    """
    size = max(1, limit // width)
    if tensors[0].shape[0] <= size:
        return function(*tensors)
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    total = tensors[0].new_zeros((), dtype=torch.float32)
    for chunk in chunks:
        total = total + checkpoint(function, *chunk, use_reentrant=False)
    return total
