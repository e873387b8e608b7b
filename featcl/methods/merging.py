"""Merging: every task is learned apart, from the same start, and what the model has is a merge of all tasks' ΔW.

    task t: C ← C(start), then learned;    τ_t = ΔW at its end;    ΔW ← merge(τ_1 … τ_t)

A task that comes again goes on from its own end, which then has a new one.
Merging is entry by entry on ΔW (`featcl.adapters.merging`), so the merge is in general no LoRA of the same rank, and
not in the span of the chosen features: the adapter gets the nearest update that it can hold, and `lost` says what that
left out. The average of a constrained kind loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from featcl.adapters.export import Factors
from featcl.adapters.lora import LoraSite
from featcl.adapters.merging import METHODS, Merged, merge_adapters, nearest_factors
from featcl.errors import FeatclError
from featcl.methods.checks import choice, positive, share
from featcl.methods.fresh_lora import lora_sites
from featcl.methods.method import Cost, Method, View
from featcl.methods.quadratic import copies, nbytes
from featcl.objectives.experience import Experience


class Merging(Method):
    """A snapshot of the adapter per task, merged whenever a task ends.

    Args:
        method: `average`, `ties`, `dare` or `dare_ties`.
        density: Share of a task's entries that stay; not for `average`.
        scale: What the merge is multiplied by.

    Raises:
        FeatclError: If an argument is out of range; at the first task, if the adapter is no LoRA.

    Source: as `featcl.adapters.merging.merge_adapters`.
    """

    name = "merging"
    moves_adapter = True

    def __init__(self, *, method: str = "ties", density: float = 0.2, scale: float = 1.0) -> None:
        choice(self.name, METHODS, method=method)
        share(self.name, density=density)
        positive(self.name, scale=scale)
        self.method, self.density, self.scale = method, density, scale
        self.lost: list[float] = []  # ‖what the adapter cannot hold‖ / ‖merge‖ at every task's end
        self._start: dict[str, Tensor] = {}
        self._ends: dict[str, dict[str, Tensor]] = {}
        self._changes = 0

    def refuse(self, view: View) -> None:
        """A kind that is no LoRA."""
        lora_sites(view.student.adapter, self.name)

    @torch.no_grad()
    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Back to the start, or to where the same task ended."""
        self.refuse(view)
        adapter = view.student.adapter
        if not self._start:
            self._start, self._changes = copies(view.parameters), adapter.changes
        self._check(adapter)
        for name, parameter in view.parameters.items():
            parameter.copy_(self._ends.get(task, self._start)[name])

    @torch.no_grad()
    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """A snapshot of this task; the adapter gets the merge of all."""
        adapter = view.student.adapter
        self._check(adapter)
        self._ends = {**self._ends, task: copies(view.parameters)}
        sites = lora_sites(adapter, self.name)
        merged = merge_adapters(
            [self._factors(end, sites, view) for end in self._ends.values()],
            method=self.method,
            density=self.density,
            scale=self.scale,
            seed=view.generator(f"merging/{task}").initial_seed() % 2**63,
        )
        self.lost = [*self.lost, put_(sites, merged)]

    def _factors(self, end: Mapping[str, Tensor], sites: Sequence[LoraSite], view: View) -> Factors:
        with put_back(view.parameters, end):
            return {site.name: tuple(factor.clone() for factor in site.moving_factors()) for site in sites}  # type: ignore[misc]

    def _check(self, adapter: Any) -> None:
        if adapter.changes != self._changes:
            raise FeatclError("merging: the directions were changed, and earlier tasks have the old coordinates")

    def cost(self) -> Cost:
        """The trained tensors, once per task and once for the start."""
        return Cost(stored_bytes=nbytes(self._start, *self._ends.values()))

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"tasks": list(self._ends), "lost": list(self.lost), "changes": self._changes}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._ends = {task: {} for task in state["tasks"]}
        self.lost, self._changes = [float(value) for value in state["lost"]], int(state["changes"])

    def tensors(self) -> dict[str, Tensor]:
        """The start, and the end of every task."""
        parts = {"start": self._start, **{str(number): end for number, end in enumerate(self._ends.values())}}
        return {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = tensor
        self._start = parts.get("start", {})
        self._ends = {task: parts.get(str(number), {}) for number, task in enumerate(self._ends)}


@contextmanager
def put_back(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the parameters have these values; then their own again, bit for bit."""
    own = copies(parameters)
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(values[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(own[name])


@torch.no_grad()
def put_(sites: Sequence[LoraSite], merged: Merged) -> float:
    """Give every site the update nearest to the merge that it can hold; ‖what is left out‖ / ‖merge‖.

    With orthonormal frozen factors L and R the nearest L X R to ΔW is X = Lᵀ ΔW Rᵀ; where both factors are trained, it
    is the SVD of ΔW (in the span's coordinates, if one of them has some).
    """
    lost = 0.0
    for site in sites:
        delta = merged.deltas[site.name].double()
        left, right = _outer(site, "lora_B", delta), _outer(site, "lora_A", delta)
        inner = left.T @ delta @ right
        if len(site.trained) == 2:
            a, b = nearest_factors(inner, rank=site.trained["lora_A"].shape[0])
            site.trained["lora_A"].copy_(a)
            site.trained["lora_B"].copy_(b / site.scale)
        else:
            (trained,) = site.trained.values()
            trained.copy_(inner / site.scale)
        a, b = site.moving_factors()
        lost += float((delta - b.double() @ a.double()).square().sum())
    norm = merged.norm()
    return lost**0.5 / norm if norm else 0.0


def _outer(site: LoraSite, which: str, like: Tensor) -> Tensor:
    """The frozen part of one side, as orthonormal columns: a basis, a frozen factor, or the identity."""
    if (basis := site.frozen.get(f"{which}.basis")) is not None:
        return basis.to(like)
    if (factor := site.frozen.get(which)) is not None:
        return factor.to(like) if which == "lora_B" else factor.to(like).T
    return torch.eye(like.shape[0 if which == "lora_B" else 1], dtype=like.dtype, device=like.device)
