"""Workers of a sweep through submitit: processes on this machine, or a job array on a Slurm cluster, by one call."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from featcl.errors import FeatclError
from featcl.studies.sharing import SharedRuns
from featcl.studies.worker import Worker, cores

LAUNCHERS = ("local", "slurm")
HOURS = {"local": 24 * 365, "slurm": 4}  # of a worker; on a cluster it is queued again when they are over
TIMEOUTS = 100  # how often
SLURM_JOBS = 8  # by default
CPUS = 4  # of a job on a cluster, by default


def check_launcher(launcher: str, *, jobs: int | None, options: Mapping[str, Any] | None) -> None:
    """Before anything is begun.

    Raises:
        FeatclError: For an unknown launcher, no workers, or options of another launcher.
    """
    if launcher not in LAUNCHERS:
        raise FeatclError(f"--launcher {launcher!r}: there is {' and '.join(LAUNCHERS)}")
    if jobs is not None and jobs < 1:
        raise FeatclError(f"--jobs {jobs}: at least one worker is needed")
    if options and launcher != "slurm":
        raise FeatclError("--slurm KEY=VALUE belongs to --launcher slurm")


def default_jobs(launcher: str) -> int:
    """A worker for every GPU here, or one; on a cluster, eight."""
    return SLURM_JOBS if launcher == "slurm" else max(1, len(visible_devices()))


def launch(
    shared: SharedRuns, *, launcher: str, jobs: int, options: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Sequence[Any]:
    """Start workers that take their runs from a shared list.

    Args:
        shared: The list.
        launcher: "local" or "slurm".
        jobs: How many workers.
        options: Of sbatch, by submitit's names: `partition`, `time` (minutes), `gpus_per_node`, `cpus_per_task`, …
        overwrite: Replace the results of other configs.

    Returns:
        submitit's jobs.

    Raises:
        FeatclError: For an unknown option, or where there is no Slurm.
    """
    import submitit
    from submitit.helpers import environment_variables

    local = launcher == "local"
    parameters: dict[str, Any] = {"timeout_min": 60 * HOURS[launcher], "name": "featcl"}
    if not local:
        gpus = 1 if visible_devices() else None
        parameters |= {"cpus_per_task": CPUS, "gpus_per_node": gpus, "slurm_array_parallelism": jobs}
        parameters |= {_named(key): value for key, value in (options or {}).items()}
    try:
        executor = submitit.AutoExecutor(shared.logs, cluster=launcher, slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, AssertionError, ValueError) as error:
        raise FeatclError(f"--launcher {launcher}: {' '.join(str(error).split())}") from None
    devices = visible_devices() if local else ()
    threads = threads_of(jobs) if local else None
    workers = [
        Worker(shared.folder.absolute(), number, threads, devices[number % len(devices)] if devices else None, local,
               overwrite)
        for number in range(jobs)
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if threads else {}
    with environment_variables(**environment), _deaf_to_interrupts(local):
        return executor.submit_array(workers)


def threads_of(jobs: int) -> int:
    """Threads of each of some workers on this machine: OMP_NUM_THREADS where it is set, else cores / jobs."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else max(1, cores() // jobs)


def visible_devices() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return tuple(part.strip() for part in listed.split(",") if part.strip() and part.strip() != "-1")
    import torch

    return tuple(str(number) for number in range(torch.cuda.device_count()))


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """`partition=gpu` from the command line, the value read as YAML.

    Raises:
        FeatclError: For one without an equals sign.
    """
    found = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise FeatclError(f"--slurm {option!r} is not KEY=VALUE, for example partition=gpu")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise FeatclError(f"--slurm {option!r}: the value is not YAML") from None
    return found


def _named(key: str) -> str:
    """submitit's AutoExecutor knows what launchers share by plain names, the rest by the launcher's."""
    shared = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "name")
    return key if key in shared else f"slurm_{key}"


@contextmanager
def _deaf_to_interrupts(local: bool) -> Iterator[None]:
    """What is started meanwhile ignores SIGINT.

    submitit's process beside each worker kills that one second after a Ctrl-C; a worker is told by the sweep instead.
    """
    if not local or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
