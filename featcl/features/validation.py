"""Whether chosen directions do anything: steer with each, and compare with random directions of equal norm.

At the output of the block, h ← h + s · m · d on every counted token: d a unit direction, m the mean norm of the
residual stream there, s the strength. With ℓ(text) the mean log-likelihood per token, the effect of a direction is

    E = mean over positive texts of (ℓ_steered − ℓ) − mean over negative texts of (ℓ_steered − ℓ)

(without negative texts the first mean alone), in nats per token: does steering make the target texts likelier, more
than the others? Any push into the stream changes ℓ, so E means something only against random directions. A bootstrap
draw resamples the texts of both sides and draws one of the random directions; its excess is E − E_random on the same
texts. The interval of the excess therefore covers how random directions differ among each other, too: a direction has
an effect if, at one of the strengths, the whole interval lies above zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features.controls import random_directions
from featcl.features.directions import Directions
from featcl.features.steering import Score, SteeredTexts
from featcl.features.tokens import Text, texts_digest

LEVEL = 0.95
DRAWS = 1000


@dataclass(frozen=True)
class Effect:
    """What one direction does at one strength.

    Attributes:
        feature: Its id.
        label: Its name, or its id.
        strength: In mean norms of the residual stream.
        effect: E, nats per token.
        excess: E minus the mean E of the random directions at this strength.
        low, high: 95 % interval of the excess over one random direction.
    """

    feature: int
    label: str
    strength: float
    effect: float
    excess: float
    low: float
    high: float


@dataclass(frozen=True)
class Validation:
    """Effects of directions on a target score, beside those of random directions of equal norm.

    Attributes:
        effects: Per direction and strength, directions first.
        random: Per strength, E of every random direction.
        strengths: In mean norms of the residual stream.
        feature_ids: Of the directions, in their order.
        effective: Per direction, whether it has an effect.
        norm: Mean norm of the residual stream at the hook.
        texts: How many positive and negative texts.
        data: Digests of those texts.
    """

    effects: tuple[Effect, ...]
    random: tuple[tuple[float, ...], ...]
    strengths: tuple[float, ...]
    feature_ids: tuple[int, ...]
    effective: tuple[bool, ...]
    norm: float
    texts: tuple[int, int]
    data: dict[str, str]

    def best(self, feature: int) -> Effect:
        """The strength at which a direction exceeds the random ones most clearly."""
        return max((effect for effect in self.effects if effect.feature == feature), key=lambda effect: effect.low)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def mark(self, directions: Directions) -> Directions:
        """The same directions with the finding in `manifest["validation"]`, those without effect named.

        Raises:
            FeatclError: If these are not the directions that were validated.
        """
        if directions.feature_ids != self.feature_ids:
            raise FeatclError("this validation is of other directions")
        without = [feature for feature, works in zip(self.feature_ids, self.effective, strict=True) if not works]
        finding = {
            "without_effect": without,
            "best": [asdict(self.best(feature)) for feature in self.feature_ids],
            "random": {f"{s:g}": list(values) for s, values in zip(self.strengths, self.random, strict=True)},
            "data": self.data,
        }
        return replace(directions, manifest={**directions.manifest, "validation": finding})

    def __str__(self) -> str:
        lines = [
            f"{sum(self.effective)} of {len(self.effective)} directions have an effect beyond random ones "
            f"({self.texts[0]} positive, {self.texts[1]} negative texts, {len(self.random[0])} random directions, "
            f"nats per token, residual norm {self.norm:.3g})",
            f"{'direction':>24} {'strength':>8} {'effect':>9} {'excess':>9}  {'95 % interval':<21}",
        ]
        for feature, works in zip(self.feature_ids, self.effective, strict=True):
            one = self.best(feature)
            lines.append(
                f"{one.label[:24]:>24} {one.strength:>8.3g} {one.effect:>+9.4f} {one.excess:>+9.4f}  "
                f"[{one.low:+.4f}, {one.high:+.4f}]{'' if works else '  no effect'}"
            )
        return "\n".join(lines)


def validate(
    directions: Directions,
    model: Any,
    tokenizer: Any,
    *,
    positive: Sequence[Text],
    negative: Sequence[Text] | None = None,
    strengths: Sequence[float] = (0.1, 0.25, 0.5),
    seeds: Sequence[int] = tuple(range(40)),
    score: Score | None = None,
    batch_tokens: int = 2048,
) -> Validation:
    """Steer with each direction and with random ones, and report the effect on the target texts.

    Args:
        directions: What to validate, at the output of their block.
        model: The causal LM; not changed.
        tokenizer: Its tokenizer.
        positive: Target texts (held out of the selection, to mean anything); the first window of each counts.
        negative: Texts that should not become likelier.
        strengths: Lengths of the push, in mean norms of the residual stream.
        seeds: One random direction for each; 40 let one of them fill the tail of a 95 % interval.
        score: Of a text, `score(logits, batch)`; by default its mean log-likelihood per token, ℓ above.
        batch_tokens: Most positions in one forward.

    Raises:
        FeatclError: For fewer than two texts on a side, or texts without a token to predict.
    """
    sides = [list(positive), list(negative or [])]
    if len(sides[0]) < 2 or len(sides[1]) == 1:
        raise FeatclError("validation needs two or more positive texts, and none or two or more negative ones")
    if not strengths or not seeds:
        raise FeatclError("validation needs at least one strength and one seed")
    texts = SteeredTexts(
        model, tokenizer, [*sides[0], *sides[1]], layer=directions.layer, score=score, batch_tokens=batch_tokens
    )
    is_positive = torch.arange(len(sides[0]) + len(sides[1])) < len(sides[0])
    controls = torch.cat([random_directions(_first(directions), seed=seed).vectors for seed in seeds])
    effects: list[Effect] = []
    random: list[tuple[float, ...]] = []
    level = 1 - (1 - LEVEL) / len(strengths)  # over all strengths together
    for strength in strengths:
        steered, chance = (texts.changes(rows, strength) for rows in (directions.vectors, controls))
        means = _effects(chance, is_positive)
        random.append(tuple(means.tolist()))
        low, high = _intervals(steered, chance, is_positive, level=level)
        effect = _effects(steered, is_positive)
        rows = zip(effect.tolist(), (effect - means.mean()).tolist(), low.tolist(), high.tolist(), strict=True)
        effects += [
            Effect(feature, label, float(strength), *numbers)
            for feature, label, numbers in zip(directions.feature_ids, directions.labels, rows, strict=True)
        ]
    works = {feature: any(e.low > 0 for e in effects if e.feature == feature) for feature in directions.feature_ids}
    return Validation(
        effects=tuple(sorted(effects, key=lambda e: directions.feature_ids.index(e.feature))),
        random=tuple(random),
        strengths=tuple(float(strength) for strength in strengths),
        feature_ids=directions.feature_ids,
        effective=tuple(works.values()),
        norm=texts.norm,
        texts=(len(sides[0]), len(sides[1])),
        data={name: texts_digest(texts) for name, texts in zip(("positive", "negative"), sides, strict=True) if texts},
    )


def _first(directions: Directions) -> Directions:
    """One of the directions: what a single random one stands in for."""
    return Directions.from_vectors(directions.vectors[:1], layer=directions.layer, hook_name=directions.hook_name)


def _effects(changes: Float[Tensor, "k texts"], is_positive: Bool[Tensor, " texts"]) -> Float[Tensor, " k"]:
    """E of each direction."""
    effect = changes[:, is_positive].mean(dim=1)
    return effect if bool(is_positive.all()) else effect - changes[:, ~is_positive].mean(dim=1)


def _intervals(
    steered: Float[Tensor, "k texts"],
    chance: Float[Tensor, "m texts"],
    is_positive: Bool[Tensor, " texts"],
    *,
    level: float,
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Bootstrap interval of the excess: texts resampled within each side, a random direction drawn each time."""
    generator = torch.Generator().manual_seed(0)
    excess = []
    for drawn in _resamples(is_positive, generator):
        other = int(torch.randint(len(chance), (1,), generator=generator))
        both = torch.cat([steered, chance[other : other + 1]])[:, drawn]
        effects = _effects(both, is_positive)
        excess.append(effects[:-1] - effects[-1])
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.stack(excess).quantile(bounds, dim=0)
    return low, high


def _resamples(is_positive: Bool[Tensor, " texts"], generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of texts, as many of each side as there are, positive ones first."""
    sides = [is_positive.nonzero()[:, 0], (~is_positive).nonzero()[:, 0]]
    for _ in range(DRAWS):
        yield torch.cat(
            [side[torch.randint(len(side), (len(side),), generator=generator)] for side in sides if len(side)]
        )
