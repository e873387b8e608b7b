"""Latent replay: what is kept is the residual stream where the frozen part of the model ends, in eight bits.

    s_t = max |h_t| / 127,   q_t = round(h_t / s_t)          one scale per token, |s_t q_t − h_t| ≤ s_t / 2
    loss = L(new) + s / (1 − s) · mean over the drawn of  w_i NLL(drawn_i), started from s_t q_t at the lowest adapter

Blocks below the lowest adapter do not change, so what they made of a record stays right for ever, and replaying it
costs the blocks above alone. It takes d_model + 4 bytes a token, more than the text: it buys time, and keeps no text
but the tokens to be predicted and those before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featcl.adapters.trunk import TrunkState, resumed, run_trunk, trunk_end
from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.buffer import Buffer, Entry
from featcl.methods.method import Cost, Method, View
from featcl.methods.replay import build_selection, check_share
from featcl.methods.tokens import tokens_read
from featcl.models import blocks
from featcl.objectives.build import Term
from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import TokenBatch
from featcl.objectives.sft import nll_sum

BATCH = ("input_ids", "positions", "targets")


def quantised(
    hidden: Float[Tensor, "*batch d_model"],
) -> tuple[Int[Tensor, "*batch d_model"], Float[Tensor, "*batch 1"]]:
    """(q, s) in int8 and float32.

    Raises:
        FeatclError: If a value is not finite.
    """
    scale = hidden.float().abs().amax(-1, keepdim=True) / 127.0
    if not bool(torch.isfinite(scale).all()):
        raise FeatclError("latent_replay: activations that are not finite cannot be kept in eight bits")
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return (hidden.float() / scale).round().to(torch.int8), scale


def dequantised(q: Int[Tensor, "*batch d_model"], scale: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch d_model"]:
    """s q, in float32."""
    return q.float() * scale


class LatentReplay(Method):
    """Replays activations from below the lowest adapter.

    Args:
        budget_bytes: Largest number of bytes kept, or None.
        budget: Largest number of trajectories kept, or None; one of the two is given.
        select: Which ones stay, as in `Replay`.
        share: Share of the update that is replay, in (0, 1).
        count: Trajectories drawn per update.

    Raises:
        FeatclError: As in `Replay`; or, at the first experience, where the lowest adapter leaves nothing frozen below.

    Source: Pellegrini et al. 2020, arXiv:1912.01100; in eight bits, Ravaglia et al. 2021, arXiv:2110.10486.
    """

    name = "latent_replay"

    def __init__(
        self,
        *,
        budget_bytes: int | None = None,
        budget: int | None = None,
        select: str | Mapping[str, Any] = "reservoir",
        share: float = 0.5,
        count: int = 1,
    ) -> None:
        checks.count(self.name, count=count)
        self.share, self.count = check_share(self.name, share), count
        self.buffer = Buffer(build_selection(select), budget=budget, budget_bytes=budget_bytes, owner=self.name)
        self._drawn: tuple[Entry, ...] = ()  # of this update alone
        self._forward = self._partly = 0

    def refuse(self, view: View) -> None:
        """An adapter at the lowest block."""
        frozen_part(view.student)

    def terms(self) -> Sequence[Term]:
        """NLL of what `beside` drew, as a penalty: its forward pass is its own."""
        return (Term(self.name, self.share / (1.0 - self.share), _Penalty(self)),)

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """Draws; what is drawn is learned from through `terms`."""
        self._drawn = tuple(self.buffer.draw(self.count, view.generator(f"latent/{experience.trajectory.id}")))
        return ()

    def after_update_(self, experience: Experience, view: View) -> None:
        """Offer what the frozen part makes of the experience, unless it is kept already."""
        trajectory = experience.trajectory
        if trajectory.id in self.buffer:
            return
        if not experience.batches:
            raise FeatclError(f"latent_replay: {trajectory.id!r} has no tokens of its own to predict")
        record = b"".join(_framed(latent_record(batch, view.student)) for batch in experience.batches)
        self._forward += tokens_read(experience.batches)
        self.buffer.add_(record, experience, view)

    def penalty(self, student: Student) -> Float[Tensor, ""]:
        """Mean over the drawn of weight · NLL per token; 0 while nothing is kept."""
        total = 0.0 * student.adapter.parameters()[0].float().sum()  # with a graph, also where nothing is drawn
        for entry in self._drawn:
            found = [load_record(part) for part in _frames(self.buffer.read(entry))]
            count = sum(batch.tokens for batch, _ in found)
            for batch, state in found:
                self._partly += batch.input_ids.numel()
                total = total + entry.weight / len(self._drawn) * latent_nll(batch, state, student) / count
        return total

    def cost(self) -> Cost:
        """The buffer; tokens replayed count in full, though the blocks below the adapter read none of them."""
        return Cost(
            self.buffer.stored_bytes,
            self._forward + self._partly + self.buffer.forward_tokens,
            self._partly + self.buffer.backward_tokens,
        )

    def state(self) -> dict[str, Any]:
        """The buffer's, and what was replayed."""
        return {"buffer": self.buffer.state(), "forward": self._forward, "partly": self._partly}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self.buffer.load_state_(state["buffer"])
        self._forward, self._partly, self._drawn = state["forward"], state["partly"], ()

    def tensors(self) -> dict[str, Tensor]:
        """The buffer's."""
        return self.buffer.tensors()

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self.buffer.load_tensors_(tensors)


