"""How fast the memory is beside titans-pytorch: `python scripts/bench/memory.py --titans FOLDER [--out results]`.

Batch 4, width 256, 4 heads of 64; per length (1 024, 4 096), chunk (16, 64) and depth (1, 2), forward and forward with
backward, three arms in turn on the same tokens:

    featcl    NeuralMemory: gradients at every chunk's starting weights
    titans    titans-pytorch with batch_size = chunk, which computes the same equations
    default   titans-pytorch as it comes: every gradient at the initial weights, which is another (cheaper) memory

All have the same memory network (MemoryMLP of the same depth and expansion; theirs adds a norm and a residual),
momentum, decay and a gate per head. The peer is optional: FOLDER holds it, as made by

    pip install --no-deps --target FOLDER titans-pytorch==0.5.5 assoc-scan axial-positional-embedding einx \
        hyper-connections rotary-embedding-torch tensordict x-transformers x-mlps-pytorch loguru cloudpickle orjson \
        frozendict pyvers torch-einops-utils

Claims: featcl / titans >= 3 in the geometric mean and >= 1.5 in each setting, featcl / default >= 0.95 everywhere, peak
memory at depth 2 at most a quarter of either; time linear in length. Peak memory is the growth of the resident set over
one pass in a process of its own (Linux), or what the device's allocator saw. Prints a table and one JSON line. Seconds
drift on shared machines: compare the ratios, and time on a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from featcl.memory import NeuralMemory  # noqa: E402
from featcl.tracking.environment import git_commit  # noqa: E402

PASSES = ("forward", "forward+backward")
BOUNDS = {
    "geometric mean / titans": 3.0,
    "least / titans": 1.5,
    "least / default": 0.95,
    "peak at depth 2 / peer": 0.25,
}


@dataclass(frozen=True)
class Setting:
    """One cell of the grid."""

    depth: int
    chunk: int
    length: int

    def __str__(self) -> str:
        return f"depth {self.depth} chunk {self.chunk} length {self.length}"


def main() -> None:
    options = parsed()
    sys.path[1:1] = [str(options.titans)] if options.titans else []
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        depth, chunk, length, arm, which = options.memory_of
        setting = Setting(int(depth), int(chunk), int(length))
        print(json.dumps(process_peak(setting, arm, which, options)))
        return
    settings = [Setting(d, c, n) for d in options.depths for c in options.chunks for n in options.lengths]
    arms = ("featcl", "titans", "default") if options.titans else ("featcl",)
    found = [measure(setting, arms, options) for setting in settings]
    ratios = summarised(found)
    peak = matmul_peak(options)
    fractions = {row["setting"]: row["flops"] / row["seconds"]["forward"]["featcl"] / peak for row in found}
    record = {
        "benchmark": "memory", "settings": found, "ratios": ratios, "bounds": BOUNDS, "linear_in_length": linear(found),
        "matmul_flops_per_second": peak, "forward_share_of_matmul_peak": fractions, **circumstances(options),
    }  # fmt: skip
    print_report(record, arms)
    print(json.dumps(record))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        target = options.out / f"memory-{options.device}{'-tiny' if options.tiny else ''}.json"
        target.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titans", type=Path, help="Folder with titans-pytorch and what it imports; none: no peer.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--expansion", type=float, default=4.0, help="Hidden width over head width, at depth 2 and more."
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9, help="Timed rounds; each times every arm once.")
    parser.add_argument("--patience", type=float, default=120.0, help="Seconds after which an arm gets 3 rounds only.")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="Sizes of a few seconds, to see that it runs.")
    parser.add_argument("--no-memory", action="store_true", help="Leave out peak memory.")
    parser.add_argument("--out", type=Path, help="Folder for the JSON, for example scripts/bench/results.")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny and not options.memory_of:
        options.lengths, options.chunks, options.width, options.batch = [64, 256], [16], 32, 2
    if options.titans and not (options.titans / "titans_pytorch").is_dir():
        parser.error(f"no titans_pytorch in {options.titans}: see --help for how to install it there")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    return options


# --- arms --------------------------------------------------------------------------------------------------------


def build_arm(setting: Setting, arm: str, options: argparse.Namespace) -> torch.nn.Module:
    """A memory of one arm; all arms' memory networks have the same sizes."""
    torch.manual_seed(options.seed)
    if arm == "featcl":
        memory: Any = NeuralMemory(
            options.width, heads=options.heads, depth=setting.depth, chunk_size=setting.chunk,
            expansion=options.expansion, seed=options.seed,
        )  # fmt: skip
    else:
        import titans_pytorch

        head_dim = options.width // options.heads
        memory = titans_pytorch.NeuralMemory(
            dim=options.width, heads=options.heads, dim_head=head_dim, chunk_size=setting.chunk,
            batch_size=setting.chunk if arm == "titans" else None,
            model=titans_pytorch.MemoryMLP(head_dim, setting.depth, expansion_factor=options.expansion),
        )  # fmt: skip
    return memory.to(options.device)


