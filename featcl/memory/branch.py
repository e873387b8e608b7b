"""What an attached memory adds to the residual stream, as a function of the stream and of where the memory stands.

With x = h / rms(h) the normalised input of a block and r = M(x) what the memory retrieves,

| form      | h ← …                             | Titans                              |
|-----------|-----------------------------------|-------------------------------------|
| `gate`    | block(h) + rms(h) · g ⊙ r         | as a gated branch beside the block  |
| `context` | block(h) + rms(h) · g ⊙ read(x, r) | as a context: see `context.py`      |
| `layer`   | block(h + rms(h) · g ⊙ r)         | as a layer before the block         |

The gate g [d_model] is 0 at the start, so that nothing is added. rms(h) makes the gate a share of the stream, whose
norm differs a hundredfold between models, layers and tokens. A `FeatureMemory` reads the stream
h' after the block, where its SAE is valid, as it is, and its gate is one number: what is added, g · M(h'), stays in the
span of the features that it may write.

Source: Behrouz et al. 2024, arXiv:2501.00663, sections 4.1 to 4.3; zero-initialised gates: Alayrac et al. 2022,
arXiv:2204.14198, section 2.2.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.memory.base import StreamMemory
from featcl.memory.carried import Carried
from featcl.memory.context import ContextRead
from featcl.memory.features import FeatureMemory

Form: TypeAlias = Literal["gate", "context", "layer"]
FORMS: tuple[str, ...] = get_args(Form)
EPS = 1e-6
"""Added to the mean square of the stream."""


class Branch(nn.Module):
    """A memory with its gate, and for `context` with its attention.

    Args:
        memory: `NeuralMemory` or `FeatureMemory`.
        width: d_model.
        form: A row of the table above.
        window: Of the attention of `context`.
        seed: Of its projections.

    Attributes:
        gate: g, zeros.
        read: The attention of `context`, else None.

    Raises:
        FeatclError: For an unknown form, another width, or a constrained memory in another form than `gate`.
    """

    def __init__(self, memory: Any, *, width: int, form: str, window: int = 64, seed: int = 0) -> None:
        super().__init__()
        if form not in FORMS:
            raise FeatclError(f"memory: unknown form {form!r}; choose from {', '.join(FORMS)}")
        if not isinstance(memory, StreamMemory):
            raise FeatclError(f"memory: a {type(memory).__name__} is no memory; NeuralMemory or FeatureMemory is meant")
        if memory.width != width:
            raise FeatclError(f"memory: its width is {memory.width}, but the model's residual stream has {width}")
        self.constrained = isinstance(memory, FeatureMemory)
        if self.constrained and form != "gate":
            raise FeatclError(
                f"memory: form {form!r} would leave the span of the features that it may write; use form 'gate'"
            )
        self.memory, self.form = memory, form
        self.gate = nn.Parameter(torch.zeros(1 if self.constrained else width))
        self.read = ContextRead(width, heads=memory.heads, window=window, seed=seed) if form == "context" else None

    def forward(
        self,
        stream: Float[Tensor, "batch seq width"],
        start: Carried,
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq width"], Carried]:
        """What is added to the stream, at least float32, and where the memory stands then.

        Args:
            stream: What the memory reads.
            start: Where it stands before.
            mask: False where there is padding; nothing is read, written or added there.
        """
        with torch.autocast(stream.device.type, enabled=False):
            x, scale = self.normalised(stream, mask)
            found, state = self.memory(x, start.state, mask=mask)
            past = None
            if self.read is not None:
                found, past = self.read(x, found, start.past, mask=mask)
                found = found if mask is None else found.masked_fill(~mask[..., None], 0.0)
            return scale * (self.gate * found), Carried(state, past)

    def normalised(
        self, stream: Float[Tensor, "batch seq width"], mask: Bool[Tensor, "batch seq"] | None
    ) -> tuple[Float[Tensor, "batch seq width"], Float[Tensor, "batch seq 1"]]:
        """x and rms(h), in the dtype of the gate; padding becomes 0, since anything may stand there."""
        wide = stream.to(self.gate.dtype)
        if mask is not None:
            wide = wide.masked_fill(~mask[..., None], 0.0)
        if self.constrained:
            return wide, torch.ones_like(wide[..., :1])
        scale = (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
        return wide / scale, scale
