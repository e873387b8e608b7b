"""What an adapter writes outside the chosen span, measured at its own output while the model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featcl.adapters.lora import LoraSite
from featcl.adapters.norms import share_outside, squared_norm
from featcl.adapters.sets import Role
from featcl.errors import FeatclError
from featcl.html import facts_card, long_table
from featcl.models import inner_model, residual_map, residual_stream
from featcl.subspace import independent_rows, lowdin

if TYPE_CHECKING:
    from featcl.adapters.hook_adapter import HookAdapter
    from featcl.adapters.lora_adapter import LoraAdapter

EXCLUDED = "padding, and a start token in first place"


@dataclass(frozen=True)
class SiteLeak:
    """The leak of one linear layer, or of one side of a hook.

    Attributes:
        role: `write` or `read`.
        leak: Writers: ‖outside span(D)‖ / ‖written‖ over the counted tokens. Readers: ‖ΔW (I - Q_r Q_rᵀ)‖ / ‖ΔW‖, the
            row space. NaN for a zero update.
        rescale: Writers: ‖rescale‖ / ‖rescale + written‖, the share of the change that only rescales the base write
            (0 without post-norm). NaN for readers.
        clamped: Coordinates whose norm gain could not be inverted; such a module is exempt from the theorem.
    """

    role: Role
    leak: float
    rescale: float
    clamped: tuple[int, ...] = ()


@dataclass(frozen=True)
class LeakReport:
    """How far an adapter kept to its promise on a batch of text.

    Attributes:
        leak: The worst site's; exempt and unmoved sites left out; NaN where no site is left, as for a zero update.
        rescale: Mean over the write sites that moved; NaN without any.
        total_change_outside: ‖outside span(D)‖ / ‖change‖ of the residual stream at the top hook. Descriptive: base
            blocks react to changed inputs, so it is large even where every write is exact.
        per_site: By module path; what a hook kind reads is at `{module path}.read`.
        exempt: Modules with a gain that could not be inverted, left out of `leak`.
        tokens: How many were counted.
        excluded: What was not.
    """

    leak: float
    rescale: float
    total_change_outside: float
    per_site: dict[str, SiteLeak]
    exempt: tuple[str, ...]
    tokens: int
    excluded: str = EXCLUDED

    def _repr_html_(self) -> str:
        sites = [(name, site.role, site.leak, site.rescale) for name, site in self.per_site.items()]
        facts = {
            "leak, worst site": self.leak,
            "rescale, mean": self.rescale,
            "change of the stream outside the span": self.total_change_outside,
            "not exact in": ", ".join(self.exempt) or None,
            "measured on": f"{self.tokens} tokens, without {self.excluded}",
        }
        return facts_card("Leak", facts, long_table(("module", "role", "leak", "rescale"), sites))


@torch.no_grad()
def measure_leak(
    adapter: LoraAdapter,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None,
) -> LeakReport:
    """Run the adapted model and the base on a batch; measure every adapted site at one and the same input.

    Per write site, with x0 = W0 a and x1 = x0 + ΔW a: written = g ⊙ ΔW a / rms(x1), and
    rescale = (rms(x0) / rms(x1) - 1) · g ⊙ x0 / rms(x0); without post-norm written = ΔW a and rescale = 0.

    Raises:
        FeatclError: If no token counts, or the adapter is switched off.
    """
    keep = counted_tokens(adapter.model, input_ids, attention_mask)
    live = {site.name: site.gain for site in residual_map(adapter.model).writers}  # as it is now, not when planned
    writers = [site for site in adapter.sites if site.plan.role == "write"]
    meters = [_WriteMeter(site, live[site.name], keep) for site in writers]
    with _attached(meters):
        changed = residual_stream(adapter.model, input_ids, attention_mask, layer=adapter.hook_layer)
    if silent := [meter.site.name for meter in meters if not meter.calls]:
        raise FeatclError(f"{silent[0]}: the adapter did not run there; is it switched off or merged?")
    with adapter.disabled(only_this=True):
        base = residual_stream(adapter.model, input_ids, attention_mask, layer=adapter.hook_layer)
    per_site = {meter.site.name: meter.result() for meter in meters}
    per_site |= {site.name: _read_leak(site) for site in adapter.sites if site.plan.role == "read"}
    moved = [leak.leak for leak in per_site.values() if not leak.clamped and not math.isnan(leak.leak)]
    rescales = [leak.rescale for leak in per_site.values() if not math.isnan(leak.rescale)]
    return LeakReport(
        leak=max(moved, default=math.nan),
        rescale=sum(rescales) / len(rescales) if rescales else math.nan,
        total_change_outside=change_outside(adapter, (changed - base)[keep.to(changed.device)]),
        per_site={site.name: per_site[site.name] for site in adapter.sites},
        exempt=tuple(site.name for site in adapter.sites if site.plan.fold.clamped),
        tokens=int(keep.sum()),
    )


def counted_tokens(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Bool[Tensor, "batch seq"]:
    """True where a token enters the averages: not padding, and not a start token in first place.

    Raises:
        FeatclError: If nothing is left, or the batch is not [batch, seq].
    """
    _check_batch(input_ids, attention_mask)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    keep = mask.bool().clone()
    start = inner_model(model).config.get_text_config().bos_token_id
    rows = torch.arange(len(keep), device=keep.device)
    first = keep.int().argmax(dim=1)
    keep[rows, first] &= input_ids[rows, first] != (-1 if start is None else start)
    if not bool(keep.any()):
        raise FeatclError(f"no token to measure: only {EXCLUDED} in the batch")
    return keep


def _check_batch(input_ids: Any, attention_mask: Any) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        have = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise FeatclError(f"no token to measure: input_ids must be [batch, seq] with a token at least, not {have}")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        have = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise FeatclError(f"attention_mask must be {list(input_ids.shape)} like input_ids, not {have}")


class _WriteMeter:
    """Adds up, token by token, what one write site writes; keeps no activations."""

    def __init__(self, site: LoraSite, gain: Tensor | None, keep: Tensor) -> None:
        self.site, self.keep, self.calls = site, keep, 0
        self.gain = None if gain is None else gain.double()
        self.base = torch.empty(0)
        self.squares = torch.zeros(4, dtype=torch.float64)  # written, outside, rescale, change

    def on_base(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self.base = output[self.keep.to(output.device)].double()

    def on_update(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        update = output[self.keep.to(output.device)].double() * self.site.scale
        written, rescale = update, torch.zeros_like(update)
        if self.gain is not None:
            before, after = (_rms(x, self.site.plan.site.eps) for x in (self.base, self.base + update))
            written = self.gain * update / after
            rescale = (before / after - 1.0) * self.gain * self.base / before
        span = self.site.plan.fold.span.basis
        outside = written - (written @ span) @ span.T
        parts = (written, outside, rescale, written + rescale)
        self.squares += torch.stack([part.square().sum() for part in parts]).cpu()
        self.calls += 1

    def result(self) -> SiteLeak:
        written, outside, rescale, change = self.squares.sqrt().tolist()
        clamped = self.site.plan.fold.clamped
        if written == 0.0:
            return SiteLeak("write", math.nan, math.nan, clamped)
        return SiteLeak("write", outside / written, rescale / change if change else math.nan, clamped)


def _rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


@contextmanager
def _attached(meters: Sequence[_WriteMeter]) -> Iterator[None]:
    with ExitStack() as stack:
        for meter in meters:
            base, update = meter.site.module.base_layer, meter.site.factor("lora_B")
            stack.callback(base.register_forward_hook(meter.on_base).remove)
            stack.callback(update.register_forward_hook(meter.on_update).remove)
        yield


def _read_leak(site: LoraSite) -> SiteLeak:
    """‖B A (I - QQᵀ)‖ / ‖B A‖ by Gram matrices of the live factors: ‖B X‖² = tr(BᵀB · X Xᵀ)."""
    a, b = (_live_weight(site, which).double() for which in ("lora_A", "lora_B"))
    basis = site.plan.fold.basis
    outside = a - (a @ basis) @ basis.T
    total = squared_norm(a, b)
    leak = math.sqrt(squared_norm(outside, b) / total) if total > 0 else math.nan
    return SiteLeak("read", leak, math.nan, site.plan.fold.clamped)


def _live_weight(site: LoraSite, which: str) -> Tensor:
    weight: Any = site.factor(which).weight
    return weight.detach()


def change_outside(adapter: LoraAdapter | HookAdapter, change: Float[Tensor, "tokens d_model"]) -> float:
    """‖outside span(D)‖ / ‖change‖ of the residual stream at the adapter's top hook; NaN where nothing changed."""
    top = max((site.plan for site in adapter.sites), key=lambda plan: plan.hook_layer)
    vectors = top.directions.vectors.to(change.device)
    span = lowdin(vectors[independent_rows(vectors)], dtype=torch.float64).basis
    return share_outside(change.double(), span)
