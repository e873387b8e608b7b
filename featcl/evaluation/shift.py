"""Distribution shift as a number: how far apart consecutive segments of a stream are for one and the same model.

Of two segments, sequences with their targets, for a model that stays as it is:

    gradient distance = 1 − cos(g₁, g₂),  g = mean over target tokens of ∇ −log p, for chosen weights
    prediction KL     = KL(p̄₂ || p̄₁),     p̄ = mean over target tokens of the model's next-token distribution
    prediction JS     = ½ KL(p̄₁ || p̄) + ½ KL(p̄₂ || p̄),  p̄ = (p̄₁ + p̄₂) / 2, at most ln 2

The first is 1 where two segments pull the weights in unrelated directions, above 1 where against each other; the others
say how much else is predicted. All are exactly 0 for identical segments. Two samples of one distribution are not
identical, so each distance comes with its floor: the same distance between the two halves of both segments joined
(every second sequence of each), which differ by sampling alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.evaluation.forward import MAX_LOGITS, Targeted, target_batches
from featcl.models import inner_model, residual_map


@dataclass(frozen=True)
class Shift:
    """The distance from one segment to the next.

    Attributes:
        before, after: Their names.
        gradient: 1 − cos of the segments' mean gradients, from 0 to 2.
        gradient_floor: The same between two halves of both joined: what sampling alone does.
        kl: KL(mean prediction after || mean prediction before), nats.
        js: Jensen-Shannon divergence of the two, nats, at most ln 2.
        js_floor: The same between two halves of both joined.
    """

    before: str
    after: str
    gradient: float
    gradient_floor: float
    kl: float
    js: float
    js_floor: float


@dataclass(frozen=True)
class ShiftSeries:
    """The distances along a stream.

    Attributes:
        steps: From each segment to the next.
    """

    steps: tuple[Shift, ...]

    @property
    def gradient(self) -> float:
        """Mean gradient distance over the steps: one number for the order of a stream."""
        return sum(step.gradient for step in self.steps) / len(self.steps)

    @property
    def gradient_excess(self) -> float:
        """Mean of the gradient distance less its floor: near 0 where nothing shifts."""
        return sum(step.gradient - step.gradient_floor for step in self.steps) / len(self.steps)

    @property
    def js(self) -> float:
        """Mean Jensen-Shannon divergence over the steps, nats."""
        return sum(step.js for step in self.steps) / len(self.steps)

    def record(self) -> dict[str, float]:
        """Flat scalars by the names that the trackers use."""
        return {"shift/gradient": self.gradient, "shift/gradient_excess": self.gradient_excess, "shift/js": self.js}

    def to_dicts(self) -> list[dict[str, Any]]:
        """One row per step."""
        return [asdict(step) for step in self.steps]


@dataclass(frozen=True, eq=False)
class _Half:
    """Sums over the target tokens of half a segment."""

    gradient: list[Tensor]
    predictions: Float[Tensor, " vocab"]
    tokens: int

    def __add__(self, other: _Half) -> _Half:
        gradient = [mine + theirs for mine, theirs in zip(self.gradient, other.gradient, strict=True)]
        return _Half(gradient, self.predictions + other.predictions, self.tokens + other.tokens)


def shift_series(
    model: nn.Module,
    segments: Mapping[str, Sequence[Targeted]],
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int = 4096,
) -> ShiftSeries:
    """The distance from every segment of a stream to the next, for one model.

    Args:
        model: The base model, or an adapted one as it stands; it is left as it was.
        segments: Name -> sequences with their target masks (`featcl.streams.windows.encode_trajectory`), in the order
            of the stream; `cut_segments` makes some of equal length. Two or more, of two or more sequences each.
        layers: Blocks whose writers' weights the gradient is taken of; None: all. Memory is that of three copies of
            these weights in float32: name one or two blocks of a large model.
        batch_tokens: Padded tokens per forward.

    Raises:
        FeatclError: If there are fewer than two segments, a segment has fewer than two sequences, or a layer does not
            exist.

    Source: gradient cosine as a distance of tasks: Yu et al. 2020, arXiv:2001.06782, section 2.1; Du et al. 2018,
        arXiv:1812.02224.
    """
    check_segments(model, segments, layers)
    steps: list[Shift] = []
    with _differentiable(model, layers) as weights:
        previous: tuple[str, tuple[_Half, _Half]] | None = None
        for name, sequences in segments.items():
            halves = tuple(_read(model, list(sequences)[start::2], weights, batch_tokens) for start in (0, 1))
            now = (name, (halves[0], halves[1]))
            if previous is not None:
                steps.append(_step(previous, now))
            previous = now
    return ShiftSeries(tuple(steps))


def check_segments(
    model: nn.Module, segments: Mapping[str, Sequence[Targeted]], layers: Sequence[int] | None = None
) -> None:
    """Raise what `shift_series` would, before anything is computed."""
    if len(segments) < 2:
        raise FeatclError(f"shift: {len(segments)} segment; a distance needs two or more")
    for name, sequences in segments.items():
        if len(sequences) < 2:
            raise FeatclError(f"shift: segment {name!r} has {len(sequences)} sequence; each needs two or more")
    blocks = residual_map(model).n_layers
    if wrong := [layer for layer in layers or () if not 0 <= layer < blocks]:
        raise FeatclError(f"shift: layer {wrong[0]} is out of range, the model has blocks 0 to {blocks - 1}")
    if layers is not None and not layers:
        raise FeatclError("shift: no layers to take a gradient of: the list is empty")


def cut_segments(sequences: Sequence[Targeted], count: int) -> dict[str, Sequence[Targeted]]:
    """A stream cut into `count` segments of (nearly) equal length, so that orders of the same data can be compared.

    Raises:
        FeatclError: If there are not two sequences for each.
    """
    if count < 2 or len(sequences) < 2 * count:
        raise FeatclError(f"shift: {len(sequences)} sequences do not make {count} segments of two or more; from 2 on")
    edges = [round(index * len(sequences) / count) for index in range(count + 1)]
    return {f"{index}": sequences[edges[index] : edges[index + 1]] for index in range(count)}


@torch.no_grad()
def prediction_kl(
    adapter: Any,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    sequences: Sequence[Targeted],
    *,
    batch_tokens: int = 4096,
) -> float:
    """KL(model after || model before) in nats per target token: what learning a segment changed in its predictions.

    Args:
        adapter: A `ConstrainedAdapter`; it is left as it was.
        before, after: Coordinates as `adapter.coordinates` returned them.
        sequences: Where the two are compared.
        batch_tokens: Padded tokens per forward.

    Raises:
        FeatclError: If coordinates belong to another adapter, or there is nothing to predict.
    """
    if not sequences:
        raise FeatclError("shift: no sequences to compare predictions on")
    kept = adapter.coordinates()
    logits: list[list[Tensor]] = []
    try:
        for coordinates in (before, after):
            adapter.load_coordinates_(coordinates)
            batches = target_batches(adapter.model, sequences, batch_tokens=batch_tokens)
            logits.append([batch.logits.float().log_softmax(-1) for batch in batches])
    finally:
        adapter.load_coordinates_(kept)
    total = tokens = 0.0
    for old, new in zip(*logits, strict=True):
        total += float((new.exp() * (new - old)).sum(dtype=torch.float64))
        tokens += len(new)
    return total / tokens


def _step(before: tuple[str, tuple[_Half, _Half]], after: tuple[str, tuple[_Half, _Half]]) -> Shift:
    (name, (a1, a2)), (next_name, (b1, b2)) = before, after
    a, b = a1 + a2, b1 + b2
    left, right = a1 + b1, a2 + b2  # halves of both joined
    return Shift(
        before=name,
        after=next_name,
        gradient=_cosine_distance(a.gradient, b.gradient),
        gradient_floor=_cosine_distance(left.gradient, right.gradient),
        kl=_kl(_mean(b), _mean(a)),
        js=_js(_mean(a), _mean(b)),
        js_floor=_js(_mean(left), _mean(right)),
    )


def _read(model: Any, sequences: Sequence[Targeted], weights: Sequence[Tensor], batch_tokens: int) -> _Half:
    """Σ over target tokens of ∇ −log p(target), and of the predicted distribution."""
    gradient = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    predictions, tokens = torch.zeros(0), 0
    vocab = int(inner_model(model).config.get_text_config().vocab_size)
    for group in _by_length(sequences, min(batch_tokens, MAX_LOGITS // vocab)):
        log_p, targets = _predictions(model, group)
        loss = -log_p.gather(-1, targets[:, None]).sum()
        found = torch.autograd.grad(loss, weights)
        for whole, part in zip(gradient, found, strict=True):
            whole += part
        summed = log_p.detach().exp().sum(0, dtype=torch.float64).cpu()
        predictions = summed if not tokens else predictions + summed
        tokens += len(targets)
    return _Half(gradient, predictions, tokens)


def _by_length(sequences: Sequence[Targeted], batch_tokens: int) -> list[list[Targeted]]:
    groups: list[list[Targeted]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.input_ids)):
        if not groups or len(sequence.input_ids) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(sequence)
    return groups


def _predictions(model: Any, group: Sequence[Targeted]) -> tuple[Float[Tensor, "targets vocab"], Tensor]:
    """Log-probabilities at the targets with their graph, and the targets; causal attention does not see the padding."""
    device, width = next(model.parameters()).device, max(len(sequence.input_ids) for sequence in group)
    ids = torch.zeros(len(group), width, dtype=torch.long)
    places = []
    for row, sequence in enumerate(group):
        ids[row, : len(sequence.input_ids)] = torch.tensor(list(sequence.input_ids))
        places += [(row, place) for place, target in enumerate(sequence.loss_mask) if target and place]
    if not places:
        raise FeatclError("shift: a sequence has no target after its first token")
    ids = ids.to(device)
    rows, columns = torch.tensor(places, device=device).T
    logits = model(input_ids=ids, use_cache=False).logits[rows, columns - 1]
    return logits.float().log_softmax(-1), ids[rows, columns]


@contextmanager
def _differentiable(model: Any, layers: Sequence[int] | None) -> Iterator[list[Any]]:
    """The writers' weights of these blocks, asking for a gradient inside the block; the model's flags are put back."""
    residual = residual_map(model)
    inner = inner_model(model)
    sites = [site for site in residual.writers if layers is None or site.layer in layers]
    modules = [inner.get_submodule(site.name) for site in sites]
    weights = [getattr(module, "base_layer", module).weight for module in modules]
    training = inner.training
    with ExitStack() as stack:
        for parameter in inner.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        stack.callback(inner.train, training)
        stack.enter_context(torch.enable_grad())
        inner.eval()
        yield weights


def _cosine_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """1 − ⟨a, b⟩ / (‖a‖ ‖b‖) in float64; NaN where one is zero. As ½ ‖a/‖a‖ − b/‖b‖‖², exactly 0 for equal ones."""
    norms = [sum(float(part.double().square().sum()) for part in side) ** 0.5 for side in (a, b)]
    if not all(norms):
        return float("nan")
    return 0.5 * sum(
        float((x.double() / norms[0] - y.double() / norms[1]).square().sum()) for x, y in zip(a, b, strict=True)
    )


def _mean(half: _Half) -> Float[Tensor, " vocab"]:
    return half.predictions / half.tokens


def _kl(p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"]) -> float:
    """KL(p || q), where p is not 0."""
    there = p > 0
    return float((p[there] * (p[there].log() - q[there].log())).sum())


def _js(p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"]) -> float:
    middle = (p + q) / 2
    return min(max(0.0, (_kl(p, middle) + _kl(q, middle)) / 2), math.log(2))
