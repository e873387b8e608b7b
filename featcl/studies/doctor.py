"""`featcl doctor`: what a run would use here, what is missing or wrong, and what to do, before it is started."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.files import require_folder
from featcl.models import LAB_ASSETS
from featcl.studies.hub_access import HubEntry, advice, look
from featcl.tracking.environment import environment

USES = {  # what a package is for that `import featcl` does without
    "sae-lens": "SAEs, and so every run",
    "transformer-lens": "featcl.as_bridge, and for sae-lens",
    "wandb": "W&B; a run goes on without it",
    "matplotlib": "plots, and so the end of every run",
    "submitit": "featcl sweep",
    "lm-eval": "evaluation.harness",
    "bm25s": "the method retrieval by bm25",
    "tensorboard": "tracking.backends: tensorboard; a run goes on without it",
    "trackio": "tracking.backends: trackio; a run goes on without it",
    "trl": "the peer in scripts/bench/learner.py",
    "vllm": "serving rollouts on this machine",
}
EXTRAS = {"bm25s": "retrieval", **{name: name for name in ("lm-eval", "tensorboard", "trackio", "trl", "vllm")}}
NEEDED = ("sae-lens", "transformer-lens", "matplotlib")  # without which `featcl run` fails, whatever the config


@dataclass(frozen=True)
class Findings:
    """What was found.

    Attributes:
        environment: Versions, device, threads, commit, as env.json records them; `optional` with more packages.
        devices: Every device that `runtime.device` may name, with what is known of it.
        writable: Folder -> None where it can be written to, else why not.
        lab: Name of a laboratory model -> whether its files are here.
        hub: What the guides name on the Hugging Face hub -> whether it can be used from here.
        missing: Optional package that is not installed -> what it is for.
        problems: What would make a run fail or crawl, one sentence each.
        advice: What to do before the guides' models can be used, one sentence each.
    """

    environment: dict[str, Any]
    devices: dict[str, dict[str, Any]]
    writable: dict[str, str | None]
    lab: dict[str, bool]
    hub: dict[str, HubEntry]
    missing: dict[str, str]
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data; the environment's keys at the top."""
        return {
            **self.environment,
            "devices": self.devices,
            "writable": self.writable,
            "lab": self.lab,
            "hub": {name: entry.to_json() for name, entry in self.hub.items()},
            "missing": self.missing,
            "problems": list(self.problems),
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        rows = [row for key, value in self.environment.items() for row in _rows(key, value)]
        rows += [(name, ", ".join(f"{key} {value}" for key, value in about.items())) for name, about in
                 self.devices.items()]  # fmt: skip
        rows += [(f"write {folder}", reason or "yes") for folder, reason in self.writable.items()]
        rows += [(name, "here" if present else "missing") for name, present in self.lab.items()]
        rows += [(name, entry.about) for name, entry in self.hub.items()]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}} {value}" for name, value in rows]
        lines += [f"to do: {line}" for line in self.advice]
        lines += [f"problem: {problem}" for problem in self.problems] or ["no problems found"]
        return "\n".join(lines)


def examine(output: str | Path = "results") -> Findings:
    """Look at this machine; the hub is asked for what is not in the cache, unless HF_HUB_OFFLINE is set.

    Args:
        output: Folder that results would go to.
    """
    found = environment()
    found["optional"] |= {name: _version(name) for name in USES if name not in found["optional"]}
    hub = look()
    places = (Path(output), hub_cache(), Path(tempfile.gettempdir()))
    writable = {str(folder): _why_not(folder) for folder in places}
    lab = {f"lab/{name}": (LAB_ASSETS / name / "config.json").is_file() for name in ("olmo2", "gemma2")}
    missing = {name: USES.get(name, "") for name, version in found["optional"].items() if version is None}
    problems = tuple(_problems(found, writable, lab))
    return Findings(found, _devices(), writable, lab, hub, missing, problems, tuple(advice(hub)))


def _problems(found: dict[str, Any], writable: dict[str, str | None], lab: dict[str, bool]) -> Iterator[str]:
    versions = found["versions"] | {name: found["optional"][name] for name in NEEDED}
    yield from (f"{name} is needed and not installed: pip install {name}" for name, at in versions.items() if not at)
    yield from outdated()
    yield from (f"{folder} cannot be written to: {reason}" for folder, reason in writable.items() if reason)
    yield from (f"{name} lacks its files: featcl lab train --model {name}" for name, here in lab.items() if not here)
    cpus, threads = _cpus(), found["threads"]
    if threads > cpus:
        yield f"torch uses {threads} threads on {cpus} CPUs: set runtime.threads, or OMP_NUM_THREADS"
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        yield f"an NVIDIA driver is here, but torch {torch.__version__} finds no CUDA: install a build of torch for it"


def outdated() -> Iterator[str]:
    """Installed packages outside of the ranges that featcl was installed with."""
    from packaging.requirements import Requirement

    try:
        listed = importlib.metadata.requires("featcl") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, without having been installed
        return
    for wanted in map(Requirement, listed):
        version = _version(wanted.name)
        asked_for = wanted.marker is None or any(
            wanted.marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS.values())
        )
        if version is not None and asked_for and not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name} is {version}, and featcl needs {wanted.specifier}: pip install '{wanted}'"


def hub_cache() -> Path:
    """Where downloads from the Hugging Face hub are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _rows(key: str, value: Any) -> list[tuple[str, Any]]:
    rows = value.items() if isinstance(value, dict) else [(key, value)]
    return [(name, _lack(name) if key == "optional" and version is None else version) for name, version in rows]


def _lack(name: str) -> str:
    package = f"'featcl[{EXTRAS[name]}]'" if name in EXTRAS else name
    return f"missing; for {USES.get(name, name)} (pip install {package})"


def _devices() -> dict[str, dict[str, Any]]:
    devices: dict[str, dict[str, Any]] = {"cpu": {"threads": torch.get_num_threads(), "of": _cpus()}}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = {
            "name": about.name,
            "gigabytes": round(about.total_memory / 2**30, 1),
            "capability": f"{about.major}.{about.minor}",
            "bfloat16": torch.cuda.is_bf16_supported(),
        }
    if torch.backends.mps.is_available():
        devices["mps"] = {"name": "Apple GPU"}
    return devices


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not(folder: Path) -> str | None:
    try:
        require_folder(folder)
    except FeatclError as error:
        return str(error)
    return None
