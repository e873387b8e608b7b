"""Rehearsal of given material: instruction data, pretraining text, or anything else that is not from the stream.

    loss = L(new) + s / (1 − s) · mean over the drawn of L(drawn_i)

The material is fixed, so that nothing of the stream is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.features.provenance import text_blocks
from featcl.features.tokens import read_texts
from featcl.methods import checks
from featcl.methods.method import Cost, Method, View
from featcl.methods.replay import check_share
from featcl.methods.tokens import again, tokens_read
from featcl.objectives.experience import Experience
from featcl.streams.readers import read_trajectories
from featcl.streams.trajectory import Trajectory


class Rehearsal(Method):
    """Learns from a fixed material beside each new experience.

    Args:
        material: Conversations, or raw texts of which every token counts.
        share: Share of the update that is rehearsal, in (0, 1).
        count: How many are drawn per update.

    Raises:
        FeatclError: Without material, with an id twice, or a number out of range.

    Source: pretraining or instruction data as rehearsal, Scialom et al. 2022, arXiv:2205.12393.
    """

    name = "rehearsal"

    def __init__(self, *, material: Sequence[Trajectory], share: float = 0.5, count: int = 1) -> None:
        checks.count(self.name, count=count)
        self.share, self.count = check_share(self.name, share), count
        self.material = tuple(material)
        if not self.material:
            raise FeatclError("rehearsal: no material is given; a file of texts or trajectories is needed")
        if len({each.id for each in self.material}) < len(self.material):
            raise FeatclError("rehearsal: two trajectories of the material have one id; ids are unique in it")
        self._bytes = sum(len(json.dumps(each.to_record())) for each in self.material)
        self._forward = 0

    @classmethod
    def of_file(cls, path: str | Path, *, share: float = 0.5, count: int = 1) -> Rehearsal:
        """With the trajectories of a stream file, or the blocks of a text file (.txt, .txt.gz)."""
        return cls(material=read_material(path), share=share, count=count)

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """Some of the material, each with its weight."""
        generator = view.generator(f"rehearsal/{experience.trajectory.id}")
        places = torch.randperm(len(self.material), generator=generator)[: self.count].tolist()
        each = self.share / (1.0 - self.share) / len(places)
        found = [again(self.material[place], view, weight=each, purpose="rehearsal") for place in places]
        self._forward += sum(tokens_read(rehearsed.batches) for rehearsed in found)
        return found

    def cost(self) -> Cost:
        """The material as JSON, and what was rehearsed."""
        return Cost(self._bytes, self._forward, self._forward)

    def state(self) -> dict[str, Any]:
        """What was rehearsed; the draws are functions of the version."""
        return {"forward": self._forward}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self._forward = state["forward"]


def read_material(path: str | Path) -> list[Trajectory]:
    """Trajectories of a stream file; or of a text file, its blocks as raw text."""
    path = Path(path)
    if path.name.removesuffix(".gz").endswith(".txt"):
        blocks = [block for text in read_texts(path) for block in text_blocks(text)]
        return [Trajectory(f"{path.name}/{place}", source=path.name, text=text) for place, text in enumerate(blocks)]
    return list(read_trajectories(path))
