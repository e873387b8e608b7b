"""How far a model has moved from its base: in its predictions, token by token, and in its weights, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.adapters.full import FullAdapter
from featcl.adapters.kept import KEPT
from featcl.adapters.mixture import MixtureAdapter
from featcl.adapters.osf import OsfAdapter
from featcl.errors import FeatclError
from featcl.evaluation.forward import TargetBatch, target_batches
from featcl.features.tokens import Text, token_windows
from featcl.models import inner_model, max_context, residual_map
from featcl.streams.chat import Encoded

ROWS = 1 << 24
"""Probabilities of one model that exist at one time in float32: 67 MB."""


@dataclass(frozen=True)
class KLDrift:
    """The distance of an adapted model's predictions from its base's, on some texts; all in nats per token.

    Attributes:
        forward: KL(base || now), mean over tokens: what the base held likely and is no longer.
        reverse: KL(now || base): what has become likely and was not. Exactly 0, both, where nothing changed.
        flipped: Share of tokens whose most likely value is another.
        per_text: `forward` of every text, in order; texts of fewer than two tokens are left out.
        tokens: How many predictions were compared.
    """

    forward: float
    reverse: float
    flipped: float
    per_text: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class TokenKL:
    """A text, and by how much each prediction of it has moved; to colour it.

    Attributes:
        pieces: The text's tokens as they read; joined they are the text, special tokens included.
        kl: KL(base || now) of the prediction of each piece in nats; the first, which nothing predicts, has 0.
    """

    pieces: tuple[str, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True)
class WeightDrift:
    """‖ΔW‖ (Frobenius) where the model was changed.

    Attributes:
        sites: Module path -> ‖ΔW‖; for the kinds that act at a hook, block -> norm of the update's matrix.
        relative: Module path -> ‖ΔW‖ / ‖W‖; empty for the kinds that act at a hook.
        layers: Block -> root of the sum of squares over its sites.
        total: The same over all sites, those in no block included.
    """

    sites: Mapping[str, float]
    relative: Mapping[str, float]
    layers: Mapping[int, float]
    total: float

    def record(self) -> dict[str, float]:
        """Flat scalars by the names that the trackers use."""
        return {f"drift/delta_norm_{layer}": norm for layer, norm in self.layers.items()}


def kl_drift(
    adapter: Any, tokenizer: Any, texts: Sequence[Text], *, context: int | None = None, batch_tokens: int = 4096
) -> KLDrift:
    """Compare an adapted model's next-token predictions with those of its base, which is the adapter switched off.

    Args:
        adapter: A `ConstrainedAdapter`; other adapters on the model are switched off with it.
        tokenizer: Its tokenizer.
        texts: Strings or token ids: prompts of what is learned, or background text; longer ones are cut in windows.
        context: Longest window; None: the model's, at most 512.
        batch_tokens: Padded tokens per forward.

    Raises:
        FeatclError: If no text has two tokens.
    """
    sequences, owners = _sequences(adapter.model, tokenizer, texts, context)
    sums = torch.zeros(len(texts), 2, dtype=torch.float64)  # forward KL, tokens
    reverse = flipped = 0.0
    for base, now in _paired(adapter, sequences, batch_tokens):
        owner = torch.tensor([owners[index] for index in base.owner.tolist()])
        for rows in torch.arange(len(owner)).split(max(1, ROWS // base.logits.shape[-1])):
            p, q = (side.logits[rows.to(side.logits.device)].float().log_softmax(-1) for side in (base, now))
            forward = _kl(p, q)
            sums.index_add_(0, owner[rows], torch.stack([forward, torch.ones_like(forward)], dim=-1).cpu())
            reverse += float(_kl(q, p).sum())
            flipped += int((p.argmax(-1) != q.argmax(-1)).sum())
    total, tokens = sums.sum(0).tolist()
    read = sums[sums[:, 1] > 0]
    return KLDrift(
        forward=total / tokens,
        reverse=reverse / tokens,
        flipped=flipped / tokens,
        per_text=tuple((read[:, 0] / read[:, 1]).tolist()),
        tokens=int(tokens),
    )


def token_kl(adapter: Any, tokenizer: Any, text: Text, *, context: int | None = None) -> TokenKL:
    """KL(base || now) of every token's prediction in one text, at most one window of it.

    Raises:
        FeatclError: If it has fewer than two tokens.
    """
    sequences, _ = _sequences(adapter.model, tokenizer, [text], context)
    [(base, now)] = _paired(adapter, sequences[:1], len(sequences[0]))
    kl = _kl(base.logits.float().log_softmax(-1), now.logits.float().log_softmax(-1)).tolist()
    pieces = tuple(tokenizer.decode([token]) for token in sequences[0].input_ids)
    return TokenKL(pieces, (0.0, *kl))


def weight_drift(adapter: Any) -> WeightDrift:
    """‖ΔW‖ of every adapted module (of the kind `full`, of every trained weight) and block, as the adapter stands.

    Raises:
        FeatclError: For an update that is another at every token.
    """
    if isinstance(adapter, MixtureAdapter):
        raise FeatclError("drift: an update of kind 'mixture' is another at every token, so there is no one ‖ΔW‖ of it")
    if isinstance(adapter, OsfAdapter):
        sites = {name: float(adapter.delta(name).norm()) for name in adapter.layers}
    else:
        sites = dict(adapter.delta_norms())
    prefix = f"{residual_map(adapter.model).layers_path}."
    squares: dict[int, float] = {}
    for name, norm in sites.items():
        if name.startswith(prefix):
            layer = int(name.removeprefix(prefix).split(".")[0])
            squares[layer] = squares.get(layer, 0.0) + norm**2
    return WeightDrift(
        sites=sites,
        relative={name: sites[name] / norm for name, norm in _base_norms(adapter, sites).items() if norm},
        layers={layer: square**0.5 for layer, square in sorted(squares.items())},
        total=sum(norm**2 for norm in sites.values()) ** 0.5,
    )


def _base_norms(adapter: Any, sites: Collection[str]) -> dict[str, float]:
    """‖W‖ of the base weights, where there are such."""
    if isinstance(adapter, FullAdapter):
        now = adapter.coordinates()
        return {name: float((now[name].float() - delta).norm()) for name, delta in adapter.deltas()}
    model = inner_model(adapter.model)
    base = {name: getattr(model.get_submodule(name), "base_layer", None) for name in sites}
    return {name: float(layer.weight.detach().float().norm()) for name, layer in base.items() if layer is not None}


@contextmanager
def scaled(adapter: Any, factor: float) -> Iterator[None]:
    """Inside the block the update is `factor` times what it is; afterwards it is bit-equal to what it was.

    Args:
        adapter: Its coordinates enter linearly, or as a product B A, of which B is scaled; of the kind `full`, W - W₀.
        factor: 0 is the base model, 1 changes nothing.

    Raises:
        FeatclError: For an update that is neither.
    """
    before = adapter.coordinates()
    if isinstance(adapter, FullAdapter):  # its coordinates are the weights themselves
        changed = {name: before[name] + (factor - 1.0) * delta.to(before[name]) for name, delta in adapter.deltas()}
    else:
        changed = {name: _scale(adapter, name, factor) * value for name, value in before.items()}
    adapter.load_coordinates_(changed)
    try:
        yield
    finally:
        adapter.load_coordinates_(before)


def _scale(adapter: Any, name: str, factor: float) -> float:
    if name.endswith(f".{KEPT}_lora_A"):
        return 1.0
    if adapter.linear or name.endswith("lora_B"):
        return factor
    if name.endswith("lora_A"):
        return 1.0
    raise FeatclError(f"an update of kind {adapter.kind!r} cannot be scaled: {name} does not enter linearly")


def _sequences(
    model: Any, tokenizer: Any, texts: Sequence[Text], context: int | None
) -> tuple[list[Encoded], list[int]]:
    """Windows whose every token but the first is a target, and the text that each is of."""
    context = context or min(512, max_context(model))
    windows = [
        (window, index)
        for index, text in enumerate(texts)
        for window in token_windows(tokenizer, [text], context=context)
        if len(window) > 1
    ]
    if not windows:
        raise FeatclError("drift: the texts hold no two tokens in a row, so nothing is predicted")
    encoded = [Encoded(window, [False] + [True] * (len(window) - 1)) for window, _ in windows]
    return encoded, [index for _, index in windows]


def _paired(adapter: Any, sequences: Sequence[Encoded], tokens: int) -> Iterator[tuple[TargetBatch, TargetBatch]]:
    """The same batches of the base model and of the adapted one."""
    base, now = (target_batches(adapter.model, sequences, batch_tokens=tokens) for _ in range(2))
    while True:
        with adapter.disabled():
            reference = next(base, None)
        if reference is None:
            return
        yield reference, next(now)


def _kl(p: Float[Tensor, "rows vocab"], q: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """KL(p || q) = Σ_v p_v (log p_v − log q_v) of log-probabilities; 0 where p_v is."""
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).double()
