"""L2 to the start: stay near the coordinates that learning, or the present task, started from.

    penalty = Σ_i (θ_i - θ_i(start))²

In trained coordinates; the anchor `l2_to_base` is ‖ΔW‖², the same for every basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from featcl.methods.checks import choice, positive
from featcl.methods.method import Cost, View
from featcl.methods.quadratic import Quadratic, Well, copies, nbytes
from featcl.objectives.experience import Experience


class L2ToStart(Quadratic):
    """The squared distance to the start, all numbers alike: EWC's control without importances.

    Args:
        strength: Its weight.
        start: `learning`, where the first task began, or `task`, where the present one did.

    Raises:
        FeatclError: If an argument is out of range.

    Source: `learning`: Li, Grandvalet, Davoine 2018, arXiv:1802.01483, eq. 2 (L2-SP); `task`: the L2 baseline of
    Kirkpatrick et al. 2017, arXiv:1612.00796, fig. 2A.
    """

    name = "l2_to_start"

    def __init__(self, *, strength: float = 1.0, start: str = "learning") -> None:
        positive(self.name, strength=strength)
        choice(self.name, ("learning", "task"), start=start)
        self.start = start
        super().__init__(strength=strength)

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """The start, if this is one."""
        if len(self.wells) and self.start == "learning":
            return
        centre = copies(view.parameters)
        ones = {name: torch.ones((), device=tensor.device) for name, tensor in centre.items()}
        self.wells.set_([Well(centre, ones)], changes=view.student.adapter.changes)

    def cost(self) -> Cost:
        """One copy of the trained tensors."""
        return Cost(stored_bytes=nbytes(self.tensors()))
