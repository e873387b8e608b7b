"""Sparse updates: of each trained tensor only those slots move that are used much here and rarely in the background.

    use of slot i on an experience      c(i) = ‖∇_i L‖, the gradient's part in that slot
    tf(i)  = c(i) / Σ_j c(j)
    idf(i) = ln((|B| + 1) / (|{b in B: i among the most used of b}| + 1))
    the t slots with the largest tf · idf move; all others stay as they are, bit for bit

A slot is a slice of a trained tensor: one rank coordinate (a feature, for the constrained kinds), or one row or column
of the other side (a neuron). In the paper slots are those of a memory layer and c counts how often they are looked up;
a gated update's column has a gradient exactly if its feature fires, so that there the two have the same support.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.method import Cost, Method, View
from featcl.methods.tokens import tokens_read
from featcl.objectives.experience import Experience
from featcl.streams.trajectory import Trajectory

SLOTS = ("rank", "free")


class SparseMemory(Method):
    """Updates the slots that are frequent here and rare in the background.

    Args:
        background: Texts or conversations of what should be kept; their use of the slots is measured once, before the
            first task.
        top: t, slots that move per update, over all tensors.
        used: Share of the slots that count as used by a background text, in (0, 1): those with the largest gradient.
        slots: `rank`: coordinates of the rank (features); `free`: rows or columns of the other side (neurons).

    Raises:
        FeatclError: Without background, for a number out of range, or more slots than there are.

    Source: Lin et al. 2025, arXiv:2510.15103, section 3 (TF-IDF over memory slots), with gradients for look-ups.
    """

    name = "sparse_memory"

    def __init__(
        self, *, background: Sequence[Trajectory], top: int = 64, used: float = 0.1, slots: str = "free"
    ) -> None:
        checks.count(self.name, top=top)
        checks.choice(self.name, SLOTS, slots=slots)
        self.background, self.top = tuple(background), top
        if not self.background:
            raise FeatclError("sparse_memory: no background is given; without it no slot is known to be rare there")
        if not 0.0 < used < 1.0:
            raise FeatclError(f"sparse_memory: used must be above 0 and below 1, got {used!r}")
        self.used, self.slots = used, slots
        self._documents: Int[Tensor, " slots"] | None = None  # background texts that use each slot
        self._chosen: dict[str, Bool[Tensor, " slots"]] = {}  # of this update alone
        self._forward = 0

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Measure the background, before the first task."""
        if self._documents is not None:
            return
        total = sum(
            len(uses) for uses in self._uses({name: p.detach() for name, p in view.parameters.items()}).values()
        )
        if self.top > total:
            raise FeatclError(f"sparse_memory: top is {self.top}, but there are only {total} slots")
        self._documents = torch.zeros(total, dtype=torch.int32)
        for text in self.background:
            experience = view.encode(text)
            self._forward += tokens_read(experience.batches)
            uses = self._joined(view.gradient(experience))
            most = uses.topk(max(1, round(self.used * total)))
            self._documents[most.indices[most.values > 0]] += 1

    def project_(self, view: View) -> None:
        """Zero the gradient outside the chosen slots."""
        gradients = {name: p.grad for name, p in view.parameters.items() if p.grad is not None}
        self._chosen = self._choose(gradients)
        for name, gradient in gradients.items():
            gradient[~self._mask(name, gradient)] = 0.0

    @torch.no_grad()
    def project_step_(self, before: Mapping[str, Tensor], view: View) -> None:
        """Put back what momentum and weight decay moved outside them."""
        for name, parameter in view.parameters.items():
            if name in self._chosen:
                mask = self._mask(name, parameter)
                parameter.copy_(torch.where(mask, parameter, before[name].to(parameter)))
            else:
                parameter.copy_(before[name])

    def _choose(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The slots with the largest tf · idf, as a mask per tensor."""
        if self._documents is None:
            raise FeatclError("sparse_memory: the background was not measured; begin_task_ comes before any update")
        uses = self._joined(gradients)
        if len(uses) != len(self._documents):
            raise FeatclError(
                f"sparse_memory: {len(uses)} slots have a gradient, the background was measured on "
                f"{len(self._documents)}: the trained tensors are others by now"
            )
        scores = tf_idf(uses, self._documents, texts=len(self.background))
        mask = torch.zeros(len(scores), dtype=torch.bool)
        best = scores.topk(self.top)
        mask[best.indices[best.values > 0]] = True  # what is not used here does not move, not even by momentum
        sizes = [len(part) for part in self._uses(gradients).values()]
        return dict(zip(sorted(gradients), mask.split(sizes), strict=True))

    def _uses(self, gradients: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " slots"]]:
        """c(i) of every slot by tensor, in the order of their names."""
        return {name: slot_norms(gradients[name], self._axis(name, gradients[name])) for name in sorted(gradients)}

    def _joined(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, " slots"]:
        return torch.cat(list(self._uses(gradients).values()))

    def _axis(self, name: str, tensor: Tensor) -> int:
        """The axis along which slots lie; the rank, or what a hook reads, is the first of lora_A, else the last."""
        if tensor.ndim == 1:
            return 0
        rank = 0 if name.endswith("lora_A") else 1
        return rank if self.slots == "rank" else 1 - rank

    def _mask(self, name: str, tensor: Tensor) -> Tensor:
        """The chosen slots of a tensor, in its shape."""
        axis, chosen = self._axis(name, tensor), self._chosen[name].to(tensor.device)
        shape = [-1 if place == axis else 1 for place in range(tensor.ndim)]
        return chosen.view(shape).expand_as(tensor)

    def cost(self) -> Cost:
        """One number per slot; the background was read once."""
        stored = 0 if self._documents is None else self._documents.nbytes
        return Cost(stored, self._forward, self._forward)

    def state(self) -> dict[str, Any]:
        """Whether the background was measured, and what that read."""
        return {"measured": self._documents is not None, "forward": self._forward}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self._forward, self._documents, self._chosen = state["forward"], None, {}

    def tensors(self) -> dict[str, Tensor]:
        """How many background texts use each slot."""
        return {} if self._documents is None else {"documents": self._documents}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self._documents = tensors["documents"].cpu() if "documents" in tensors else None


def slot_norms(gradient: Tensor, axis: int) -> Float[Tensor, " slots"]:
    """Euclidean norm of each slice along an axis, in float64 on the CPU."""
    others = [place for place in range(gradient.ndim) if place != axis]
    squares = gradient.detach().double().square()
    return (squares.sum(others) if others else squares).sqrt().cpu()


def tf_idf(uses: Float[Tensor, " slots"], documents: Int[Tensor, " slots"], *, texts: int) -> Float[Tensor, " slots"]:
    """tf · idf of each slot; all zero where nothing is used.

    Args:
        uses: c(i) here.
        documents: Background texts that use each slot.
        texts: |B|.
    """
    total = uses.sum()
    idf = math.log(texts + 1) - torch.log(documents.double() + 1.0)
    return idf * (uses / total if total > 0 else uses)
