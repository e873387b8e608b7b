"""Dark experience replay: what is kept of a record beside its tokens are the logits that the learner gave them.

    loss = L(new) + α · mean (z − h(x))² + β · NLL(y | x)          DER; with the last term DER++

z are the logits at the time when x was learned from, before that update's step; h(x) those of now. The square is the
mean over the logits of a token, as in the authors' code (their equation has the sum), then over tokens. Kept are all
logits of a token, or its k largest and one for all others together, ln Σ exp z_j over them: the same function of h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.buffer import Buffer
from featcl.methods.method import Cost, Method, View
from featcl.methods.replay import build_selection
from featcl.methods.tokens import tokens_read
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import CHUNK_LOGITS, TokenBatch, row_chunks, sum_in_chunks
from featcl.objectives.sft import nll_sum


@dataclass(frozen=True, eq=False)
class DarkBatch(TokenBatch):
    """Tokens with the logits that were given to them.

    Attributes:
        logits: z, one row per target: all of them, or the k largest and the tail's.
        places: Which tokens' logits the k largest are; no columns where all are kept.
        weight: How far the record was trusted.
    """

    logits: Float[Tensor, "targets kept"]
    places: Int[Tensor, "targets k"]
    weight: float = 1.0


class DarkReplay(Method):
    """DER and DER++.

    Args:
        budget: Largest number of trajectories kept, or None.
        budget_bytes: Largest number of bytes kept, or None; one of the two is given.
        alpha: Of the logits.
        beta: Of the labels, drawn anew; 0 is DER, above it DER++.
        top_k: Logits kept per token, beside one for all others; None keeps all (2 bytes times the vocabulary).
        count: Trajectories drawn per update and term.

    Raises:
        FeatclError: For a budget of zero, none or two, or a number out of range.

    Source: Buzzega et al. 2020, arXiv:2004.07211, algorithms 1 and 2.
    """

    name = "der"

    def __init__(
        self,
        *,
        budget: int | None = None,
        budget_bytes: int | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        top_k: int | None = 64,
        count: int = 1,
    ) -> None:
        if not (alpha > 0 and beta >= 0 and alpha + beta < float("inf")):
            raise FeatclError(f"der: alpha must be above 0 and beta at least 0, got {alpha!r} and {beta!r}")
        checks.count(self.name, top_k=top_k, count=count)
        self.alpha, self.beta, self.top_k, self.count = alpha, beta, top_k, count
        selection = build_selection("reservoir")
        self.buffer = Buffer(selection, budget=budget, budget_bytes=budget_bytes, owner=self.name)
        self._before: dict[str, bytes] = {}  # of experiences whose step has not been taken
        self._forward = self._backward = 0

    def terms(self) -> Sequence[Term]:
        """Squared distance of the logits and, for DER++, NLL of the labels."""
        logits = Term("der", self.alpha, _Dark(self, "logits", "replay/der_logits"))
        return (
            (logits, Term("der++", self.beta, _Dark(self, "labels", "replay/der_labels"))) if self.beta else (logits,)
        )

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """Takes the logits, before the step."""
        if not experience.batches:
            raise FeatclError(f"der: {experience.trajectory.id!r} has no tokens of its own whose logits could be kept")
        self._before[experience.trajectory.id] = pack_dark(experience.batches, view.student, top_k=self.top_k)
        self._forward += tokens_read(experience.batches)
        return ()

    def after_update_(self, experience: Experience, view: View) -> None:
        """Offer the record to the buffer; one that comes again is another one, with other logits."""
        self.buffer.add_(self._before.pop(experience.trajectory.id), experience, view)

    def drawn(self, experience: Experience, student: Student, purpose: str) -> list[DarkBatch]:
        """Batches of records from the buffer; another draw for each purpose."""
        entries = self.buffer.draw(self.count, experience.generator(f"der/{purpose}"))
        found = [batch for entry in entries for batch in unpack_dark(self.buffer.read(entry), student, entry.weight)]
        self._forward += tokens_read(found)
        self._backward += tokens_read(found)
        return found

    def cost(self) -> Cost:
        """The buffer, and what was replayed."""
        return Cost(self.buffer.stored_bytes, self._forward, self._backward)

    def state(self) -> dict[str, Any]:
        """The buffer's; and which records wait for their step."""
        counters = [self._forward, self._backward]
        return {"buffer": self.buffer.state(), "waiting": list(self._before), "counters": counters}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self.buffer.load_state_(state["buffer"])
        self._before = dict.fromkeys(state["waiting"], b"")
        self._forward, self._backward = state["counters"]

    def tensors(self) -> dict[str, Tensor]:
        """The buffer's, and the waiting records by place."""
        waiting = (torch.frombuffer(bytearray(record), dtype=torch.uint8) for record in self._before.values())
        return self.buffer.tensors() | {f"waiting/{place}": record for place, record in enumerate(waiting)}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self.buffer.load_tensors_(tensors)
        for place, id in enumerate(self._before):
            self._before[id] = tensors[f"waiting/{place}"].cpu().numpy().tobytes()


