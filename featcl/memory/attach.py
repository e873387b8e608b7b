"""A memory on a frozen Hugging Face model: hooks on one block, and on the decoder that runs it.

    attached = attach_memory(model, memory, layer=3)
    with attached.writing():
        model(**document)                  # read it: the state after it is kept
    model.generate(**question)             # starts from the kept state, leaves no trace

The model's modules, weights and state dictionary stay as they are. See `featcl.memory.kept` for whose state a pass
starts from and what becomes of it, and `featcl.memory.branch` for the forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.memory.branch import Branch, Form
from featcl.memory.features import FeatureMemory
from featcl.memory.hooked import SHELF, HookedMemory
from featcl.models import inner_model, residual_map, residual_stream, resolve_hook


class AttachedMemory(HookedMemory):
    """A memory on a block of a model.

    Attributes:
        model: The model that it was attached to.
        memory: The memory: its slow weights are trained by `parameters()`, its state is `state`.
        layer: The block.
        branch: The memory with its gate, as a function of the stream and of where it stands.
    """

    def __repr__(self) -> str:
        numbers = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"AttachedMemory(form={self.form!r}, layer={self.layer}, trained={numbers:,}, "
            f"gate={float(self.branch.gate.detach().norm()):.4g}, state={self.state!r}, users={len(self.users)})"
        )

    @property
    def form(self) -> Form:
        """How it is attached."""
        return self.branch.form  # type: ignore[return-value]

    # --- what is trained

    def parameters(self) -> list[nn.Parameter]:
        """The slow weights, the gate and what else the form has, in a fixed order: hand them to an optimizer."""
        return list(self.branch.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what `parameters` gives, by name, detached."""
        return {name: tensor.detach().clone() for name, tensor in self.branch.named_parameters()}

    @torch.no_grad()
    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite what is trained with what `tensors` returned.

        Raises:
            FeatclError: If a name is missing or unknown, or a shape differs; nothing is changed then.
        """
        named = dict(self.branch.named_parameters())
        if differ := sorted(named.keys() ^ tensors.keys()):
            where = "lack" if differ[0] in named else "hold the unknown"
            raise FeatclError(f"memory: the tensors {where} {differ[0]}; they are of another memory")
        for name, parameter in named.items():
            if parameter.shape != tensors[name].shape:
                raise FeatclError(f"memory: {name} is {list(tensors[name].shape)}, here it is {list(parameter.shape)}")
        for name, parameter in named.items():
            parameter.copy_(tensors[name])

    # --- the switch

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this memory inside the block, bit-equal; nothing is read or written. May be nested."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def detach(self) -> Any:
        """Take all hooks off; returns the model, as it was before."""
        self._remove_()
        return self.model

    # --- what it knows

    @torch.no_grad()
    def surprise(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Mean inner loss per token of each row, read from the kept state: how new the text is to the memory.

        Blocks above this one are not run, and nothing is written, by any memory on the model.

        Raises:
            FeatclError: If the memory is switched off or detached, or a row has no token.
        """
        if self._off or not self._handles:
            raise FeatclError(f"memory at layer {self.layer}: it is switched off, so nothing can surprise it")
        if input_ids.ndim != 2:
            raise FeatclError(f"memory: surprise is of input_ids [batch, seq], not of {list(input_ids.shape)}")
        if input_ids.shape[1] == 0:
            raise FeatclError(f"memory at layer {self.layer}: a row without tokens has no surprise")
        self._measured = []
        try:
            with ExitStack() as stack:
                for memory in memories_of(self.model):
                    stack.enter_context(memory.held())
                residual_stream(self.model, input_ids, attention_mask, layer=self.layer)
            [losses] = self._measured
        finally:
            self._measured = None
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        counts = real.to(losses).sum(-1)
        if not bool(counts.all()):
            raise FeatclError(f"memory at layer {self.layer}: a row without tokens has no surprise")
        return (losses * real.to(losses)).sum(-1) / counts

    def save(self, folder: str | Path) -> None:
        """Write slow weights, gate and states; `featcl.memory.load_memory(folder, model)` reads them."""
        from featcl.memory.saved import save_attached

        save_attached(folder, self)


def attach_memory(
    model: Any, memory: Any, *, layer: int, form: Form = "gate", window: int = 64, seed: int = 0
) -> AttachedMemory:
    """Attach a memory to a block of a frozen model; until it is trained, logits are bit-equal to those without it.

    Args:
        model: A causal language model that `featcl.models.residual_map` knows, adapted or not; its weights stay frozen.
        memory: `NeuralMemory(d_model, …)` or `FeatureMemory`.
        layer: The block.
        form: `gate`, a branch beside the block; `context`, an attention of its own over what was retrieved for the last
            tokens; `layer`, before the block. See `featcl.memory.branch`.
        window: How many tokens back `context` looks.
        seed: Of its projections.

    Returns:
        What reads, writes, trains, saves and detaches it.

    Raises:
        FeatclError: If the model is no decoder with a residual stream, the layer is out of range, taken, or not that of
            the features, the width is another, or the form unknown.

    Source: Behrouz et al. 2024, arXiv:2501.00663, section 4.
    """
    if not hasattr(inner_model(model), "config"):
        raise FeatclError(f"memory: {type(model).__name__} is no Hugging Face language model")
    here = residual_map(model)
    if type(layer) is not int or not 0 <= layer < here.n_layers:
        raise FeatclError(f"memory: layer {layer!r} is out of range, the model has blocks 0 to {here.n_layers - 1}")
    if any(other.layer == layer for other in memories_of(model)):
        raise FeatclError(f"memory: block {layer} has a memory already; detach it first, or choose another block")
    if isinstance(memory, FeatureMemory) and (own := resolve_hook(model, memory.directions.hook_name)[1]) != layer:
        raise FeatclError(f"memory: its features live at the output of block {own}, not of block {layer}")
    branch = Branch(memory, width=here.d_model, form=form, window=window, seed=seed)
    return AttachedMemory(model, branch, layer=layer)


def memories_of(model: Any) -> list[AttachedMemory]:
    """The memories attached to a model, in the order in which they were attached."""
    return list(vars(inner_model(model)).get(SHELF, ()))