def build_pass(setting: Setting, arm: str, which: str, options: argparse.Namespace) -> Callable[[], None]:
    """One pass of an arm over the tokens."""
    memory = build_arm(setting, arm, options)
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(options.batch, setting.length, options.width, generator=generator).to(options.device)

    def forward() -> None:
        with torch.no_grad():
            memory(x)

    def both() -> None:
        memory(x)[0].square().mean().backward()
        memory.zero_grad()

    return forward if which == "forward" else both


def fast_parameters(setting: Setting, arm: str, options: argparse.Namespace) -> int:
    """Numbers in one head's memory network."""
    memory: Any = build_arm(setting, arm, options)
    if arm == "featcl":
        return sum(d_in * d_out for d_in, d_out in memory.layer_sizes)
    return sum(p.numel() for p in memory.memory_model.parameters())


# --- measuring ---------------------------------------------------------------------------------------------------


def measure(setting: Setting, arms: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds, tokens per second, peak memory and ratios of one setting."""
    found: dict[str, Any] = {
        "setting": str(setting), **asdict(setting), "flops": forward_flops(setting, options),
        "fast_parameters_per_head": {arm: fast_parameters(setting, arm, options) for arm in arms},
        "seconds": {}, "seconds_all": {}, "tokens_per_second": {}, "peak_bytes": {}, "ratios": {},
    }  # fmt: skip
    tokens = options.batch * setting.length
    for which in PASSES:
        peaks = {} if options.no_memory else {arm: run_peak(setting, arm, which, options) for arm in arms}
        lost = [arm for arm, peak in peaks.items() if peak is None]  # killed for memory: it cannot be timed either
        seconds = interleaved(setting, [arm for arm in arms if arm not in lost], which, options)
        found["peak_bytes"][which] = peaks
        found["seconds_all"][which] = seconds
        found["seconds"][which] = {arm: statistics.median(times) for arm, times in seconds.items()}
        found["tokens_per_second"][which] = {arm: tokens / s for arm, s in found["seconds"][which].items()}
        found["ratios"][which] = {arm: paired(seconds[arm], seconds["featcl"]) for arm in seconds if arm != "featcl"}
        rates = "  ".join(f"{arm} {rate:9.0f}/s" for arm, rate in found["tokens_per_second"][which].items())
        print(f"{setting!s:32}{which:18}{rates}", file=sys.stderr, flush=True)
    return found


def interleaved(setting: Setting, arms: list[str], which: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each arm, one pass of each in turn, another first each time, after a warm-up round.

    An arm that has used up `patience` gets three rounds; ratios are taken within rounds.
    """
    passes = {arm: build_pass(setting, arm, which, options) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(options.repeats + 1):
        first = repeat % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            if len(seconds[arm]) >= 3 and sum(seconds[arm]) > options.patience:
                continue
            start = time.perf_counter()
            passes[arm]()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[arm].append(time.perf_counter() - start)
    del passes
    gc.collect()
    return seconds


def paired(peer: list[float], own: list[float]) -> float:
    """How many times as fast: the median over rounds of the ratio within a round, so that drift cancels."""
    return statistics.median(a / b for a, b in zip(peer, own, strict=False))


def process_peak(setting: Setting, arm: str, which: str, options: argparse.Namespace) -> int:
    """Peak resident bytes of this process over one pass, beyond what it held before; Linux only."""
    run = build_pass(setting, arm, which, options)
    build_pass(replace(setting, length=2 * setting.chunk), arm, which, options)()  # what libraries take once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def run_peak(setting: Setting, arm: str, which: str, options: argparse.Namespace) -> int | None:
    """Peak memory of one pass: of a process of its own on a CPU (None where it was killed), else of the allocator."""
    if options.device == "cuda":
        return cuda_peak(build_pass(setting, arm, which, options))
    command = [sys.executable, __file__, "--memory-of", *map(str, asdict(setting).values()), arm, which]
    for key in ("expansion", "batch", "width", "heads", "seed", "titans", "threads"):
        command += [] if getattr(options, key) is None else [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return None
    if done.returncode:
        raise SystemExit(f"{setting} {arm} {which}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def cuda_peak(run: Callable[[], None]) -> int:
    """Peak allocated bytes of one pass, beyond what is allocated when it starts."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024


# --- arithmetic --------------------------------------------------------------------------------------------------


def forward_flops(setting: Setting, options: argparse.Namespace) -> float:
    """Products that a forward pass needs: projections; keys and queries through M, δ back, two updates per weight."""
    head_dim = options.width // options.heads
    hidden = round(options.expansion * head_dim)
    sizes = [head_dim, *[hidden] * (setting.depth - 1), head_dim]
    layers = [a * b for a, b in itertools.pairwise(sizes)]
    fast = 2 * (4 * sum(layers) + sum(layers[1:])) * options.heads
    slow = 2 * options.width * (4 * options.width + 4 * options.heads)
    return options.batch * setting.length * (fast + slow)


def matmul_peak(options: argparse.Namespace) -> float:
    """FLOP/s of a large square product, the best of ten."""
    size = 256 if options.tiny else 8192 if options.device == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=options.device)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        if options.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def summarised(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios that the claims are about, for each pass."""
    summary: dict[str, Any] = {}
    for which in PASSES:
        part: dict[str, float] = {}
        for arm in ("titans", "default"):
            ratios = [row["ratios"][which][arm] for row in found if arm in row["ratios"][which]]
            if ratios:
                part[f"least / {arm}"] = min(ratios)
                part[f"geometric mean / {arm}"] = math.exp(statistics.fmean(map(math.log, ratios)))
            shares = [
                row["peak_bytes"][which]["featcl"] / row["peak_bytes"][which][arm]
                for row in found
                if row["depth"] == 2 and row["peak_bytes"][which].get(arm)
            ]
            if shares:
                part[f"peak at depth 2 / {arm}"] = max(shares)
        summary[which] = part
    return summary


def linear(found: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds per token at the longest over those at the shortest length, of featcl: 1 where time is linear."""
    rates: dict[str, float] = {}
    for which in PASSES:
        for depth, chunk in sorted({(row["depth"], row["chunk"]) for row in found}):
            rows = sorted((r for r in found if (r["depth"], r["chunk"]) == (depth, chunk)), key=lambda r: r["length"])
            per_token = [row["seconds"][which]["featcl"] / row["length"] for row in rows]
            rates[f"{which} depth {depth} chunk {chunk}"] = per_token[-1] / per_token[0]
    return rates


# --- reporting ---------------------------------------------------------------------------------------------------


def print_report(record: dict[str, Any], arms: tuple[str, ...]) -> None:
    for which in PASSES:
        print(f"{which + ', tokens/s':34}" + "".join(f"{arm:>12}" for arm in arms) + "   times as fast" + "   peak MiB")
        for row in record["settings"]:
            rates, peaks = row["tokens_per_second"][which], row["peak_bytes"][which]
            print(
                f"  {row['setting']:32}"
                + "".join(f"{rates[arm]:12.0f}" if arm in rates else f"{'-':>12}" for arm in arms)
                + "   " + " ".join(f"{ratio:6.2f}" for ratio in row["ratios"][which].values())
                + "   " + " ".join("lost" if p is None else f"{p / 2**20:.0f}" for p in peaks.values())
            )  # fmt: skip
    for which, ratios in record["ratios"].items():
        for name, value in ratios.items():
            print(f"  {which:18}{name:28}{value:8.2f}{verdict(name, value)}")
    for name, value in record["linear_in_length"].items():
        print(f"  time per token, longest / shortest: {name:38}{value:6.2f}")
    for name, value in record["forward_share_of_matmul_peak"].items():
        print(
            f"  share of the matmul peak ({record['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s): {name:32}{value:6.2f}"
        )


def verdict(name: str, value: float) -> str:
    if name.startswith("peak"):
        bound, held = BOUNDS["peak at depth 2 / peer"], value <= BOUNDS["peak at depth 2 / peer"]
        return f"  at most {bound}: {'holds' if held else 'FAILS'}"
    if name not in BOUNDS:
        return ""
    return f"  at least {BOUNDS[name]}: {'holds' if value >= BOUNDS[name] else 'FAILS'}"


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    kept = ("device", "repeats", "patience", "expansion", "batch", "width", "heads", "seed", "tiny")
    versions = {"torch": torch.__version__}
    if options.titans:
        folder = [str(options.titans)]
        found = next(importlib.metadata.distributions(name="titans-pytorch", path=folder), None)
        versions["titans-pytorch"] = "unknown" if found is None else found.version
    return {
        **{key: getattr(options, key) for key in kept},
        "versions": versions,
        "threads": torch.get_num_threads(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "machine": device,
        "commit": git_commit(ROOT),
    }


if __name__ == "__main__":
    main()
