"""Attention over the vectors that a memory retrieved for the last tokens: what the form `context` reads.

Titans' "memory as a context" puts what was retrieved before the tokens of a segment and lets the model's attention see
both. A frozen model's softmax would be shared with those positions even if they said nothing, so here the retrieved
vectors have an attention of their own, whose output passes a gate of its own:

    o_t = W_o Σ_s softmax_s(q_t · k_s / √d_head) v_s,   t − window < s ≤ t,
    q_t = W_q x_t,  k_s = W_k r_s,  v_s = W_v r_s

Each token looks at the retrieved vectors of the last `window` tokens, itself included; cost is linear in length.

Source: Behrouz et al. 2024, arXiv:2501.00663, section 4.1 (memory as a context).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featcl.errors import FeatclError


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values of the last tokens before a pass, oldest first; fewer than the window.

    Attributes:
        keys: W_k r of each of them.
        values: W_v r.
        real: False where the token is padding.
    """

    keys: Float[Tensor, "batch past width"]
    values: Float[Tensor, "batch past width"]
    real: Bool[Tensor, "batch past"]

    def rows(self, indices: Int[Tensor, " rows"]) -> Past:
        """These rows of the batch, in this order."""
        indices = indices.to(self.real.device)
        return Past(*(part.index_select(0, indices) for part in (self.keys, self.values, self.real)))

    def to(self, device: torch.device) -> Past:
        """The same on a device."""
        return Past(*(part.to(device) for part in (self.keys, self.values, self.real)))


class ContextRead(nn.Module):
    """The attention above.

    Args:
        width: Of the stream and of the retrieved vectors.
        heads: Number of heads; must divide `width`.
        window: How many tokens back a token looks, itself included.
        seed: Of the projections.

    Raises:
        FeatclError: If the heads do not divide the width, or the window is empty.
    """

    query: Float[Tensor, "width width"]
    key: Float[Tensor, "width width"]
    value: Float[Tensor, "width width"]
    out: Float[Tensor, "width width"]

    def __init__(self, width: int, *, heads: int, window: int, seed: int = 0) -> None:
        super().__init__()
        if type(window) is not int or window < 1:
            raise FeatclError(f"memory: a window of {window!r} tokens; a whole number, at least 1, is needed")
        if heads < 1 or width % heads:
            raise FeatclError(f"memory: {heads} heads do not divide the width {width} of the attention read")
        self.heads, self.window = heads, window
        generator = torch.Generator().manual_seed(seed)
        for name in ("query", "key", "value", "out"):
            weight = torch.randn(width, width, generator=generator) * width**-0.5
            self.register_parameter(name, nn.Parameter(weight))

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        retrieved: Float[Tensor, "batch seq width"],
        past: Past | None = None,
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq width"], Past]:
        """What every token reads, and what the next pass needs of this one.

        Args:
            x: The stream, normalised.
            retrieved: What the memory answered, token by token.
            past: From the pass before, or None at the start.
            mask: False where there is padding, which nobody reads.
        """
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        now = Past(retrieved @ self.key.T, retrieved @ self.value.T, real)
        seen = now if past is None else _joined(past, now)
        read = self._attend(x @ self.query.T, seen)
        kept = seen.real.shape[1] - (self.window - 1)
        last = Past(*(part[:, max(0, kept) :] for part in (seen.keys, seen.values, seen.real)))
        return read @ self.out.T, last

    def _attend(self, queries: Float[Tensor, "batch seq width"], seen: Past) -> Float[Tensor, "batch seq width"]:
        """Block by block: c queries against the c + window − 1 keys that any of them may look at."""
        batch, seq, _ = queries.shape
        c = min(seq, self.window)
        tail = -seq % c
        head = seq + self.window - 1 - seen.real.shape[1]
        keys, values = (nn.functional.pad(part, (0, 0, head, tail)) for part in (seen.keys, seen.values))
        real = nn.functional.pad(seen.real, (head, tail)).unfold(1, c + self.window - 1, c)
        q = rearrange(nn.functional.pad(queries, (0, 0, 0, tail)), "b (n c) (h d) -> (b n) h c d", c=c, h=self.heads)
        k, v = (
            rearrange(part.unfold(1, c + self.window - 1, c), "b n (h d) s -> (b n) h s d", h=self.heads)
            for part in (keys, values)
        )
        ahead = torch.arange(c + self.window - 1, device=q.device) - torch.arange(c, device=q.device)[:, None]
        band, own = (ahead >= 0) & (ahead < self.window), ahead == self.window - 1
        # a padding token reads itself, so that no row of the softmax is empty; what it reads is thrown away
        allowed = rearrange((band & real[:, :, None]) | own, "b n c s -> (b n) 1 c s")
        read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return rearrange(read, "(b n) h c d -> b (n c) (h d)", b=batch)[:, :seq]


def _joined(past: Past, now: Past) -> Past:
    pairs = ((past.keys, now.keys), (past.values, now.values), (past.real, now.real))
    return Past(*(torch.cat(pair, dim=1) for pair in pairs))
