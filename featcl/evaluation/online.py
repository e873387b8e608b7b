"""Through the stream: how well each experience was predicted before it was learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from featcl.errors import FeatclError
from featcl.evaluation.intervals import LEVEL, RESAMPLES, Interval, block_bootstrap_mean

# What the record of an experience says of it, measured before it was learned from.
SCORE, NLL, TOKENS, BASE_NLL = "online/score", "online/nll", "online/tokens", "online/base_nll"
EXPERIENCES = ("update", "quarantined", "postponed")  # kinds of their records, whatever was learned from them


@dataclass(frozen=True)
class OnlineAccuracy:
    """Accuracy on each experience before learning it.

    Attributes:
        mean: Over the stream, with an interval from resampled blocks of neighbours.
        so_far: After each experience, the mean up to it.
        recent: After each experience, the mean of the last ones.
    """

    mean: Interval
    so_far: tuple[float, ...]
    recent: tuple[float, ...]


@dataclass(frozen=True)
class CodeLength:
    """What the stream costs when each experience is coded by the model that has learned from those before it.

    Attributes:
        bits: Of the whole stream.
        tokens: Coded.
        per_token: bits / tokens.
        base_bits: The same with the base model, which does not learn; NaN where it was not measured.
        saved: 1 - bits / base_bits.
        so_far: Bits up to and with each experience.
    """

    bits: float
    tokens: int
    per_token: float
    base_bits: float
    saved: float
    so_far: tuple[float, ...]


def online_accuracy(
    scores: Sequence[float] | Float[np.ndarray, " time"],
    *,
    window: int = 50,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> OnlineAccuracy:
    """(1/T) Σ_t score of the model after t - 1 experiences on experience t.

    It rewards following a stream whose neighbours are alike, and says nothing of what is kept: read it beside R.

    Args:
        scores: Of each experience before its update, in order; NaN where it was not measured.
        window: Experiences that count as recent.
        resamples: Of the bootstrap.
        level: Coverage.
        seed: Of the draws.

    Source: Cai, Sener & Koltun 2021, arXiv:2108.09020, section 3; the warning: Al Kader Hammoud et al. 2023,
    arXiv:2305.09275.
    """
    values = np.asarray(scores, dtype=float)
    if window < 1:
        raise FeatclError(f"window is {window}; it is at least 1 experience")
    known, filled = (~np.isnan(values)).astype(float), np.nan_to_num(values)
    total, count = np.cumsum(filled), np.cumsum(known)
    late = [np.concatenate([sums[:window], sums[window:] - sums[:-window]]) for sums in (total, count)]
    return OnlineAccuracy(
        mean=block_bootstrap_mean(values, resamples=resamples, level=level, seed=seed),
        so_far=_shares(total, count),
        recent=_shares(*late),
    )


def code_length(
    nll: Sequence[float] | Float[np.ndarray, " time"],
    tokens: Sequence[int] | Float[np.ndarray, " time"],
    *,
    base_nll: Sequence[float] | Float[np.ndarray, " time"] | None = None,
) -> CodeLength:
    """Prequential code length: Σ_t -log2 p(experience t | model after t - 1 experiences).

    Args:
        nll: Nats per target token of each experience before its update.
        tokens: Target tokens of each experience.
        base_nll: The same of the base model.

    Raises:
        FeatclError: If the lengths differ, or something is missing or negative: a code without a part is no code.

    Source: Dawid 1984, J. R. Stat. Soc. A 147(2); Blier & Ollivier 2018, arXiv:1802.07044.
    """
    nats = _costs(nll, tokens, "nll")
    bits = nats / math.log(2)
    total, count = float(bits.sum()), int(np.sum(np.asarray(tokens)))
    base = math.nan if base_nll is None else float(_costs(base_nll, tokens, "base_nll").sum()) / math.log(2)
    return CodeLength(
        bits=total,
        tokens=count,
        per_token=total / count if count else math.nan,
        base_bits=base,
        saved=1 - total / base if base else math.nan,
        so_far=tuple(np.cumsum(bits).tolist()),
    )


def online_records(records: Sequence[Mapping[str, Any]], name: str) -> Float[np.ndarray, " time"]:
    """One number of every record of an experience that has it (`online/…`), in order; null is NaN.

    Args:
        records: Of metrics.jsonl.
        name: `online/score`, `online/nll`, `online/tokens` or `online/base_nll`.
    """
    found = [record[name] for record in records if record.get("kind") in EXPERIENCES and name in record]
    return np.array([math.nan if value is None else float(value) for value in found])


def _shares(total: np.ndarray, count: np.ndarray) -> tuple[float, ...]:
    return tuple(np.where(count > 0, total / np.maximum(count, 1), np.nan).tolist())


def _costs(nll: Sequence[float] | np.ndarray, tokens: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
    rate, count = np.asarray(nll, dtype=float), np.asarray(tokens, dtype=float)
    if rate.shape != count.shape:
        raise FeatclError(f"{name}: {len(rate)} experiences, but the tokens of {len(count)}")
    costs = rate * count
    bad = np.flatnonzero(~(costs >= 0))
    if bad.size:
        raise FeatclError(f"{name}: experience {bad[0]} costs {costs[bad[0]]:g} nats; each needs 0 or more")
    return costs
