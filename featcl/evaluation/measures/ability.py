"""General ability beside the suites: perplexity of frozen text, and lm-evaluation-harness in its tiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcl.evaluation.harness import HarnessTier, evaluate_harness, require_tasks
from featcl.evaluation.measures.measure import Measure, Place, Reading
from featcl.evaluation.perplexity import check_window, text_perplexity
from featcl.files import digest_bytes


class PerplexityMeasure(Measure):
    """Frozen texts in bits per byte.

    Args:
        model: The model, adapted or not.
        tokenizer: Its tokenizer.
        texts: Name -> documents.
        context, stride: As in `text_perplexity`.

    Raises:
        FeatclError: If context or stride do not fit the model.
    """

    name = "perplexity"

    def __init__(
        self, model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], *, context: int | None, stride: int | None
    ) -> None:
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.context, self.stride = check_window(model, context, stride)

    def at_row(self, place: Place) -> Reading:
        record: dict[str, float] = {}
        for name, texts in self.texts.items():
            found = text_perplexity(self.model, self.tokenizer, texts, context=self.context, stride=self.stride)
            record |= found.record(name)
        return Reading(record)


class HarnessMeasure(Measure):
    """What lm-evaluation-harness asks: every tier of the base model, `quick` after each task, `full` after the last.

    Args:
        adapter: A `ConstrainedAdapter` on the model, which is asked as it stands.
        tokenizer: The model's.
        tiers: Of `smoke`, `quick` and `full`, those that are wanted.
        include: A folder with YAML tasks of one's own.
        cache: Where results are kept by the digest of the model; None: nowhere, as with a memory on the model.
        batch_size: Sequences per forward.

    Raises:
        FeatclError: If lm-eval is not installed, or has no such task.
    """

    name = "harness"

    def __init__(
        self, adapter: Any, tokenizer: Any, tiers: Sequence[HarnessTier], *, include: str | None = None,
        cache: Path | None = None, batch_size: int = 16,
    ) -> None:  # fmt: skip
        self.adapter, self.tokenizer = adapter, tokenizer
        self.tiers = {tier.name: tier for tier in tiers}
        self.include, self.cache, self.batch_size = include, cache, batch_size
        require_tasks([task for tier in tiers for task in tier.tasks], include)

    def at_row(self, place: Place) -> Reading:
        wanted = ("smoke", "quick", "full") if place.first else ("quick", "full") if place.last else ("quick",)
        return Reading({name: value for tier in wanted for name, value in self.ask(tier).items()})

    def ask(self, tier: str) -> dict[str, float]:
        """One tier now; nothing where it is not wanted."""
        if tier not in self.tiers:
            return {}
        found = evaluate_harness(
            self.adapter.model,
            self.tokenizer,
            self.tiers[tier],
            include=self.include,
            cache=self.cache,
            state=self._moved() if self.cache is not None else None,
            batch_size=self.batch_size,
        )
        return found.record()

    def _moved(self) -> str | None:
        """Digest of the update, for kinds of which the harness's own cannot be made; None for the base model."""
        if not self.adapter.delta_norm():
            return None
        parts = sorted(self.adapter.coordinates().items())
        tensors = [(name, value.detach().float().cpu().contiguous().numpy()) for name, value in parts]
        return digest_bytes(b"".join(f"{name} {value.shape}".encode() + value.tobytes() for name, value in tensors))
