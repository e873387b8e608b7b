"""A study of two tiny arms to sweep, and how its workers and results are looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import featcl
from featcl.studies.arms import study_arms
from featcl.studies.sweep import planned
from tests.runs import untimed

ENOUGH = 240.0  # seconds, on a busy machine


def make_study(home: Path, place: Path) -> Path:
    """A base that saves its state after every update, and an arm; results go to `place / "results"`."""
    folder = place / "demo"
    folder.mkdir()
    (folder / "base.yaml").write_text(
        f"study: demo\nmodel: {home / 'model'}\noutput: {place / 'results'}\n"
        f"stream: {{path: {home / 'stream.jsonl'}}}\n"
        f"features: {{sae: {home / 'sae'}, selector: rarity, k: 4, check: false, "
        f"background: {home / 'background.txt'}}}\n"
        "evaluation: {suites: [], canaries: null}\ntracking: {wandb: disabled}\n"
        "checkpoint: {updates: 1}\nruntime: {threads: 1}\n"
    )
    (folder / "plain.yaml").write_text("base: base.yaml\nadapter: {kind: none}\n")
    return folder


def wait_until(what: Callable[[], object]) -> None:
    until = time.monotonic() + ENOUGH
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def workers_at_work(results: Path, *, updates: int = 2) -> list[int]:
    """Processes of the newest sweep that have learned a little of a run which is not finished."""
    found = []
    for sweeps in sorted((results / "demo" / ".sweep").glob("20*"))[-1:]:
        for begun in (sweeps / "begun").iterdir():
            arm, _, seed = begun.name.rpartition(".")
            metrics = results / "demo" / arm / seed / "metrics.jsonl"
            lines = begun.read_text().splitlines()
            if lines and metrics.is_file() and metrics.read_text().count('"update"') >= updates:
                found.append(int(lines[-1].split()[1]))
    return found


def results_of(study: Path, results: Path) -> dict[str, tuple[object, bytes]]:
    """metrics.jsonl but for times, and summary.json, of every run."""
    folders = [run.config.folder for run in planned(study_arms(study), seeds=(0, 1), output=str(results))]
    return {
        "/".join(path.parts[-2:]): (untimed(path), (path / "summary.json").read_bytes())
        for path in folders
        if (path / "summary.json").is_file()
    }


def run_one_by_one(study: Path, results: Path, *, seeds: Sequence[int] = (0, 1)) -> dict[str, tuple[object, bytes]]:
    """The same runs in this process, as `featcl run` would."""
    for run in planned(study_arms(study), seeds=seeds, output=str(results)):
        featcl.run(run.config)
    return results_of(study, results)
