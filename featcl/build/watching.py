"""What watches the learner of a config: the weigher, the denoising measurement, the guard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featcl.build.files import paths_of
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.material import Material, split_background, suite_columns
from featcl.evaluation.pool import item_pool, lab_items, text_pool
from featcl.features import Directions, load_sae, random_features
from featcl.learning.denoising import Denoising
from featcl.learning.guard import CanaryGuard
from featcl.learning.weighing import SignalWeigher, check_priors
from featcl.streams import Chat, Trajectory
from featcl.tracking.progress import say

SPAN_SEED = 100_003  # the random features that denoising is compared with; `basis: random_features` has the run's seed
GUARD_POOL_SEED = 20_011  # of the items that the guard draws from; the suites of R have another


def weigher_of(config: RunConfig, material: Material, memory: Any = None) -> SignalWeigher | None:
    """Says how far an experience is trusted; `memory` is what the signal of that name asks."""
    wanted = config.learner.weighing
    if wanted is None:
        return None
    taught = [trajectory for task in material.tasks for trajectory in task.trajectories]
    sources = {each.source for each in taught if isinstance(each, Trajectory)} or {str(config.stream.name)}
    complete = config.stream.limit is None or config.stream.name is None
    if note := check_priors(wanted.priors, sources, complete=complete):
        say(note)
    return SignalWeigher(wanted.signals, priors=wanted.priors, memory=memory, quarantine_below=wanted.quarantine_below)


def denoising_of(
    config: RunConfig, model: Any, tokenizer: Any, material: Material,
    directions: Directions | Mapping[int, Directions],
) -> Denoising | None:  # fmt: skip
    """Measures the projection against as many random features of the same SAEs."""
    wanted = config.learner.denoising
    if wanted is None:
        return None
    if not material.heldout:
        raise FeatclError(f"learner.denoising: the stream {config.stream.name} has no held-out trajectories")
    spans = _random_spans(config, model, tokenizer, directions, count=wanted.spans)
    return Denoising(spans, material.heldout, every=wanted.every, size=wanted.heldout)


def _random_spans(
    config: RunConfig, model: Any, tokenizer: Any, directions: Directions | Mapping[int, Directions], *, count: int
) -> list[Any]:
    """As many other features of the same SAE, or of each, drawn `count` times."""
    first = SPAN_SEED * (config.seed + 1)

    def draw(source: str, chosen: Directions) -> list[Directions]:
        sae = load_sae(source, device=model.device, model=model, tokenizer=tokenizer, check=False)
        return [random_features(chosen, sae, model, seed=seed) for seed in range(first, first + count)]

    sources = config.features.sae
    if isinstance(sources, str):
        assert isinstance(directions, Directions)
        return draw(sources, directions)
    assert isinstance(directions, Mapping)
    drawn = {layer: draw(sources[layer], chosen) for layer, chosen in directions.items()}
    return [{layer: spans[number] for layer, spans in drawn.items()} for number in range(count)]


def guard_of(config: RunConfig, model: Any, chat: Chat) -> CanaryGuard | None:
    """The alarm on forgetting; its pool is of the laboratory's general suite, or of held-out background text."""
    wanted = config.learner.guard
    if wanted is None:
        return None
    if config.model.startswith("lab/"):
        scored = [item for items in suite_columns(config.evaluation.suites).values() for item in items]
        items = lab_items(wanted.pool, seed=GUARD_POOL_SEED, without=scored)
        pool = item_pool(model, chat, items, measure=wanted.measure or "reply")
    else:
        blocks = [block for path in paths_of(config.features.background) for block in split_background(path)[1]]
        if wanted.measure not in (None, "tokens"):
            raise FeatclError(f"learner.guard.measure {wanted.measure} needs the laboratory's items; text has tokens")
        pool = text_pool(model, chat, blocks, count=wanted.pool)
    return CanaryGuard(pool, seed=config.seed, **wanted.model_dump(exclude={"pool", "measure"}))
