"""`featcl sweep`: every arm of a study with every seed; what is finished stays, what was cut off goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.studies.arms import Arm, chosen_arms, study_arms
from featcl.studies.launch import check_launcher, default_jobs, launch
from featcl.studies.sharing import Ended, Run, SharedRuns
from featcl.studies.table import StudyTable, study_table
from featcl.tracking.interrupt import Interruptible
from featcl.tracking.progress import on_terminal, say

LOOK = 0.25  # seconds between two looks at how far the workers are


@dataclass(frozen=True)
class SweepResult:
    """What a sweep did.

    Attributes:
        study: Its name.
        finished: Runs that it finished, with what they took.
        skipped: Runs that were finished before.
        failed: Run -> why, in one line.
        left: Runs that no worker came to, or did not come back from; the same command goes on with them.
        workers: Why a worker ended, where it was not for want of runs.
        seconds: What it took.
        jobs: How many workers there were.
        folder: Its records and logs; None where there was nothing to do.
        table: Of the study, when it was over; None where nothing has finished.
    """

    study: str
    finished: Mapping[str, Ended]
    skipped: tuple[str, ...]
    failed: Mapping[str, str]
    left: tuple[str, ...]
    workers: tuple[str, ...]
    seconds: float
    jobs: int
    folder: Path | None
    table: StudyTable | None

    @property
    def complete(self) -> bool:
        """Whether every run is finished."""
        return not self.failed and not self.left

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "study": self.study,
            "finished": {name: asdict(ended) for name, ended in self.finished.items()},
            "skipped": list(self.skipped),
            "failed": dict(self.failed),
            "left": list(self.left),
            "workers": list(self.workers),
            "seconds": self.seconds,
            "jobs": self.jobs,
            "logs": None if self.folder is None else str(self.folder),
            "table": [] if self.table is None else list(self.table.rows),
        }

    def complaints(self) -> list[str]:
        """One line for everything that did not go well."""
        lines = [f"failed: {name}: {why}" for name, why in self.failed.items()]
        lines += [f"worker: {why}" for why in self.workers]
        if self.left:
            lines.append(f"left: {', '.join(self.left)}; the same command goes on with them")
        return lines


def sweep(
    study: str | Path,
    *,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    launcher: str = "local",
    jobs: int | None = None,
    output: str | None = None,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
) -> SweepResult:
    """Run what is missing of a study, and make its table.

    Args:
        study: Folder of configs, such as `experiments/quickstart`.
        overrides: `key=value` for all arms; what they change is another run, which belongs in another `output`.
        seeds: In place of those that grids and configs name.
        arms: Only these, by name or by their file's name; all by default.
        launcher: "local": processes here; "slurm": a job array.
        jobs: How many workers; by default one for each GPU here, or one, and eight on a cluster.
        output: Where results go, in place of the configs' `output`.
        overwrite: Replace results of other configs.
        options: Of sbatch; see `launch`.

    Returns:
        What was done; an arm that failed is among it and did not stop the others.

    Raises:
        FeatclError: Bad input.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, when all workers have saved their states.
    """
    check_launcher(launcher, jobs=jobs, options=options)
    runs = planned(chosen_arms(study_arms(study, overrides), arms), seeds=seeds, output=output)
    todo = [run for run in runs if not run.finished]
    place = runs[0].config
    if overrides and not overwrite:
        _refuse_foreign(todo, place.output)
    if len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs are finished and are not run again")
    began, shared, workers, count = time.time(), None, (), 0
    if todo:
        count = min(jobs or default_jobs(launcher), len(todo))
        shared = SharedRuns.create(Path(place.output) / place.study, todo)
        workers = _carry_out(shared, launcher=launcher, jobs=count, options=options, overwrite=overwrite)
    ended = {run.name: found for run in todo if shared and (found := shared.ended(run)) is not None}
    done = [run.name for run in runs if run.finished]
    table = study_table(study, output=place.output, overrides=overrides) if done else None
    if table is not None:
        table.write(Path(place.output) / place.study)
    return SweepResult(
        study=place.study,
        finished={name: found for name, found in ended.items() if found.error is None},
        skipped=tuple(name for name in done if name not in ended),
        failed={name: error for name, found in ended.items() if (error := found.error) is not None},
        left=tuple(run.name for run in runs if run.name not in {*ended, *done}),
        workers=tuple(_complaints(workers)),
        seconds=time.time() - began,
        jobs=count,
        folder=shared.folder if shared else None,
        table=table,
    )


def planned(arms: Sequence[Arm], *, seeds: Sequence[int] | None = None, output: str | None = None) -> list[Run]:
    """Every run of some arms, all of them with their first seed before any with its second.

    Raises:
        FeatclError: For a seed that is given twice.
    """
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
        raise FeatclError(f"--seeds {','.join(map(str, seeds))!r}: give different whole numbers from 0, such as 0,1,2")
    wanted = {arm.name: tuple(seeds or arm.seeds) for arm in arms}
    rounds = range(max(map(len, wanted.values())))
    configs = [arm.with_seed(wanted[arm.name][n]) for n in rounds for arm in arms if n < len(wanted[arm.name])]
    return [Run(config if output is None else config.model_copy(update={"output": output})) for config in configs]


def _refuse_foreign(runs: Sequence[Run], output: str) -> None:
    foreign = [run.name for run in runs if run.foreign]
    if foreign:
        raise FeatclError(
            f"{output} holds results of other configs under {len(foreign)} of these names ({foreign[0]}); runs with "
            f"KEY=VALUE go elsewhere, such as --output {output}/other, or replace them with --overwrite"
        )


def _carry_out(shared: SharedRuns, *, launcher: str, jobs: int, **settings: Any) -> Sequence[Any]:
    """Start the workers and wait for them; returns submitit's jobs."""
    workers: Sequence[Any] = ()
    with shared.alive(), Interruptible():
        try:
            workers = launch(shared, launcher=launcher, jobs=jobs, **settings)
            _watch(shared, workers, jobs)
        except KeyboardInterrupt:
            shared.stop()
            say("stopping; the workers save their states (Ctrl-C once more: do not wait for them)")
            _wait(shared, workers, launcher)
            place = shared.folder.parents[1]
            raise KeyboardInterrupt(f"the states are saved in {place}; the same command goes on from there") from None
    return workers


