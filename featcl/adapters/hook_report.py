"""What a hook adapter does, from feature to feature.

C lives in Löwdin coordinates; in features it is X = M_w C M_r, M = (D Dᵀ)^(-1/2), exactly Dᵀ X E = Q_w C Q_rᵀ:
h moves by X[i, j] · d_i for every unit of what is read of feature j.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl.adapters.hooked import HookedBlock
from featcl.adapters.sets import feature_ids, feature_names

READS = {
    "residual": "the stream's component along the feature's encoder column",
    "gated": "the feature's own activation",
    "shift": "nothing: the same at every token",
    "scale": "the stream's component along the feature's decoder row",
}
"""What a strength is per unit of."""


@dataclass(frozen=True)
class FeatureLink:
    """How strongly an update writes one feature when another is active.

    Attributes:
        writes: Index of the written feature.
        writes_name: Where known, else empty.
        reads: Index of the feature that triggers it; None where nothing is read (`shift`).
        reads_name: Where known, else empty.
        strength: Signed, along the unit decoder row, per unit of what is read.
        share: `strength`² as a share of the sum of squares over all links.
        site: Module path of the block.
    """

    writes: int
    writes_name: str
    reads: int | None
    reads_name: str
    strength: float
    share: float
    site: str

    def __str__(self) -> str:
        when = "always" if self.reads is None else f"when feature {_named(self.reads, self.reads_name)} is active"
        return f"writes feature {_named(self.writes, self.writes_name)} {self.strength:+.4g} {when}"


@dataclass(frozen=True)
class LinkReport:
    """The strongest links of an update, strongest first.

    Attributes:
        rows: One per pair of written and read feature.
        delta_norm: Of the whole update.
        per_unit_of: What a strength is per unit of.
    """

    rows: tuple[FeatureLink, ...]
    delta_norm: float
    per_unit_of: str

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as dictionaries, for `pandas.DataFrame(report.to_dicts())` or JSON."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        head = f"update of norm {self.delta_norm:.4g}; strengths per unit of {self.per_unit_of}"
        return "\n".join([head, *(f"{row}  ({row.share:.1%}, {row.site})" for row in self.rows)])

    def _repr_html_(self) -> str:
        titles = ("writes", "strength", "when active", "share", "block")
        head = "".join(f"<th>{title}</th>" for title in titles)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(row))}</tr>" for row in self.rows
        )
        caption = f"update of norm {self.delta_norm:.4g}; strengths per unit of {html.escape(self.per_unit_of)}"
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"


@torch.no_grad()
def link_table(site: HookedBlock) -> Float[Tensor, "k_w k_r"]:
    """X = M_w C M_r: what every unit read of feature j writes along unit decoder row i.

    `gated` has X = M_w C, since it reads activations themselves; `shift` one column. Under `protect` the bases are
    smaller than the sets, and X is still exact.
    """
    plan, device = site.plan, site.plan.write.vectors.device
    table = plan.write.in_features(site.write_basis.to(device)) @ site.matrix().to(device)
    if site.read_basis is not None and plan.read is not None:
        table = table @ plan.read.in_features(site.read_basis.to(device)).T
    return table.float().cpu()


def link_report(sites: Sequence[HookedBlock], *, kind: str, delta_norm: float, top: int) -> LinkReport:
    """The `top` strongest links over all blocks; links of strength 0 are left out."""
    tables = [link_table(site).double() for site in sites]
    total = sum(float(table.square().sum()) for table in tables)
    rows = [row for site, table in zip(sites, tables, strict=True) for row in _strongest(site, table, total, top)]
    rows.sort(key=lambda row: -abs(row.strength))
    return LinkReport(tuple(rows[:top]), delta_norm, READS[kind])


def _strongest(site: HookedBlock, table: Tensor, total: float, top: int) -> list[FeatureLink]:
    plan = site.plan
    written, names = feature_ids(plan.directions), feature_names(plan.directions)
    read: list[int] | None = None
    read_names: dict[int, str] = {}
    if plan.kind != "shift":
        source = plan.directions if plan.gate is None else plan.gate
        read, read_names = feature_ids(source), feature_names(source)
    found = []
    for place in torch.sort(table.abs().flatten(), descending=True, stable=True).indices[:top].tolist():
        row, column = divmod(place, table.shape[1])
        strength = float(table[row, column])
        if strength == 0.0:
            break
        reads = None if read is None else read[column]
        name = "" if reads is None else read_names.get(reads, "")
        share = strength**2 / total
        found.append(FeatureLink(written[row], names.get(written[row], ""), reads, name, strength, share, site.name))
    return found


def _cells(row: FeatureLink) -> tuple[str, ...]:
    reads = "always" if row.reads is None else _named(row.reads, row.reads_name)
    return _named(row.writes, row.writes_name), f"{row.strength:+.4g}", reads, f"{row.share:.1%}", row.site


def _named(feature: int, name: str) -> str:
    return f"{feature} ({name})" if name else str(feature)