@dataclass(frozen=True, eq=False)
class _Dark:
    """One of the two terms."""

    method: DarkReplay
    purpose: str
    metric: str

    def read(self, experience: Experience, student: Student) -> Sequence[TokenBatch]:
        """What the buffer gives; nothing while it is empty."""
        return self.method.drawn(experience, student, self.purpose)

    def loss(self, hidden: Float[Tensor, "targets d_model"], batch: TokenBatch, student: Student) -> Float[Tensor, ""]:
        """Sum over targets, times how far the record was trusted."""
        assert isinstance(batch, DarkBatch)
        scorer = student.scorer
        if self.purpose == "labels":
            return batch.weight * nll_sum(hidden, batch.targets, scorer.head, width=scorer.logit_width)

        def total(rows: Tensor, logits: Tensor, places: Tensor) -> Tensor:
            return squared_distance(scorer.head(rows).float(), logits, places).sum()

        return batch.weight * sum_in_chunks(total, hidden, batch.logits, batch.places, width=scorer.logit_width)


def squared_distance(
    logits: Float[Tensor, "targets vocab"], kept: Float[Tensor, "targets kept"], places: Int[Tensor, "targets k"]
) -> Float[Tensor, " targets"]:
    """Mean over the kept logits of (z − h)², token by token."""
    return (kept.float() - kept_logits(logits, places)).square().mean(-1)


def kept_logits(
    logits: Float[Tensor, "targets vocab"], places: Int[Tensor, "targets k"]
) -> Float[Tensor, "targets kept"]:
    """All logits, where no places are given; else those there, and ln Σ exp of all others."""
    if places.shape[1] == 0:
        return logits
    others = logits.scatter(-1, places, torch.finfo(logits.dtype).min / 4)
    return torch.cat([logits.gather(-1, places), others.logsumexp(-1, keepdim=True)], dim=-1)


@torch.no_grad()
def pack_dark(batches: Sequence[TokenBatch], student: Student, *, top_k: int | None) -> bytes:
    """Token batches with the student's present logits in float16, as safetensors."""
    from safetensors.torch import save

    scorer, tensors = student.scorer, {}
    for number, batch in enumerate(batches):
        kept, places = [], []
        for (rows,) in row_chunks(scorer.hidden(batch), width=scorer.logit_width, limit=CHUNK_LOGITS):
            logits = scorer.head(rows).float()
            largest = logits[:, :0].long()
            if top_k is not None and top_k < logits.shape[-1]:
                largest = logits.topk(top_k, dim=-1).indices
            kept.append(kept_logits(logits, largest).half())
            places.append(largest.int())
        own = {name: getattr(batch, name).int() for name in ("input_ids", "positions", "targets")}
        own |= {"logits": torch.cat(kept), "places": torch.cat(places)}
        tensors |= {f"{number}/{name}": tensor.cpu().contiguous() for name, tensor in own.items()}
    return save(tensors)


def unpack_dark(data: bytes, student: Student, weight: float = 1.0) -> list[DarkBatch]:
    """The batches that `pack_dark` was given, on the student's device."""
    from safetensors.torch import load

    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load(data).items():
        number, name = key.split("/")
        tensor = tensor if name == "logits" else tensor.long()
        found.setdefault(int(number), {})[name] = tensor.to(student.scorer.device)
    names = [field.name for field in fields(DarkBatch) if field.name != "weight"]
    return [DarkBatch(*(found[number][name] for name in names), weight=weight) for number in sorted(found)]