def _watch(shared: SharedRuns, workers: Sequence[Any], jobs: int) -> None:
    """Say how far they are until all workers have ended."""
    ended: dict[str, Ended] = {}
    with _shown() as show:
        over = False
        while not over:
            over = all(worker.done() for worker in workers)
            for run in shared.runs:
                if run.name not in ended and (found := shared.ended(run)) is not None:
                    ended[run.name] = found
            show(_progress(shared, ended, jobs), len(ended))
            if not over:
                time.sleep(LOOK)


def _wait(shared: SharedRuns, workers: Sequence[Any], launcher: str, patience: float = 120.0) -> None:
    """Until workers that were told to stop have done so; on a cluster those that still queue are cancelled."""
    if launcher == "local":
        while not all(worker.done() for worker in workers):
            time.sleep(LOOK)
        return
    until = time.monotonic() + patience
    while time.monotonic() < until and any(shared.running_since(run) for run in shared.runs):
        time.sleep(LOOK)
    for worker in workers:
        worker.cancel(check=False)


def _progress(shared: SharedRuns, ended: Mapping[str, Ended], jobs: int) -> str:
    """`3 of 12 done, 1 of them failed, 2 running, 7 left, about 4 min`."""
    since = [begun for run in shared.runs if run.name not in ended and (begun := shared.running_since(run))]
    failed = sum(found.error is not None for found in ended.values())
    left = len(shared.runs) - len(ended) - len(since)
    text = f"{len(ended)} of {len(shared.runs)} done{f', {failed} of them failed' if failed else ''}"
    text += f", {len(since)} running, {left} left"
    took = [found.ended - found.began for found in ended.values() if found.error is None]
    if took and (left or since):
        mean, now = sum(took) / len(took), time.time()
        rest = left * mean + sum(max(0.0, mean - (now - begun)) for begun in since)
        text += f", about {_duration(rest / jobs)}"
    return text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _shown() -> Iterator[Callable[[str, int], None]]:
    """A line that changes on a terminal; elsewhere one whenever a run has ended."""
    if on_terminal():
        from rich.console import Console

        with Console(stderr=True).status("workers start") as status:
            yield lambda text, done: status.update(text)
        return
    shown = [0]

    def show(text: str, done: int) -> None:
        if done > shown[0]:
            shown[0] = done
            say(text)

    yield show


def _complaints(workers: Sequence[Any]) -> Iterator[str]:
    """Workers that did not end by themselves."""
    for number, worker in enumerate(workers):
        if not worker.paths.result_pickle.exists():
            yield f"{number} died; its log: {worker.paths.stderr}"
        elif (error := worker.exception()) is not None:
            trace = str(error).partition("You can check full logs")[0].rstrip("- \n").splitlines()
            yield f"{number}: {trace[-1].strip() if trace else 'failed'}; its log: {worker.paths.stderr}"
