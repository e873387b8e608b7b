"""What learning costs: tokens read, FLOPs, seconds, peak memory and stored bytes, phase by phase.

    meter = CostMeter(adapter.model)
    with meter.phase("learning"):
        learner.observe(trajectory)
    meter.costs["learning"].flops.total

FLOPs are counted from the shapes of the passes that were made (`featcl.evaluation.flops`), by three hooks on the model:
none sits inside a block, so that a cached trunk stays one. What a cached trunk skips is not counted, nor is what lies
above the place where a pass was ended; a backward pass counts when its gradient arrives.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcl.errors import FeatclError
from featcl.evaluation.flops import FlopCounter, Flops
from featcl.models import inner_model

COSTS = "cost.json"  # of a run: what its phases cost, with what differs from run to run
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What something cost; costs add up, and of peaks the higher one stands.

    Attributes:
        tokens: Positions that passes read, padding included; a token that is read twice counts twice.
        passes: Forward passes, also those that were ended early.
        flops: From shapes.
        seconds: Wall clock.
        peak_rss_bytes: Most resident memory of the process meanwhile; where the system cannot reset its high-water
            mark (Linux can), the most since the process started, and `peak_is_of_phase` is False.
        peak_is_of_phase: Whether it is the phase's own.
        peak_cuda_bytes: Most memory that torch held on the model's GPU meanwhile; 0 on a CPU.
        stored_bytes: What is left on disk, where that was measured.
    """

    tokens: int = 0
    passes: int = 0
    flops: Flops = field(default_factory=Flops)
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_is_of_phase: bool = True
    peak_cuda_bytes: int = 0
    stored_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            tokens=self.tokens + other.tokens,
            passes=self.passes + other.passes,
            flops=self.flops + other.flops,
            seconds=self.seconds + other.seconds,
            peak_rss_bytes=max(self.peak_rss_bytes, other.peak_rss_bytes),
            peak_is_of_phase=self.peak_is_of_phase and other.peak_is_of_phase,
            peak_cuda_bytes=max(self.peak_cuda_bytes, other.peak_cuda_bytes),
            stored_bytes=self.stored_bytes + other.stored_bytes,
        )

    def record(self) -> dict[str, float]:
        """Flat scalars by the names that the trackers use, without those that differ from run to run."""
        return {
            "cost/read_tokens": self.tokens,
            "cost/passes": self.passes,
            "cost/forward_flops": self.flops.forward,
            "cost/backward_flops": self.flops.backward,
            "cost/attention_flops": self.flops.attention,
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cost:
        """What `to_dict` wrote.

        Raises:
            FeatclError: If it is something else.
        """
        try:
            return cls(**{**data, "flops": Flops(**data["flops"])})
        except (KeyError, TypeError) as error:
            raise FeatclError(f"this is no cost that was saved: {error}") from None


class CostMeter:
    """Counts what a model's passes cost while it is attached; passes outside a phase are not counted.

    Args:
        model: The model that is run; adapt it before. A meter comes off with `detach` or at the end of a `with` block.
        costs: What it goes on from, for a resumed run.

    Raises:
        FeatclError: For an architecture whose FLOPs cannot be counted.
    """

    def __init__(self, model: nn.Module, *, costs: Mapping[str, Cost] | None = None) -> None:
        self.costs: dict[str, Cost] = dict(costs or {})
        self._counter = FlopCounter(model)
        causal: Any = inner_model(model)
        self._device = next(causal.parameters()).device
        self._phase: str | None = None
        self._waiting: list[tuple[int, int, int, int]] = []
        body = causal.base_model
        self._handles = [
            body.register_forward_pre_hook(self._begin, with_kwargs=True),
            body.register_forward_hook(self._end, always_call=True),
            self._counter.head.register_forward_hook(self._predicted),
        ]

    def __enter__(self) -> CostMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def total(self) -> Cost:
        """Of all phases."""
        return sum(self.costs.values(), Cost())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside the block belongs to this phase; a phase may come again.

        Raises:
            FeatclError: Inside another phase: a peak belongs to one.
        """
        if self._phase is not None:
            raise FeatclError(f"cost: phase {name!r} begins inside phase {self._phase!r}; end that one before")
        own = reset_peaks(self._device)
        self._phase, start = name, time.perf_counter()
        try:
            yield
        finally:
            self._phase = None
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - start
            rss, cuda = peaks(self._device)
            self._add(name, Cost(seconds=seconds, peak_rss_bytes=rss, peak_is_of_phase=own, peak_cuda_bytes=cuda))

    def _add(self, name: str, cost: Cost) -> None:
        self.costs[name] = self.costs.get(name, Cost()) + cost

    # --- hooks

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if ids is None else ids
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        skipped = next((i for i, b in enumerate(self._layers) if not _is_skipped(b)), len(self._layers))
        self._waiting.append((given.shape[0], given.shape[1], past, skipped))

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        batch, seq, past, first = self._waiting.pop()
        if self._phase is None:
            return
        last = self._ended_at() if output is None else None
        if last is not None and last <= first:
            return
        hidden = None if output is None else output.last_hidden_state
        gradient = hidden is not None and hidden.requires_grad
        flops = self._counter.blocks_pass(batch, seq, past=past, first=first, last=last, gradient=gradient)
        forward = Flops(flops.forward, 0, flops.attention)
        self._add(self._phase, Cost(tokens=batch * seq, passes=1, flops=forward))
        if gradient:
            assert hidden is not None
            hidden.register_hook(partial(self._came_back, flops.backward))

    def _predicted(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._phase is None:
            return
        flops = self._counter.head_pass(output.shape[:-1].numel(), gradient=args[0].requires_grad)
        self._add(self._phase, Cost(flops=Flops(flops.forward)))
        if output.requires_grad:
            output.register_hook(partial(self._came_back, flops.backward))

    def _came_back(self, backward: int, _gradient: Tensor) -> None:
        if self._phase is not None:
            self._add(self._phase, Cost(flops=Flops(backward=backward)))

    @property
    def _layers(self) -> list[Any]:
        return [block.module for block in self._counter.blocks]

    def _ended_at(self) -> int:
        """The number of blocks that a pass ran through which was ended on purpose; 0 for one that failed."""
        ran = [index for index, block in enumerate(self._layers) if any(map(_is_watched, block.modules()))]
        return max(ran, default=-1) + 1


def _is_skipped(block: Any) -> bool:
    """Whether a cached trunk stands in for this block (`featcl.adapters.trunk.resumed`)."""
    return getattr(vars(block).get("forward"), "__module__", None) == "featcl.adapters.trunk"


def _is_watched(module: nn.Module) -> bool:
    """Whether `featcl.models.captured` waits here; it ends a pass at the last such place."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) == "featcl.models" for hook in hooks)


# --- memory and disk


def reset_peaks(device: torch.device | str = "cpu") -> bool:
    """Start new high-water marks; whether the process's own could be reset (on Linux it can)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        CLEAR_REFS.write_text("5")  # proc(5): "reset the peak resident set size"
    except OSError:
        return False
    return True


def peaks(device: torch.device | str = "cpu") -> tuple[int, int]:
    """Peak resident bytes of the process, and peak bytes that torch held on a GPU (0 on a CPU)."""
    cuda = torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0
    return _peak_rss(), cuda


def _peak_rss() -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def stored_bytes(folder: str | Path) -> dict[str, int]:
    """Bytes of every file and folder in a run's folder, by its name: adapter, ledger, state, memory and the rest.

    Raises:
        FeatclError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FeatclError(f"{folder} is no folder, so nothing is stored in it")
    return {
        entry.name: sum(path.lstat().st_size for path in [entry, *entry.rglob("*")] if path.is_file())
        for entry in sorted(folder.iterdir())
    }