@dataclass(frozen=True, eq=False)
class _Penalty:
    """What the learner adds to its loss."""

    method: LatentReplay
    metric: str = "replay/latent_nll"

    def penalty(self, student: Student) -> Float[Tensor, ""]:
        return self.method.penalty(student)


def frozen_part(student: Student) -> int:
    """The lowest adapted block.

    Raises:
        FeatclError: Where nothing lies below it.
    """
    causal = student.scorer.causal
    layer = trunk_end(causal)
    if not 0 < layer < len(blocks(causal)):
        raise FeatclError(
            f"latent_replay: the lowest adapter is at block {layer}, so there is no frozen part to start above; "
            "put the adapters into higher blocks (adapter.layers), or use replay"
        )
    return layer


def latent_record(batch: TokenBatch, student: Student) -> bytes:
    """A batch and the quantised stream below its lowest adapter, as safetensors.

    Raises:
        FeatclError: Where nothing lies below.
    """
    from safetensors.torch import save

    causal, layer = student.scorer.causal, frozen_part(student)
    hidden = run_trunk(causal, batch.input_ids, layer=layer).hidden
    assert hidden is not None
    q, scale = quantised(hidden)
    ids = {name: getattr(batch, name).to("cpu", torch.int32) for name in BATCH}
    layers = {"layer": torch.tensor(layer, dtype=torch.int32)}
    return save({"q": q.cpu().contiguous(), "scale": scale.cpu().contiguous(), **ids, **layers})


def load_record(data: bytes) -> tuple[TokenBatch, TrunkState]:
    """What `latent_record` made, on the CPU."""
    from safetensors.torch import load

    found = load(data)
    batch = TokenBatch(*(found[name].long() for name in BATCH))
    hidden = dequantised(found["q"], found["scale"])
    return batch, TrunkState(int(found["layer"]), hidden, {"input_ids": batch.input_ids})


def latent_nll(batch: TokenBatch, state: TrunkState, student: Student) -> Float[Tensor, ""]:
    """Sum of negative log-likelihoods in nats, from the kept stream on."""
    scorer = student.scorer
    if (layer := trunk_end(scorer.causal)) < state.layer:
        raise FeatclError(
            f"latent_replay: activations were kept above block {state.layer}, but block {layer} is adapted by now"
        )
    assert state.hidden is not None
    ids = batch.input_ids.to(scorer.device)
    hidden = state.hidden.to(scorer.device, next(scorer.causal.parameters()).dtype)
    with resumed(scorer.causal, TrunkState(state.layer, hidden, {"input_ids": ids})):
        output = scorer.trunk(input_ids=ids, use_cache=False).last_hidden_state
    rows = output.flatten(0, 1).index_select(0, batch.positions.to(scorer.device))
    return nll_sum(rows, batch.targets.to(scorer.device), scorer.head, width=scorer.logit_width)


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def _frames(data: bytes) -> list[bytes]:
    parts, start = [], 0
    while start < len(data):
        end = start + 8 + int.from_bytes(data[start : start + 8], "little")
        parts.append(data[start + 8 : end])
        start = end
    return parts
