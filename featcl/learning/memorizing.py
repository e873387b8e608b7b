"""Training a memory's slow weights on a frozen model: what the full context says is distilled into the truncated one.

A long text is cut into windows. The teacher, the model without memory, reads it whole; the student, the same model with
memory, reads window after window, and nothing but the memory's state passes from one to the next:

    L = mean over targets of KL(p(· | whole text so far) ‖ p(· | window so far, memory))

Gradients flow through the states, from a question's window back to the window that held the answer, and reach the slow
weights and the gate alone. At the end of a window the memory's open chunk is closed, as a learner does after each
trajectory that it writes.

Source: Behrouz et al. 2024, arXiv:2501.00663 (the memory); Snell et al. 2022, arXiv:2209.15189 (context distillation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.files import write_bytes
from featcl.learning.longread import Readings, divergences, full_hidden, read_texts, window_hidden
from featcl.learning.longtext import LongBatch, LongText
from featcl.learning.optimizers import build_optimizer, load_moments_, moments
from featcl.learning.update import check_finite
from featcl.objectives.scoring import Scorer

WARM_UP, COOL_DOWN = 0.05, 0.3  # shares of the steps: memories find what they hold after a while at the full rate
LONGEST_GRADIENT = 1.0


@dataclass(frozen=True, eq=False)
class LongTexts:
    """What a memory is trained and measured on.

    Attributes:
        batch: From the number of a step to the texts of that step, all of as many windows.
        heldout: Texts that no step learns from, in groups of as many windows.
        asked: Whether the last window of each asks for what the first one told, so that recall means something.
        digest: Of all of them.
    """

    batch: Callable[[int], Sequence[LongText]]
    heldout: Sequence[Sequence[LongText]]
    asked: bool
    digest: str


@dataclass(frozen=True)
class Distilled:
    """What one step measured: the loss in nats per target, targets, and the gradient's norm before clipping."""

    loss: float
    tokens: int
    grad_norm: float


class MemoryTraining:
    """Trains slow weights and gate, step by step; all else stays frozen.

    Args:
        attached: The memory on its model.
        scorer: The same model, split at its last hidden state.
        texts: What it learns from.
        steps: How many there will be: the rate rises over the first twentieth and falls over the last third.
        lr: Highest learning rate of AdamW.
        gate_only: Leave the slow weights as they were drawn: the control that says what training them is worth.

    Attributes:
        done: Steps taken.
    """

    def __init__(
        self, attached: Any, scorer: Scorer, texts: LongTexts, *, steps: int, lr: float, gate_only: bool = False
    ) -> None:
        self.attached, self.scorer, self.texts, self.steps, self.lr = attached, scorer, texts, steps, lr
        self.parameters: list[nn.Parameter] = [attached.branch.gate] if gate_only else attached.parameters()
        self.optimizer = build_optimizer("adamw", self.parameters, lr=lr)
        self.done = 0

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.done >= self.steps

    def step_(self) -> Distilled:
        """One step on the next batch.

        Raises:
            FeatclError: If loss or gradient is not finite; nothing is changed then.
        """
        batch = LongBatch.of(self.texts.batch(self.done), device=self.scorer.device)
        teacher = full_hidden(self.scorer, self.attached, batch)
        with trained(self.parameters), torch.enable_grad():
            student = window_hidden(self.scorer, self.attached, batch)
            loss = torch.stack(divergences(self.scorer, student, teacher)).sum() / batch.tokens
            gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        for name, value in (("loss", loss.item()), ("gradient norm", norm)):
            check_finite(f"the memory's {name} (lr {self.lr})", value, f"step {self.done}", "memory training")
        self._take_(gradients, norm)
        return Distilled(loss.item(), batch.tokens, norm)

    def _take_(self, gradients: Sequence[Tensor], norm: float) -> None:
        """The optimizer's step along clipped gradients."""
        scale = min(1.0, LONGEST_GRADIENT / norm) if norm else 1.0
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient * scale
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self._factor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1

    def _factor(self) -> float:
        warm, cool = (max(1, round(share * self.steps)) for share in (WARM_UP, COOL_DOWN))
        return min(1.0, (self.done + 1) / warm, (self.steps - self.done) / cool)

    def measure(self) -> dict[str, float]:
        """The held-out texts, read with memory, truncated and whole, under the names that are logged."""
        total = Readings()
        for texts in self.texts.heldout:
            total.add_(read_texts(self.scorer, self.attached, texts))
        return {f"memory/{name}": value for name, value in total.measures(asked=self.texts.asked).items()}

    # --- on disk

    def save(self, file: str | Path) -> None:
        """Slow weights, gate, moments and the number of steps, as one safetensors file."""
        from safetensors.torch import save

        tensors = {f"slow/{name}": tensor for name, tensor in self.attached.tensors().items()}
        tensors |= {f"moments/{name}": tensor for name, tensor in moments(self.optimizer).items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(Path(file), save(tensors, metadata={"steps": str(self.done)}))

    def restore_(self, file: str | Path) -> None:
        """Go on exactly where `save` left off.

        Raises:
            FeatclError: If the file is missing or damaged, or of another memory.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as opened:
                done = int((opened.metadata() or {})["steps"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise FeatclError(f"{file}: no saved memory training ({error}); start anew with --overwrite") from error
        self.attached.load_tensors_(_part(tensors, "slow/"))
        load_moments_(self.optimizer, _part(tensors, "moments/"))
        self.done = done


def _part(tensors: dict[str, Tensor], lead: str) -> dict[str, Tensor]:
    return {name.removeprefix(lead): tensor for name, tensor in tensors.items() if name.startswith(lead)}


@contextmanager
def trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters take gradients; they are frozen after it."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
