"""What an update does to an SAE's features on background text, and whether the SAE still fits the adapted model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.evaluation.drift import scaled
from featcl.features import check_sae
from featcl.features.activity import encode_in_parts, hook_rows
from featcl.features.check import SAEHealth
from featcl.features.tokens import Text

DRAWS = 1000
"""Bootstrap samples; a 95 % level needs a few hundred."""


@dataclass(frozen=True)
class FeatureChange:
    """How one feature's mean activation on background text has changed.

    Attributes:
        feature_id: Index in the SAE.
        name: What people call it, where that is known.
        base: Mean activation in the base model, mean over windows of the window's mean.
        now: In the adapted model, on the same windows.
        low, high: 95 % interval of now − base: percentile bootstrap over windows, pairs kept.
        floor: By how much two samples of as many windows differ when nothing has changed, at the level of all
            features together; see `feature_drift`.
        changed: |now − base| > floor.
    """

    feature_id: int
    name: str | None
    base: float
    now: float
    low: float
    high: float
    floor: float
    changed: bool

    @property
    def difference(self) -> float:
        """now − base."""
        return self.now - self.base


@dataclass(frozen=True)
class FeatureDrift:
    """The features whose mean activation on background text has moved most, against the noise floor of such text.

    Attributes:
        features: The `top` of them, those first that exceed their own floor by the largest factor.
        n_changed: How many of all features changed.
        d_sae: How many there are.
        relative: ‖now − base‖ / ‖base‖ over the mean activations of all features.
        windows: Windows of text that were read.
        hook_name: Where.
    """

    features: tuple[FeatureChange, ...]
    n_changed: int
    d_sae: int
    relative: float
    windows: int
    hook_name: str

    def record(self) -> dict[str, float]:
        """Flat scalars by the names that the trackers use."""
        return {"drift/features_changed": self.n_changed, "drift/features_relative": self.relative}

    def to_dicts(self) -> list[dict[str, Any]]:
        """One row per feature, for tables and bars."""
        return [{**asdict(change), "difference": change.difference} for change in self.features]


@torch.no_grad()
def feature_drift(
    sae: Any,
    adapter: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    top: int = 20,
    names: Mapping[int, str] | None = None,
    context: int | None = 64,
    seed: int = 0,
) -> FeatureDrift:
    """Which features' mean activation on background text an update has changed.

    With n windows, means a (base) and b (now) of every feature, and s its standard deviation over all 2n window means:
    the floor is c · s √(2/n), c the 95 % quantile of max over features |a' − b'| / (s √(2/n)) when both a' and b' are
    means of n windows drawn from all 2n. A feature above it would be above it in one of 20 comparisons of unchanged
    models on different text, whichever feature it is. The two models read the same text, so a drift below the floor
    is real too, only smaller than what other text does to a mean: the interval says how well it is known.

    Args:
        sae: A `sae_lens.SAE` of the model.
        adapter: A `ConstrainedAdapter`; the base is the adapter switched off.
        tokenizer: Its tokenizer.
        texts: Background: strings or token ids; windows are the independent samples, so give 30 or more.
        top: How many features are returned; the numbers of all are counted.
        names: Feature id -> name.
        context: Longest window; a text longer than that is several.
        seed: Of the bootstrap.

    Raises:
        FeatclError: If there are fewer than 8 windows.

    Source: Westfall & Young 1993, Resampling-Based Multiple Testing, section 2.3 (the maximum statistic).
    """
    with adapter.disabled():
        base = _window_means(sae, adapter.model, tokenizer, texts, context)
    now = _window_means(sae, adapter.model, tokenizer, texts, context)
    n = len(base)
    if n < 8:
        raise FeatclError(f"feature drift: {n} windows of background text say too little of its noise; give 8 or more")
    generator = torch.Generator().manual_seed(seed)
    difference, floor = (now - base).mean(0), _noise_floor(torch.cat([base, now]), n, generator)
    changed = difference.abs() > floor
    excess = difference.abs() / floor.clamp(min=torch.finfo(floor.dtype).tiny)
    chosen = [int(index) for index in excess.topk(min(top, len(excess))).indices if difference[int(index)] != 0]
    low, high = _paired_interval((now - base)[:, chosen], generator)
    means = base.mean(0)
    return FeatureDrift(
        features=tuple(
            FeatureChange(
                feature_id=index,
                name=(names or {}).get(index),
                base=float(means[index]),
                now=float(now[:, index].mean()),
                low=float(low[place]),
                high=float(high[place]),
                floor=float(floor[index]),
                changed=bool(changed[index]),
            )
            for place, index in enumerate(chosen)
        ),
        n_changed=int(changed.sum()),
        d_sae=base.shape[1],
        relative=float(difference.norm() / means.norm()),
        windows=n,
        hook_name=sae.cfg.metadata["hook_name"],
    )


def _window_means(
    sae: Any, model: Any, tokenizer: Any, texts: Sequence[Text], context: int | None
) -> Float[Tensor, "windows d_sae"]:
    """Every window's mean activation of every feature, float64; windows come in the same order for the same texts."""
    encode, found = encode_in_parts(sae), []
    for batch, rows in hook_rows(sae, model, tokenizer, texts, context=context):
        owner = batch.counted.nonzero()[:, 0].to(rows.device)
        sums = torch.zeros(len(batch.counted), sae.cfg.d_sae, dtype=torch.float64, device=rows.device)
        for where, feature_acts in encode(rows):
            sums.index_add_(0, owner[where], feature_acts.double())
        counts = batch.counted.sum(1).to(sums.device)
        found.append((sums / counts.clamp(min=1)[:, None])[counts > 0].cpu())
    if not found:
        raise FeatclError("feature drift: the background texts hold no token")
    return torch.cat(found)


