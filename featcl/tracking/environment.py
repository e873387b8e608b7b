"""What a run ran on: versions, device, threads, commit. Recorded in env.json and printed by `featcl doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

REQUIRED = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "pydantic", "jaxtyping", "einops")
OPTIONAL = (
    "sae-lens", "transformer-lens", "wandb", "tensorboard", "trackio", "matplotlib", "submitit", "lm-eval", "trl",
    "vllm",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Plain JSON data; a version is None where a package is not installed."""
    import featcl

    return {
        "featcl": featcl.__version__,
        "commit": git_commit(Path(__file__).resolve().parents[2]),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "versions": {name: _version(name) for name in REQUIRED},
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the machine and the software that decides numbers to the last bit is not as it was.

    Args:
        before, now: As `environment` returned them.
    """
    old, new = (_deciding(found) for found in (before, now))
    return [f"{name} was {old.get(name)}, is {new.get(name)}" for name in new if old.get(name) != new.get(name)]


def _deciding(found: Mapping[str, Any]) -> dict[str, Any]:
    names = ("featcl", "commit", "python", "platform", "cpu", "device", "threads", "float32_matmul")
    return {**{name: found.get(name) for name in names}, **found.get("versions", {})}


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, with `+changes` where tracked files differ; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != folder.resolve():
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
