"""Where a text lies, by the model's own activations: vectors that methods compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from featcl.memory.attach import memories_of
from featcl.models import residual_stream
from featcl.objectives.experience import Student
from featcl.objectives.scoring import TokenBatch


@contextmanager
def base_alone(student: Student) -> Iterator[None]:
    """Inside the block the model is the base: no adapter acts, and no memory, so what is read never grows stale."""
    with ExitStack() as stack:
        stack.enter_context(student.adapter.disabled())
        for memory in memories_of(student.adapter.model):
            stack.enter_context(memory.disabled())
        yield


@torch.no_grad()
def mean_activation(batches: Sequence[TokenBatch], student: Student) -> Float[Tensor, " d_model"]:
    """Mean of the base model's last hidden states where it predicts the targets, float32, on the CPU."""
    with base_alone(student):
        rows = torch.cat([student.scorer.hidden(batch).float() for batch in batches])
    return rows.mean(0).cpu()


@torch.no_grad()
def token_vectors(text: str, student: Student, *, layer: int) -> Float[Tensor, "tokens d_model"]:
    """The base model's residual stream after a block at each token of a text, bfloat16, on the CPU.

    Not float16: some models have a few activations beyond its largest number.

    Args:
        text: Read as a user's turn, cut at the longest sequence; with at least one token.
        student: Its base is asked.
        layer: The block.
    """
    turn = student.chat.encode([{"role": "user", "content": text}], mask="environment")
    places = [place for place, own in enumerate(turn.loss_mask[: student.max_length]) if own]
    ids = torch.tensor([turn.input_ids[: student.max_length]], device=student.scorer.device)
    with base_alone(student):
        stream = residual_stream(student.scorer.causal, ids, layer=layer)[0]
    return stream[places].bfloat16().cpu()


def late_interaction(
    query: Float[Tensor, "tokens d_model"], texts: Sequence[Float[Tensor, "_ d_model"]]
) -> Float[Tensor, " texts"]:
    """How well each text answers a query's tokens one by one.

        score(q, d) = mean over tokens i of q of  max over tokens j of d of  cos(q_i − m, d_j − m)

    m is the mean over the tokens of all texts, which takes out what all activations have in common.

    Source: Khattab and Zaharia 2020, ColBERT, arXiv:2004.12832, eq. 3 (its sum over i is a mean here).
    """
    mean = torch.cat([text.float() for text in texts]).mean(0)
    asked = normalize(query.float() - mean, dim=-1)
    return torch.stack([(asked @ normalize(text.float() - mean, dim=-1).T).amax(1).mean() for text in texts])
