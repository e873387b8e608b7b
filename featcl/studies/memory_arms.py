"""What the arms of the memory study do: a memory that is trained, the same model without one, a LoRA on the same text.

A test is a long conversation whose facts no training saw; it counts as right when the greedy reply to its question is
the right one, word for word, its end included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from featcl.adapters import constrain
from featcl.build import apply_runtime
from featcl.build.directions import directions_of
from featcl.build.longtexts import in_windows, long_texts
from featcl.build.memory import memory_of
from featcl.build.stream import material_of
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.features import Directions
from featcl.lab.long import LongConversation, Part, long_conversations
from featcl.learning import Learner
from featcl.learning.learner import LONGEST
from featcl.learning.longread import Readings, read_texts
from featcl.learning.longtext import LongBatch, LongText
from featcl.learning.memorizing import MemoryTraining
from featcl.models import load_model, max_context, model_digest
from featcl.objectives.scoring import Scorer, TokenBatch
from featcl.streams import Chat, Trajectory
from featcl.subspace import Subspace

GAPS = (1, 2, 3, 8, 24)  # exchanges between what is told and what is asked
TAUGHT = (1, 2, 3)  # gaps of the texts that memories are trained on, all within the full context's reach
LORA_RATES, LORA_STEPS, LORA_TUNING = (3e-3, 1e-2, 3e-2), (4, 16), 12
LOSSES = 50  # steps whose mean loss is one point of the training curve
LAST = "window_"


@dataclass(frozen=True)
class ArmResult:
    """One arm under one seed.

    Attributes:
        right: Gap -> of each test, whether the reply was right.
        measures: What else was measured; `closed` is the share of the divergence to the full context that is gone.
        numbers: How many numbers hold what was told (a memory's state, a LoRA's factors), and how many were trained.
        settings: What was chosen for it, where something was.
        seconds: Wall clock.
    """

    right: Mapping[int, Sequence[bool]]
    measures: Mapping[str, float] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def tests_of(items: int) -> dict[int, list[LongConversation]]:
    """The same test conversations for every arm and seed, by gap."""
    return {gap: _drawn("test", "heldout", gap, items) for gap in GAPS}


def _drawn(seed: str, part: Part, gap: int, count: int) -> list[LongConversation]:
    return list(islice(long_conversations(seed, part=part, between=(gap, gap), asked=1), count))


class Bench:
    """One lab model and the tests, for one arm after the other.

    Args:
        config: Of the study's base arm: model and runtime.
        items: Tests of each gap.
    """

    def __init__(self, config: RunConfig, *, items: int) -> None:
        if not config.model.startswith("lab/"):
            raise FeatclError(f"the memory study asks what is true in the laboratory's worlds, not {config.model}")
        apply_runtime(config)
        self.model, self.tokenizer = load_model(config.model, dtype="float32", device=config.runtime.device)
        self.model.requires_grad_(False)
        self.chat, self.scorer = Chat(self.tokenizer), Scorer(self.model)
        self.tests = tests_of(items)
        self.texts = {gap: [in_windows(each, self.chat) for each in group] for gap, group in self.tests.items()}

    # --- memories

    def trained(self, config: RunConfig) -> ArmResult:
        """A memory, trained as the config says, then tested with empty state on every conversation."""
        start = time.perf_counter()
        attached = memory_of(config, self.model, self._chosen(config))
        assert attached is not None
        try:
            losses = self._train_(config, attached)
            found = self._read(attached)
        finally:
            attached.detach()
        curve = {f"train_kl/{(n + 1) * LOSSES}": sum(part) / len(part) for n, part in enumerate(_parts(losses))}
        return _result(found, "memory", attached, start, curve)

    def _train_(self, config: RunConfig, attached: Any) -> list[float]:
        wanted = None if config.memory is None else config.memory.train
        if wanted is None:
            return []
        texts = long_texts(config, wanted, self.chat, unseen=frozenset())
        training = MemoryTraining(
            attached, self.scorer, texts, steps=wanted.steps, lr=wanted.lr, gate_only=wanted.gate_only
        )
        return [training.step_().loss for _ in range(wanted.steps)]

    def readers(self, config: RunConfig) -> dict[str, ArmResult]:
        """The model without memory that reads one window at a time, or all of them; and a memory before training."""
        start = time.perf_counter()
        attached = memory_of(config, self.model, self._chosen(config))
        try:
            found = self._read(attached)
        finally:
            assert attached is not None
            attached.detach()
        names = {"truncated": "truncated", "full": "full", "memory": "untrained"}
        return {name: _result(found, reader, attached, start) for reader, name in names.items()}

    def held(self, config: RunConfig) -> int:
        """How many numbers the state of the config's memory has, without its open chunk."""
        attached = memory_of(config, self.model, self._chosen(config))
        assert attached is not None
        attached.detach()
        return _held(attached)

    def _read(self, attached: Any) -> dict[int, Readings]:
        return {gap: read_texts(self.scorer, attached, texts) for gap, texts in self.texts.items()}

    def _chosen(self, config: RunConfig) -> Directions | Mapping[int, Directions] | None:
        """The chosen features, where the memory is made of them."""
        if config.memory is None or config.memory.kind != "features":
            return None
        length = min(max_context(self.model), LONGEST)
        material = material_of(config, self.model, self.chat, length=length, quarantine=None)
        return directions_of(config, self.model, self.tokenizer, material, model_digest(self.model))[1]

    # --- a LoRA on the same text

    def lora(self, seed: int, *, numbers: int) -> ArmResult:
        """A LoRA of about as many numbers as a memory's state: for each test, updated on what was told, then asked.

        Rate and steps are those that are best on conversations that memories are trained on.

        Args:
            seed: Of its random factors.
            numbers: Of the state that it is compared with.
        """
        start = time.perf_counter()
        per_rank = 2 * self._writer_sizes()
        rank = max(1, round(numbers / per_rank))
        layers = list(range(self.model.config.num_hidden_layers))
        width, last = self.model.config.hidden_size, layers[-1]
        some = Directions.from_vectors(Subspace.random(width, rank, seed=0).basis.T, layer=last)  # says how many
        adapter = constrain(
            self.model, some, kind="none", rank=rank, layers=layers, modules=("o_proj", "down_proj"), seed=seed
        )
        try:
            rate, steps = self._tuned(adapter, seed)
            right = {
                gap: self._told_then_asked(adapter, group, self.texts[gap], rate, steps, seed)
                for gap, group in self.tests.items()
            }
            held = sum(parameter.numel() for parameter in adapter.parameters())
        finally:
            adapter.remove()
        return ArmResult(
            right, numbers={"held": held, "trained": 0}, settings={"lr": rate, "steps": steps, "rank": rank},
            seconds=time.perf_counter() - start,
        )  # fmt: skip

    def _writer_sizes(self) -> float:
        """Half the numbers of one rank on all writers: mean of rows and columns, over modules and layers."""
        shapes = [
            module.weight.shape for name, module in self.model.named_modules()
            if name.rpartition(".")[2] in ("o_proj", "down_proj")
        ]  # fmt: skip
        return sum(sum(shape) for shape in shapes) / 2

    def _tuned(self, adapter: Any, seed: int) -> tuple[float, int]:
        group = _drawn("tuning", "train", 2, LORA_TUNING)
        texts = [in_windows(each, self.chat) for each in group]

        def score(choice: tuple[float, int]) -> int:
            return sum(self._told_then_asked(adapter, group, texts, *choice, seed))

        return max(((rate, steps) for steps in LORA_STEPS for rate in LORA_RATES), key=score)

    def _told_then_asked(
        self, adapter: Any, group: Sequence[LongConversation], texts: Sequence[LongText], lr: float, steps: int,
        seed: int,
    ) -> list[bool]:  # fmt: skip
        learner = Learner(
            self.model, self.tokenizer, adapter, objective="sft", mask="all", lr=lr, steps=steps, seed=seed
        )
        right = []
        for number, (conversation, text) in enumerate(zip(group, texts, strict=True)):
            told = tuple(conversation.messages(len(conversation.windows) - 1))
            learner.observe(Trajectory(f"told-{number}", source="study", task="told", messages=told))
            right += answered(self.scorer, [text])
            learner.rollback(0)
        return right


