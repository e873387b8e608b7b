"""A tiny adapted language model with AdamW, and what a learner does with a method, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from featcl.adapters import constrain
from featcl.learning.gradient import accumulate_gradient_
from featcl.learning.optimizers import build_optimizer
from featcl.learning.randomness import derived_generator
from featcl.methods.method import Method, View
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import Scorer, pack
from featcl.objectives.sft import Sft
from featcl.streams import Chat, Trajectory
from featcl.streams.windows import encode_trajectory
from tests.conftest import tiny_model, tiny_tokenizer
from tests.objectives.conftest import directions


@dataclass
class Tiny:
    """A model, its adapter, and an optimizer on it."""

    kind: str = "none"
    optimizer: str = "adamw"
    lr: float = 1e-2
    weight_decay: float = 0.0
    k: int = 4
    constraint: dict[str, Any] = field(default_factory=dict)
    family: str = "olmo2"

    def __post_init__(self) -> None:
        self.model, self.tokenizer = tiny_model(self.family, n_layers=2), tiny_tokenizer(self.family)
        self.adapter = constrain(self.model, directions(self.k), kind=self.kind, **self.constraint)
        self.student = Student(Scorer(self.adapter.model), self.adapter, Chat(self.tokenizer), 512)
        self.terms = [Term("sft", 1.0, Sft())]
        self.restart_()

    def restart_(self) -> None:
        """Forget the optimizer's moments."""
        self.steps = build_optimizer(
            self.optimizer, self.adapter.parameters(), lr=self.lr, weight_decay=self.weight_decay
        )

    @property
    def view(self) -> View:
        return View(
            self.student, self.adapter.named_parameters(), self.terms, self.encode, lambda _: {},
            lambda purpose: derived_generator(0, "version", purpose),
        )  # fmt: skip

    def encode(self, trajectory: Trajectory) -> Experience:
        windows = encode_trajectory(trajectory, self.student.chat, max_length=512).windows
        return Experience(trajectory, pack(windows), partial(derived_generator, 0, trajectory.id))

    def task(self, *texts: str) -> list[Experience]:
        return [self.encode(Trajectory(text, text=text)) for text in texts]

    def learn_(
        self, method: Method, task: str, experiences: Sequence[Experience], *, steps: int = 5, **more: Any
    ) -> None:
        """A whole task with a method."""
        before = self.adapter.coordinates()
        method.begin_task_(task, self.view, **more)
        if set(before) != set(now := self.adapter.coordinates()) or any(
            not torch.equal(before[name], now[name]) for name in before
        ):
            self.restart_()
        for number in range(steps):
            self.step_(method, experiences[number % len(experiences)])
        method.end_task_(task, experiences, self.view)

    def step_(self, method: Method, experience: Experience) -> None:
        """One update."""
        before, view = self.adapter.coordinates(), self.view
        self.steps.zero_grad()
        accumulate_gradient_([*self.terms, *method.terms()], experience, self.student)
        method.project_(view)
        gradients = {name: parameter.grad.clone() for name, parameter in view.parameters.items()}
        self.steps.step()
        self.adapter.after_step_()
        self.steps.zero_grad()
        method.project_step_(before, view)
        method.after_step_(before, gradients, view)

    @torch.no_grad()
    def logits(self, experiences: Sequence[Experience]) -> Tensor:
        """On every target of the experiences."""
        scorer = self.student.scorer
        return torch.cat([scorer.head(scorer.hidden(batch)) for each in experiences for batch in each.batches])

    def loss(self, experiences: Sequence[Experience]) -> float:
        """Mean NLL in nats per target."""
        targets = torch.cat([batch.targets for each in experiences for batch in each.batches])
        return float(torch.nn.functional.cross_entropy(self.logits(experiences), targets))

    def deltas(self) -> dict[str, Tensor]:
        """ΔW of every adapted linear."""
        return {site.name: site.factors()[1] @ site.factors()[0] for site in self.adapter.sites}

    def shake_(self, size: float = 0.1, seed: int = 0) -> None:
        """Coordinates drawn at random, as if something had been learned."""
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter += size * torch.randn(parameter.shape, generator=draw)