def _noise_floor(pooled: Float[Tensor, "both d_sae"], n: int, generator: torch.Generator) -> Float[Tensor, " d_sae"]:
    """c · s √(2/n), see `feature_drift`; 0 for a feature that never varies."""
    error = pooled.std(0) * (2 / n) ** 0.5
    varies = error > 0
    if not bool(varies.any()):
        return error
    rows, scale = pooled[:, varies], error[varies]
    largest = torch.cat(
        [((left - right) @ rows / n / scale).abs().amax(1) for left, right in _draws(len(pooled), n, generator)]
    )
    return float(largest.quantile(0.95)) * error


def _draws(total: int, n: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """How often each of `total` rows is in each of two samples of n, drawn with replacement; some draws at a time."""
    for _ in range(0, DRAWS, 50):
        yield _counts(total, n, generator), _counts(total, n, generator)


def _counts(total: int, n: int, generator: torch.Generator) -> Float[Tensor, "draws rows"]:
    drawn = torch.randint(total, (50, n), generator=generator)
    return torch.zeros(50, total, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(50, n, dtype=torch.float64))


def _paired_interval(
    differences: Float[Tensor, "windows features"], generator: torch.Generator
) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"]]:
    n = len(differences)
    if differences.shape[1] == 0:
        return differences[0], differences[0]
    means = torch.cat([_counts(n, n, generator) @ differences / n for _ in range(0, DRAWS, 50)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=0)
    return low, high


# --- does the SAE still fit ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validity:
    """An SAE, measured on a model whose update was scaled.

    Attributes:
        scale: Of the update; 0 is the base model, 1 the adapted one.
        delta_norm: ‖ΔW‖ at this scale.
        health: FVU, L0, loss recovered and the rest.
    """

    scale: float
    delta_norm: float
    health: SAEHealth


def sae_validity(
    sae: Any,
    adapter: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    scales: Sequence[float] = (0.0, 1.0),
    max_tokens: int = 4096,
) -> tuple[Validity, ...]:
    """Whether an SAE that was trained on the base model still describes the adapted one, as ‖ΔW‖ grows.

    A feature table or a constraint means what it says only where the SAE reconstructs what the model computes: FVU that
    rises and loss recovered that falls with the scale are the limit of the interpretation, not of the model.

    Args:
        sae: A `sae_lens.SAE` of the base model.
        adapter: A `ConstrainedAdapter`; it is left as it was.
        tokenizer: Its tokenizer.
        texts: Of the kind that the SAE was trained on.
        scales: Of the update, in the order of the result.
        max_tokens: Tokens that are read at each scale.

    Raises:
        FeatclError: As `featcl.check_sae`, but a bad fit is reported and never an error; or for an update that cannot
            be scaled.
    """
    found = []
    for scale in scales:
        if scale == 1.0:
            health = check_sae(sae, adapter.model, tokenizer, texts, max_tokens=max_tokens, strict=False)
            found.append(Validity(scale, adapter.delta_norm(), health))
            continue
        with scaled(adapter, scale):
            health = check_sae(sae, adapter.model, tokenizer, texts, max_tokens=max_tokens, strict=False)
            found.append(Validity(scale, adapter.delta_norm(), health))
    return tuple(found)
