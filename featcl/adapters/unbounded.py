"""What adapters have that no features bound: nowhere that their directions live, no span, no leak and no report."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor

from featcl.adapters.adapter import ConstrainedAdapter
from featcl.adapters.leak import LeakReport
from featcl.adapters.report import FeatureReport
from featcl.errors import FeatclError
from featcl.subspace import Subspace


class UnboundedAdapter(ConstrainedAdapter):
    """A rival of the constraint: it writes along no features and reads none."""

    @property
    def hook_layer(self) -> int:
        """There are no features, so it is the highest adapted block."""
        return self.top_layer

    def spans(self) -> dict[tuple[str, int], Subspace]:
        """None: it is not bounded in the residual stream."""
        return {}

    def leak(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None = None,
    ) -> LeakReport:
        """Not defined: there is no span to leak from.

        Raises:
            FeatclError: Always.
        """
        raise FeatclError(f"kind {self.kind!r} is bounded by no features, so there is nothing that it could leak from")

    def report(self, top: int = 20) -> FeatureReport:
        """Not defined: it writes along no features.

        Raises:
            FeatclError: Always.
        """
        raise FeatclError(f"kind {self.kind!r} writes along no features, so there is no table of them")
