"""Synaptic intelligence: importance is what each number did for the loss along the path that it took.

    ω_i = -∫ (∂L/∂θ_i) dθ_i ≈ -Σ_steps g_i Δθ_i                over one task
    Ω_i ← max(0, Ω_i + ω_i / ((θ_i(end) - θ_i(start))² + ξ))    at its end; then ω_i = 0 and θ* = θ(end)
    penalty = Σ_i Ω_i (θ_i - θ*_i)²

g is the gradient of the loss without SI's own penalty: with it the penalty would pay for itself. Where the loss is
quadratic and the path ends in its minimum, Ω is half its curvature: the penalty with strength 1 is that loss again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from featcl.methods.checks import positive
from featcl.methods.method import Cost, View
from featcl.methods.quadratic import Quadratic, Well, copies, nbytes
from featcl.objectives.experience import Experience

_PARTS = ("path", "start")


class SI(Quadratic):
    """A quadratic penalty, weighted by the path integral of the gradient; it costs no extra pass.

    Args:
        strength: c.
        damping: ξ, the squared distance below which a number is taken not to have moved.

    Raises:
        FeatclError: If an argument is out of range.

    Source: Zenke, Poole, Ganguli 2017, arXiv:1703.04200, eqs. 3 to 5; where Ω is negative it is set to 0, as in the
    authors' code.
    """

    name = "si"
    only_looks = True

    def __init__(self, *, strength: float = 1.0, damping: float = 1e-3) -> None:
        positive(self.name, strength=strength, damping=damping)
        self.strength, self.damping = strength, damping
        super().__init__(strength=strength)
        self._path: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._step: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None  # θ and g of a step under way

    @property
    def path(self) -> Mapping[str, Tensor]:
        """ω of the present task."""
        return self._path

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """A new path starts here."""
        self._start = copies(view.parameters)
        self._path = {name: torch.zeros_like(tensor) for name, tensor in self._start.items()}
        self._step = None

    @torch.no_grad()
    def project_(self, view: View) -> None:
        """Take down the gradient of a step before it is taken; nothing is changed."""
        self._close_(view)
        own = self.wells.gradient(view.parameters)
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad - self.strength * own[name]
            for name, p in view.parameters.items()
        }
        self._step = (copies(view.parameters), gradients)

    def after_step_(self, before: Mapping[str, Tensor], gradients: Mapping[str, Tensor], view: View) -> None:
        """Add the last step, as the trust region left it."""
        self._close_(view)

    @torch.no_grad()
    def _close_(self, view: View) -> None:
        """ω ← ω - g ⊙ Δθ of the step under way."""
        if self._step is None:
            return
        before, gradients = self._step
        for name, parameter in view.parameters.items():
            self._path[name] = self._path[name] - gradients[name] * (parameter.detach() - before[name])
        self._step = None

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """Add the task's importance to that of all before it."""
        adapter = view.student.adapter
        self.wells.check(adapter)
        end, importance = copies(view.parameters), {}
        for name, value in end.items():
            moved = (value - self._start[name]).square() + self.damping
            old = self.wells[0].importance[name].to(value) if len(self.wells) else torch.zeros_like(value)
            importance[name] = (old + self._path[name] / moved).clamp(min=0.0)
        self.wells.set_([Well(end, importance)], changes=adapter.changes)
        self.begin_task_(task, view)

    def cost(self) -> Cost:
        """Four copies of the trained tensors."""
        return Cost(stored_bytes=nbytes(self.tensors()))

    def tensors(self) -> dict[str, Tensor]:
        """Path, start and well."""
        parts = {"path": self._path, "start": self._start, "wells": super().tensors()}
        return {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back; a step that was under way is forgotten."""
        found: dict[str, dict[str, Tensor]] = {part: {} for part in (*_PARTS, "wells")}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            found[part][name] = tensor
        self._path, self._start, self._step = found["path"], found["start"], None
        super().load_tensors_(found["wells"])
