"""An SAE's encoder restricted to chosen features: what reading their activations needs, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError

Activation: TypeAlias = Literal["relu", "jumprelu", "topk"]
NORMALIZE = ("none", "layer_norm", "constant_norm_rescale")
CHUNK_BYTES = 16 * 2**20
"""Pre-activations that exist at a time on a CPU: few enough to stay in its cache, enough for a full-speed product.
Elsewhere 16 times as many, since every launch has its price."""


@dataclass(frozen=True, eq=False)
class FeatureEncoder:
    """f = activation((normalize(h) − b_dec) W_enc + b_enc), for k chosen columns of W_enc.

    Restricting the columns is exact for `relu` and `jumprelu`, where a feature depends on its own column alone. TopK
    features compete, so there all columns are kept and the chosen ones are read off at the end.

    Attributes:
        W_enc: Columns [d_model, n]; n = k, or d_sae for `topk`.
        b_enc: Bias per column.
        b_dec: Subtracted from the input; zeros where the SAE does not do so.
        threshold: Per column, for `jumprelu`; else None.
        activation: `relu`, `jumprelu` (pre-activation kept where it exceeds the threshold) or `topk`.
        active: How many columns win, for `topk`; else 0.
        chosen: Positions of the k features among the columns.
        normalize: What SAELens does to its input first: `none`, `layer_norm` or `constant_norm_rescale`.
    """

    W_enc: Float[Tensor, "d_model n"]
    b_enc: Float[Tensor, " n"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " n"] | None
    activation: Activation
    active: int
    chosen: tuple[int, ...]
    normalize: str = "none"

    @property
    def k(self) -> int:
        """Number of features read."""
        return len(self.chosen)

    def __call__(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """Activations of the chosen features, float32, as SAELens' own `encode` gives them.

        Without gradients the pre-activations of at most `CHUNK_BYTES` exist at a time, so that TopK, which needs all
        d_sae of them to know who wins, costs the memory of its k outputs.
        """
        if torch.is_grad_enabled() and hidden.requires_grad:
            return self._chosen(self._activate(self._inputs(hidden) @ self.W_enc + self.b_enc))
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        if len(rows) <= self._rows_at_a_time:
            feature_acts = self._encode(rows)
        else:
            feature_acts = rows.new_empty(len(rows), self.k, dtype=torch.float32)
            for where, part in self.chunks(rows):
                feature_acts[where] = part
        return feature_acts.reshape(*hidden.shape[:-1], self.k)

    def chunks(self, hidden: Float[Tensor, "tokens d_model"]) -> Iterator[tuple[slice, Float[Tensor, "rows k"]]]:
        """The same in bounded memory: consecutive rows with their activations, for sums over many tokens.

        The activations lie in one buffer that the next step overwrites: reduce or copy them.
        """
        hidden = hidden.detach()
        columns = self.W_enc.shape[1]
        size = min(self._rows_at_a_time, max(1, len(hidden)))
        buffer = hidden.new_empty(size, columns, dtype=torch.float32)
        for start in range(0, len(hidden), size):
            part = hidden[start : start + size]
            yield slice(start, start + len(part)), self._encode(part, buffer[: len(part)])

    @torch.no_grad()
    def _encode(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        hidden_pre = torch.addmm(self.b_enc, self._inputs(rows), self.W_enc, out=out)
        if self.activation != "jumprelu":
            return self._chosen(self._activate(hidden_pre))
        # relu(x) · [x > t] = x · [x > max(t, 0)], in place
        if self._floor is not None:
            return torch.threshold_(hidden_pre, self._floor, 0.0)
        return hidden_pre.mul_(hidden_pre > self._gate)

    def _inputs(self, hidden: Tensor) -> Tensor:
        return _normalized(hidden.float(), self.normalize) - self.b_dec

    def _activate(self, hidden_pre: Tensor) -> Tensor:
        if self.threshold is not None:
            return hidden_pre.relu() * (hidden_pre > self.threshold)
        return hidden_pre.relu() if hidden_pre.requires_grad else hidden_pre.relu_()

    def _chosen(self, feature_acts: Tensor) -> Tensor:
        if self.activation != "topk":
            return feature_acts
        values, winners = feature_acts.topk(self.active, dim=-1)
        return torch.zeros_like(feature_acts).scatter(-1, winners, values)[..., list(self.chosen)]

    @property
    def _rows_at_a_time(self) -> int:
        limit = CHUNK_BYTES if self.W_enc.device.type == "cpu" else 16 * CHUNK_BYTES
        return max(1, limit // (4 * self.W_enc.shape[1]))

    @cached_property
    def _gate(self) -> Tensor:
        assert self.threshold is not None
        return self.threshold.clamp(min=0)

    @cached_property
    def _floor(self) -> float | None:
        """The threshold where all features share one, as those of a converted BatchTopK SAE do."""
        lowest, highest = self._gate.min().item(), self._gate.max().item()
        return lowest if lowest == highest else None

    def to(self, device: torch.device | str) -> FeatureEncoder:
        """The same encoder on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, for saving."""
        tensors = {"W_enc": self.W_enc, "b_enc": self.b_enc, "b_dec": self.b_dec}
        return tensors if self.threshold is None else tensors | {"threshold": self.threshold}

    def settings(self) -> dict[str, Any]:
        """What is not a tensor, for the manifest."""
        chosen = tuple(int(position) for position in self.chosen)
        return {"activation": self.activation, "active": self.active, "chosen": chosen, "normalize": self.normalize}

    @classmethod
    def from_sae(cls, sae: Any, feature_ids: tuple[int, ...]) -> FeatureEncoder | None:
        """The encoder of `feature_ids`, or None for an architecture that is none of the three (gated, temporal, …).

        Args:
            sae: A `sae_lens.SAE`.
            feature_ids: Which columns; distinct.
        """
        activation = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}.get(sae.cfg.architecture())
        if activation is None:
            return None
        if sae.cfg.normalize_activations not in NORMALIZE:
            raise FeatclError(f"SAE input processing {sae.cfg.normalize_activations!r} is unknown: {NORMALIZE}")
        columns = list(range(sae.cfg.d_sae)) if activation == "topk" else list(feature_ids)
        W_enc, b_enc = sae.W_enc.detach()[:, columns].float(), sae.b_enc.detach()[columns].float()
        if activation == "topk" and sae.cfg.rescale_acts_by_decoder_norm:
            norms = sae.W_dec.detach().float().norm(dim=-1)
            W_enc, b_enc = W_enc * norms, b_enc * norms
        b_dec = sae.b_dec.detach().float()
        return cls(
            W_enc=W_enc.contiguous(),  # indexing has copied
            b_enc=b_enc,
            b_dec=b_dec.clone() if sae.cfg.apply_b_dec_to_input else torch.zeros_like(b_dec),
            threshold=sae.threshold.detach()[columns].float() if activation == "jumprelu" else None,
            activation=activation,  # type: ignore[arg-type]
            active=int(sae.cfg.k) if activation == "topk" else 0,
            chosen=tuple(feature_ids) if activation == "topk" else tuple(range(len(feature_ids))),
            normalize=sae.cfg.normalize_activations,
        )


def _normalized(hidden: Tensor, how: str) -> Tensor:
    if how == "none":
        return hidden
    if how == "constant_norm_rescale":
        return hidden * hidden.shape[-1] ** 0.5 / hidden.norm(dim=-1, keepdim=True)
    centered = hidden - hidden.mean(dim=-1, keepdim=True)
    return centered / (centered.std(dim=-1, keepdim=True) + 1e-5)
