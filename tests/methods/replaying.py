"""A tiny adapted model with a learner's update in a few lines: what a method sees, and what becomes of its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from featcl.adapters import constrain
from featcl.features import Directions
from featcl.learning.gradient import accumulate_gradient_
from featcl.learning.randomness import derived_generator
from featcl.methods.method import Method, View
from featcl.methods.outside import Outside
from featcl.objectives.build import build_terms
from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import Scorer, pack
from featcl.streams import Chat, Trajectory
from featcl.streams.windows import encode_trajectory
from tests.conftest import tiny_model, tiny_tokenizer


class Bench:
    """A fresh student on a tiny model; the same arguments give the same weights."""

    def __init__(
        self, family: str = "olmo2", *, kind: str = "both", lr: float = 1e-2, seed: int = 0, layers: Any = None
    ) -> None:
        self.model, self.tokenizer = tiny_model(family), tiny_tokenizer(family)
        vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        directions = Directions.from_vectors(vectors, layer=2)
        self.adapter = constrain(self.model, directions, kind=kind, layers=[2] if layers is None else layers)
        self.student = Student(Scorer(self.adapter.model), self.adapter, Chat(self.tokenizer), 512)
        self.terms = build_terms("sft")
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=lr, weight_decay=0.0)
        self.seed, self.version = seed, 0

    def view(self) -> View:
        return View(
            student=self.student,
            parameters=self.adapter.named_parameters(),
            terms=self.terms,
            encode=self.encode,
            gradient=self.gradient,
            generator=lambda purpose: derived_generator(self.seed, f"v{self.version}", purpose),
        )

    def encode(self, trajectory: Trajectory) -> Experience:
        windows = encode_trajectory(trajectory, self.student.chat, max_length=512).windows
        return Experience(trajectory, pack(windows), partial(derived_generator, self.seed, trajectory.id))

    def gradient(self, experience: Experience) -> dict[str, Tensor]:
        kept = [parameter.grad for parameter in self.adapter.parameters()]
        self.optimizer.zero_grad()
        accumulate_gradient_(self.terms, experience, self.student)
        found = {name: p.grad.clone() for name, p in self.adapter.named_parameters().items() if p.grad is not None}
        for parameter, grad in zip(self.adapter.parameters(), kept, strict=True):
            parameter.grad = grad
        return found

    def nll(self, trajectory: Trajectory) -> float:
        """Mean of the objective over tokens, adapter on."""
        experience = self.encode(trajectory)
        with torch.no_grad():
            total = sum(
                float(self.terms[0].objective.loss(self.student.scorer.hidden(b), b, self.student))
                for b in experience.batches
            )
        return total / sum(batch.tokens for batch in experience.batches)

    def observe(self, trajectory: Trajectory, *methods: Method, weight: float = 1.0) -> str | None:
        """One update, or the reason why a method postponed it."""
        experience = replace(self.encode(trajectory), weight=weight)
        for method in methods:
            reason = getattr(method, "postpones_", lambda *_: None)(experience, self.view())
            if reason is not None:
                return reason
        learned = trajectory
        for method in methods:
            learned = method.learned(learned, self.view()) if isinstance(method, Outside) else learned
        besides = [each for method in methods for each in method.beside(experience, self.view())]
        self.optimizer.zero_grad()
        own = replace(experience, batches=self.encode(learned).batches)
        accumulate_gradient_([*self.terms, *(t for m in methods for t in m.terms())], own, self.student)
        for each in besides:
            accumulate_gradient_(self.terms, each, self.student)
        for method in methods:
            method.project_(self.view())
        before = self.adapter.coordinates()
        gradients = {name: p.grad.clone() for name, p in self.adapter.named_parameters().items() if p.grad is not None}
        self.optimizer.step()
        for method in methods:
            method.project_step_(before, self.view())
        for method in methods:
            method.after_step_(before, gradients, self.view())
        self.version += 1
        for method in methods:
            method.after_update_(experience, self.view())
        return None

    def move_(self, size: float = 0.3, seed: int = 0) -> None:
        """Coordinates drawn at random, as if something had been learned."""
        draw = torch.Generator().manual_seed(seed)
        here = self.adapter.coordinates()
        self.adapter.load_coordinates_({n: size * torch.randn(v.shape, generator=draw) for n, v in here.items()})


def ask(number: int, answer: str | None = None, **fields: Any) -> Trajectory:
    """A question with its answer."""
    messages = (
        {"role": "user", "content": f"what is number {number}?"},
        {"role": "assistant", "content": answer or f"it is {number * 7 % 10}"},
    )
    return Trajectory(f"t{number}", task="ask", **{"messages": messages, **fields})


def saved(method: Method) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A method's state as it is on the disk and back."""
    return json.loads(json.dumps(method.state())), {name: tensor.clone() for name, tensor in method.tensors().items()}


def reloaded(method: Method, fresh: Method) -> Method:
    """A fresh method with another's state."""
    state, tensors = saved(method)
    fresh.load_state_(state)
    fresh.load_tensors_(tensors)
    return fresh


def same_state(one: Method, other: Method) -> bool:
    """Whether two methods hold the same, bit for bit."""
    (state, tensors), (state_2, tensors_2) = saved(one), saved(other)
    same = tensors.keys() == tensors_2.keys() and all(torch.equal(tensors[n], tensors_2[n]) for n in tensors)
    return state == state_2 and same


def run(bench: Bench, trajectories: Sequence[Trajectory], *methods: Method) -> dict[str, Tensor]:
    """Observe all of them; the coordinates after."""
    for trajectory in trajectories:
        bench.observe(trajectory, *methods)
    return bench.adapter.coordinates()


def resumes(make: Any, trajectories: Sequence[Trajectory], *, cut: int, task: bool = False, **bench: Any) -> bool:
    """Whether a run that is broken off after `cut` and goes on in new objects ends in the same bits."""
    whole, method = Bench(**bench), make()
    if task:
        method.begin_task_("a", whole.view())
    expected = run(whole, trajectories, method)
    first, early = Bench(**bench), make()
    if task:
        early.begin_task_("a", first.view())
    run(first, trajectories[:cut], early)
    second, late = Bench(**bench), reloaded(early, make())
    second.adapter.load_coordinates_(first.adapter.coordinates())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.version = first.version
    found = run(second, trajectories[cut:], late)
    return all(torch.equal(expected[name], found[name]) for name in expected) and same_state(method, late)


def forgotten(*methods: Method) -> float:
    """Nats per token by which four answers get worse while four others, which contradict them, are learned."""
    old, new = [ask(n, "blue") for n in range(4)], [ask(n, "7 7 7") for n in range(10, 14)]
    bench = Bench(lr=2e-2)
    run(bench, old * 6, *methods)
    before = sum(map(bench.nll, old))
    run(bench, new * 6, *methods)
    return (sum(map(bench.nll, old)) - before) / len(old)