@torch.no_grad()
def answered(scorer: Scorer, texts: Sequence[LongText]) -> list[bool]:
    """Whether the model that reads the last windows alone makes every target there most likely."""
    batch = LongBatch.of([LongText(text.windows[-1:]) for text in texts], device=scorer.device)
    [window] = batch.windows
    hidden = scorer.hidden(TokenBatch(batch.whole, window.within, window.targets))
    wrong = set(window.rows[scorer.head(hidden).argmax(-1) != window.targets].tolist())
    return [row not in wrong for row in range(len(texts))]


def _result(
    found: Mapping[int, Readings], reader: str, attached: Any, start: float, more: Mapping[str, float] | None = None
) -> ArmResult:
    total = Readings()
    for gap in TAUGHT:
        total.add_(found[gap])
    measures = total.measures(asked=True)
    kept = {"loss": measures[f"loss_{reader}"]}
    if reader == "memory":
        kept |= {name: measures[name] for name in ("closed", "agreement") if name in measures}
    held = _held(attached) if reader == "memory" else 0
    trained = sum(p.numel() for p in attached.parameters()) if more else 0
    return ArmResult(
        {gap: each.right[reader] for gap, each in found.items()},
        {**kept, **(more or {})},
        {"held": held, "trained": trained, "state_bytes": attached.memory.initial_state(1).nbytes if held else 0},
        seconds=time.perf_counter() - start,
    )


def _held(attached: Any) -> int:
    state = attached.memory.initial_state(1)
    return sum(part.numel() for part in (*state.weights, *state.momentum))


def _parts(losses: Sequence[float]) -> list[Sequence[float]]:
    return [losses[at : at + LOSSES] for at in range(0, len(losses), LOSSES)]
