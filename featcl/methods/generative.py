"""Generative replay: before a task the learner writes conversations by itself, which it rehearses during the task.

    D ← n conversations of the present weights        at the start of each task, or every so many updates
    loss = L(new) + s / (1 − s) · mean over the drawn of L(D_i)

Nothing of the stream is kept: what was learned before is in what the learner writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.conversing import converse
from featcl.methods.method import Cost, Method, View
from featcl.methods.replay import check_share
from featcl.methods.tokens import again, tokens_read
from featcl.objectives.experience import Experience
from featcl.streams.trajectory import Trajectory

TRIES = 4  # rounds of writing, where some conversations come out empty


class GenerativeReplay(Method):
    """Rehearses what the learner itself wrote before the task.

    Args:
        samples: Conversations written each time.
        share: Share of the update that is replay, in (0, 1).
        count: How many of them are drawn per update.
        every: Write anew after so many updates also; None: at the start of a task only.
        max_new_tokens: Longest turn.
        temperature: Of what is written.

    Raises:
        FeatclError: For a number out of range; or, when it writes, if nothing comes out.

    Source: Sun et al. 2020, LAMOL, arXiv:1909.03329, section 3.2 (a language model that writes its own rehearsal,
    prompted by the opening alone); for chat models, Xu et al. 2024, Magpie, arXiv:2406.08464.
    """

    name = "generative_replay"

    def __init__(
        self,
        *,
        samples: int = 64,
        share: float = 0.5,
        count: int = 1,
        every: int | None = None,
        max_new_tokens: int = 48,
        temperature: float = 1.0,
    ) -> None:
        checks.count(self.name, samples=samples, count=count, every=every, max_new_tokens=max_new_tokens)
        checks.positive(self.name, temperature=temperature)
        self.samples, self.share, self.count, self.every = samples, check_share(self.name, share), count, every
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self._written: tuple[Trajectory, ...] = ()
        self._rounds = self._since = self._forward = self._backward = 0

    @property
    def written(self) -> tuple[Trajectory, ...]:
        """What is rehearsed now."""
        return self._written

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Write."""
        self._write_(view)

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """Some of what was written, each with its weight."""
        generator = view.generator(f"generative/{experience.trajectory.id}")
        places = torch.randperm(len(self._written), generator=generator)[: self.count].tolist()
        each = self.share / (1.0 - self.share) / max(1, len(places))
        found = [again(self._written[place], view, weight=each, purpose="generative") for place in places]
        read = sum(tokens_read(rehearsed.batches) for rehearsed in found)
        self._forward, self._backward = self._forward + read, self._backward + read
        return found

    def after_update_(self, experience: Experience, view: View) -> None:
        """Write anew, if it is time."""
        self._since += 1
        if self.every is not None and self._since >= self.every:
            self._write_(view)

    def _write_(self, view: View) -> None:
        """`samples` conversations; where some come out empty, it goes on for a few rounds."""
        found: list[Trajectory] = []
        for attempt in range(TRIES):
            written = converse(
                view.student,
                [None] * (self.samples - len(found)),
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                generator=view.generator(f"generative/write/{self._rounds}/{attempt}"),
            )
            self._forward += written.tokens
            for messages in written.conversations:
                id = f"written/{self._rounds}/{len(found)}"
                found.append(Trajectory(id, source="self", task="written", messages=messages))
            if len(found) == self.samples:
                break
        if not found:
            raise FeatclError("generative_replay: the model writes nothing after the opening of a conversation")
        self._written, self._rounds, self._since = tuple(found), self._rounds + 1, 0

    def cost(self) -> Cost:
        """What was written, as JSON; writing and rehearsing."""
        stored = sum(len(json.dumps(each.to_record())) for each in self._written)
        return Cost(stored, self._forward, self._backward)

    def state(self) -> dict[str, Any]:
        """What was written, and counters."""
        counters = [self._rounds, self._since, self._forward, self._backward]
        return {"written": [each.to_record() for each in self._written], "counters": counters}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._written = tuple(Trajectory.from_record(record) for record in state["written"])
        self._rounds, self._since, self._forward, self._backward = state["counters"]
