"""MiCA: write only along the base weight's smallest left singular directions.

    W₀ = U S Vᵀ,     lora_B = the last `rank` columns of U, frozen;     lora_A = 0, trained

The zero start is exact and the update is linear in A. PEFT has the same as `init_lora_weights="mica"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.methods.fresh_lora import need_kind_none
from featcl.methods.method import View
from featcl.methods.partly_frozen import PartlyFrozen
from featcl.objectives.experience import Experience


class MiCA(PartlyFrozen):
    """Minor component adaptation, on kind `none`.

    Raises:
        FeatclError: At the first task, if the kind is another or the rank above that of a weight.

    Source: arXiv:2604.01694, as PEFT 0.21 has it (`LoraLayer.mica_init`).
    """

    name = "mica"
    moves_adapter = True

    def refuse(self, view: View) -> None:
        """Another kind."""
        need_kind_none(view.student.adapter, self.name, "chooses lora_B itself")

    @torch.no_grad()
    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Before the first task, set both factors."""
        if self.frozen:
            return
        self.refuse(view)
        adapter = view.student.adapter
        for site in adapter.sites:
            weight: Any = site.module.get_base_layer().weight
            rank = site.trained["lora_B"].shape[1]
            if rank > min(weight.shape):
                raise FeatclError(
                    f"mica: {site.name} has {min(weight.shape)} singular directions, too few for rank {rank}"
                )
            u = torch.linalg.svd(weight.detach().float(), full_matrices=False).U
            site.trained["lora_B"].copy_(u[:, -rank:])
            site.trained["lora_A"].zero_()
        self.freeze_(f"{site.name}.lora_B" for site in adapter.sites)
