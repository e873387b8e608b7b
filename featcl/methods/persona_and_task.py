"""Persona and task adapters active together: the persona's LoRA is frozen, and what is learned is added to it.

    ΔW = ΔW_persona (frozen) + ΔW_task (trained from 0)

The persona comes from a folder, or is what the learner learns in its first task. Both lie in one adapter (its second,
frozen LoRA), so that they are switched, saved, exported and rolled back together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcl.adapters.export import PlainLora, load_peft
from featcl.adapters.kept import attach_kept_, concatenated
from featcl.adapters.lora import LoraSite
from featcl.errors import FeatclError
from featcl.methods.fresh_lora import freeze_and_restart_, lora_sites
from featcl.methods.method import Cost, Method, View
from featcl.models import inner_model
from featcl.objectives.experience import Experience


class PersonaAndTask(Method):
    """A persona that stays as it is, beside a LoRA that goes on learning.

    Args:
        folder: The persona as a plain PEFT folder, on modules that the adapter adapts too; None: the first task is it.

    Raises:
        FeatclError: If the folder holds no plain LoRA; with a learner whose adapter is no LoRA, or of whose modules the
            persona has other ones, or other shapes.

    Source: ours; ΔW that add as in task arithmetic (Ilharco et al. 2022, arXiv:2212.04089, section 2).
    """

    name = "persona_and_task"
    moves_adapter = True

    def __init__(self, *, folder: str | Path | None = None) -> None:
        self.persona: PlainLora | None = None if folder is None else load_peft(folder)
        self._first: str | None = None
        self._frozen_bytes = 0

    @property
    def frozen_bytes(self) -> int:
        """Of the persona; 0 as long as it is being learned."""
        return self._frozen_bytes

    def refuse(self, view: View) -> None:
        """A kind that is no LoRA, or a persona that does not fit."""
        sites = lora_sites(view.student.adapter, self.name)
        if self.persona is not None:
            _check_fits(self.persona, sites, inner_model(view.student.adapter.model).config.name_or_path)

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Put the persona there, or freeze what the first task learned."""
        if self._frozen_bytes:
            return
        adapter = view.student.adapter
        if self.persona is not None:
            self._frozen_bytes = _attach_(adapter, lora_sites(adapter, self.name), self.persona)
        elif self._first is None:
            self._first = task
        elif task != self._first:
            self._frozen_bytes = freeze_and_restart_(adapter, view.generator(f"{self.name}/{task}"), self.name)

    def cost(self) -> Cost:
        """The persona's LoRA."""
        return Cost(stored_bytes=self._frozen_bytes)

    def state(self) -> dict[str, Any]:
        """Plain values; the persona itself is among the adapter's coordinates."""
        return {"first": self._first, "frozen_bytes": self._frozen_bytes}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._first, self._frozen_bytes = state["first"], int(state["frozen_bytes"])


def _attach_(adapter: Any, sites: Sequence[LoraSite], persona: PlainLora) -> int:
    """Add the persona to the frozen LoRA; its bytes."""
    kept = {}
    for site in sites:
        parts = [(site.kept["lora_A"], site.kept["lora_B"])] if site.kept else []
        parts += [persona.factors[site.name]] if site.name in persona.factors else []
        if parts:
            kept[site.name] = concatenated(parts)
    attach_kept_(adapter.model, sites, kept)
    return sum(tensor.nbytes for site in sites for tensor in site.kept.values())


def _check_fits(persona: PlainLora, sites: Sequence[LoraSite], model: str) -> None:
    if persona.base and model and Path(persona.base).name != Path(model).name:
        raise FeatclError(f"persona_and_task: the persona belongs to {persona.base}, this model is {model}")
    modules = {site.name: site.module for site in sites}
    for name, (a, b) in persona.factors.items():
        if name not in modules:
            raise FeatclError(f"persona_and_task: the persona changes {name}, which the adapter does not adapt")
        here = [modules[name].out_features, modules[name].in_features]
        if [b.shape[0], a.shape[1]] != here:
            raise FeatclError(f"persona_and_task: {name} is {here} here, for the persona {[b.shape[0], a.shape[1]]}")
