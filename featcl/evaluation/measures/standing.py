"""What is looked at in every run: how far the update leaks out of its span, and what the model says now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from featcl.evaluation.measures.measure import Measure, Place, Reading
from featcl.evaluation.samples import COLUMNS, sample_completions, sample_prompts
from featcl.features.tokens import Text, token_batches, token_windows
from featcl.streams import Chat, Trajectory

PROBE_TOKENS = 128  # of each text on which the leak is measured


class LeakMeasure(Measure):
    """What the update writes outside the chosen span, on texts of the calibration split.

    Args:
        adapter: A `ConstrainedAdapter`; one without a span has no leak.
        tokenizer: The model's.
        texts: Where it is measured.
    """

    name = "leak"

    def __init__(self, adapter: Any, tokenizer: Any, texts: Sequence[Text]) -> None:
        self.adapter, self.tokenizer, self.texts = adapter, tokenizer, texts

    def at_row(self, place: Place) -> Reading:
        found = self.report()
        return Reading() if found is None else Reading({"constraint/leak": found["leak"]})

    def report(self) -> dict[str, float] | None:
        """`leak`, `rescale` and `total_change_outside`; None without a span."""
        if not self.adapter.spans():
            return None
        windows = [list(token_windows(self.tokenizer, [text], context=PROBE_TOKENS))[:1] for text in self.texts]
        batch = next(iter(token_batches([first for found in windows for first in found], self.tokenizer)))
        batch = batch.to(self.adapter.model.device)
        found = self.adapter.leak(batch.input_ids, batch.attention_mask)
        return {name: getattr(found, name) for name in ("leak", "rescale", "total_change_outside")}


class SampleMeasure(Measure):
    """Replies to a few held-out prompts, kept as a table with the KL of each token to the base model.

    Args:
        adapter: A `ConstrainedAdapter`.
        chat: The chat form of the model's tokenizer.
        heldout: Task -> trajectories that are never learned from; the first has the prompts of other rows.
        count: Replies of a row.
        generator: Row -> what its replies are drawn with.
    """

    name = "samples"

    def __init__(
        self, adapter: Any, chat: Chat, heldout: Mapping[str, Sequence[Trajectory]], *, count: int,
        generator: Callable[[str], torch.Generator],
    ) -> None:  # fmt: skip
        self.adapter, self.chat, self.heldout, self.count = adapter, chat, heldout, count
        self.generator = generator
        self.rows: list[list[Any]] = []

    def at_row(self, place: Place) -> Reading:
        asked = self.heldout.get(place.row) or next(iter(self.heldout.values()), ())
        prompts = sample_prompts(self.chat, asked, self.count)
        drawn = sample_completions(self.adapter, self.chat, prompts, generator=self.generator(place.row))
        if not drawn:
            return Reading()
        self.rows += [sample.row(place.row) for sample in drawn]
        mean = sum(sample.mean_kl for sample in drawn) / len(drawn)
        return Reading({"samples/mean_kl": mean}, {"samples": (COLUMNS, list(self.rows))})

    def resume_(self, rows: Sequence[str], table: Callable[[str], list[list[Any]]]) -> None:
        self.rows = [row for row in table("samples") if row[0] in rows]
