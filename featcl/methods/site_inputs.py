"""What each trained matrix reads: an update X of it changes nothing for inputs z with X z = 0.

Every LoRA update is linear in each trained matrix, ΔW a = L X z, with

| trained                     | X      | z                                      |
|-----------------------------|--------|----------------------------------------|
| lora_A of `none`, `write`   | A, C   | a, the linear's own input              |
| a factor C₂ Qᵀ              | C₂     | Qᵀ a, the features' coordinates        |
| lora_B of `none`, `read`    | B, C   | lora_A a, at most rank wide            |
| `residual`, `gated`         | C      | Q_rᵀ h, or the features' activations   |

`shift` and `scale` train no matrix. Inputs are taken with the adapter active, as the next task will see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from featcl.adapters.hooked import HookedBlock, activations
from featcl.adapters.lora import LoraSite
from featcl.errors import FeatclError
from featcl.objectives.experience import Experience, Student
from featcl.objectives.scoring import TokenBatch

Read = Callable[[Tensor], Tensor]


@torch.no_grad()
def inputs_of(
    experiences: Sequence[Experience], student: Student, *, limit: int, generator: torch.Generator, method: str
) -> tuple[dict[str, Float[Tensor, "tokens width"]], int]:
    """The inputs of every trained matrix, by its name, at tokens that can influence a target.

    Args:
        experiences: What is read.
        student: The adapted model.
        limit: At most so many tokens are kept, drawn evenly from all; an experience counts by its length.
        generator: Of the draw.
        method: Named in an error.

    Returns:
        The inputs, and how many tokens were read for them.

    Raises:
        FeatclError: If there is no target, or the kind trains no matrix.
    """
    parts: list[dict[str, Tensor]] = []
    batches = [batch for experience in experiences for batch in experience.batches]
    counted = [influential(batch) for batch in batches]
    keep = _draw(sum(int(mask.sum()) for mask in counted), limit, generator)
    done = 0
    with recorded(student.adapter, method) as seen:
        for batch, mask in zip(batches, counted, strict=True):
            size = int(mask.sum())
            mine, done = keep[(keep >= done) & (keep < done + size)] - done, done + size
            if len(mine):
                student.scorer.hidden(batch)
                chosen = mask.flatten().nonzero()[:, 0][mine.to(mask.device)]
                parts.append({name: value.flatten(0, -2)[chosen.to(value.device)] for name, value in seen.items()})
    if not parts:
        raise FeatclError(f"{method}: the experiences have no targets, so nothing was read on which to stay the same")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, sum(map(_size, batches))


def _size(batch: TokenBatch) -> int:
    return batch.input_ids.numel()


def _draw(total: int, limit: int, generator: torch.Generator) -> Tensor:
    """Which of `total` tokens to keep, in order."""
    if total <= limit:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:limit].sort().values


def influential(batch: TokenBatch) -> Bool[Tensor, "batch seq"]:
    """True at and before the last position of a sequence that predicts a target; padding never is."""
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    mask.view(-1)[batch.positions] = True
    return mask.flip(-1).cummax(-1).values.flip(-1)


@contextmanager
def recorded(adapter: Any, method: str) -> Iterator[dict[str, Tensor]]:
    """Inside the block, every forward pass leaves the input of each trained matrix in the dictionary, by its name."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module, read in _places(adapter, method):

            def record(_module: nn.Module, inputs: Any, name: str = name, read: Read = read) -> None:
                seen[name] = read(inputs[0].detach()).float()

            stack.callback(module.register_forward_pre_hook(record).remove)
        yield seen


def need_matrices(adapter: Any, method: str) -> None:
    """Raise FeatclError for a kind that trains no matrix."""
    list(_places(adapter, method))


def _places(adapter: Any, method: str) -> Iterator[tuple[str, nn.Module, Read]]:
    """(name of a trained matrix, the module to listen to, from its input to that of the matrix)."""
    for site in adapter.sites:
        if isinstance(site, LoraSite):
            for which in site.trained:
                yield f"{site.name}.{which}", site.factor(which), _coordinates_of(site, which)
        elif isinstance(site, HookedBlock) and site.coordinates.ndim == 2:
            yield f"{site.name}.C", site, _hook_read(site)
        else:
            raise FeatclError(
                f"{method}: kind {adapter.kind!r} trains no matrix beside a weight or a hook, so it has no inputs to "
                "keep clear of"
            )


def _coordinates_of(site: LoraSite, which: str) -> Read:
    basis = site.frozen.get(f"{which}.basis")
    if basis is None or which == "lora_B":
        return lambda value: value
    return lambda value: value.float() @ basis.to(value.device)


def _hook_read(block: HookedBlock) -> Read:
    def read(hidden: Tensor) -> Tensor:
        stream = hidden.float()
        if block.encoder is not None:
            found = activations(block.encoder, stream).float()
        else:
            assert block.read_basis is not None
            found = stream @ block.read_basis
        return found if block.frame is None else found @ block.frame.T

    return read
