"""Finished runs as points: what each acquired and kept, gathered over seeds, with intervals.

Intervals are 95 % from a bootstrap in which seeds and, within every column of R, items are drawn with replacement; all
seeds and arms get the same items, so that differences are paired. With one seed only items are drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from featcl.errors import FeatclError
from featcl.evaluation import Interval, ScoreMatrix, metric_arrays, resample
from featcl.evaluation.board import without_columns
from featcl.evaluation.intervals import resampled_interval
from featcl.tracking.report_files import RunFiles

RATE = r"[._-]lr[-_=]?\d+(\.\d+)?(e[+-]?\d+)?"  # in an arm's name, such as `base.lr-0.001` or `base_lr3e-3`
# Of a config, what does not make another method, beside the learning rate: names and places.
NAMES = ("study", "arm", "seed", "output", "digest", "tracking", "checkpoint")


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """One finished run.

    Attributes:
        files: Its folder's contents.
        matrix: R with its items; None where there is none.
    """

    files: RunFiles
    matrix: ScoreMatrix | None

    @classmethod
    def read(cls, folder: str | Path) -> FinishedRun:
        """Read a run's folder, finished or not.

        Raises:
            FeatclError: If it is no run's folder, or a file is damaged.
        """
        files, path = RunFiles.read(folder), Path(folder) / "R.json"
        return cls(files, ScoreMatrix.load(path) if path.is_file() else None)

    @property
    def arm(self) -> str:
        """The arm's name; the folder's where the config does not say."""
        return str(self.files.config.get("arm") or self.files.folder.resolve().name)

    @property
    def lr(self) -> float | None:
        """Learning rate, of the first phase where there are several."""
        learner = (self.files.config.get("phases") or [self.files.config.get("learner") or {}])[0]
        return learner.get("lr")

    @property
    def method(self) -> str:
        """What the config says but for names, places and learning rates: equal for the points of one sweep."""
        return json.dumps(
            _without_rates({k: v for k, v in self.files.config.items() if k not in NAMES}), sort_keys=True
        )

    def metric(self, name: str) -> float:
        """A metric of summary.json; NaN where it has none."""
        value = (self.files.summary.get("metrics") or {}).get(name)
        return math.nan if value is None else float(value)

    @cached_property
    def samples(self) -> Mapping[str, Float[np.ndarray, " resamples"]]:
        """Metric -> its values on resampled items; empty without a whole R."""
        matrix = self.matrix
        if matrix is None or len(matrix.rows) < 2 or len(matrix.rows) != matrix.n_tasks + 1:
            return {}
        kept = without_columns(matrix, tuple(self.files.summary.get("probes") or ()))
        return metric_arrays(resample(kept).samples)

    @cached_property
    def items(self) -> tuple[Any, ...]:
        """The columns of R and the items in them: what has to be equal where runs are paired."""
        found = self.matrix.items if self.matrix is not None else {}
        return tuple((column, tuple(rows)) for column, rows in found.items())


@dataclass(frozen=True, eq=False)
class Setting:
    """One arm at one learning rate, with all its seeds.

    Attributes:
        line: The sweep that it belongs to: settings that differ only in their learning rate.
        arm: Its own name.
        lr: Its learning rate.
        runs: One per seed.
    """

    line: str
    arm: str
    lr: float | None
    runs: tuple[FinishedRun, ...]

    def interval(self, metric: str) -> Interval:
        """Mean over seeds with its interval; NaN limits where R does not give one."""
        values = np.array([run.metric(metric) for run in self.runs])
        samples = [run.samples[metric] for run in self.runs if metric in run.samples]
        if len(samples) < len(values) or np.isnan(values).any():
            return Interval(float(values.mean()), math.nan, math.nan)
        return resampled_interval(float(values.mean()), over_seeds(np.stack(samples)))


def over_seeds(samples: Float[np.ndarray, "seeds resamples"], *, seed: int = 0) -> Float[np.ndarray, " resamples"]:
    """In every resample, the mean over as many seeds as there are, drawn with replacement."""
    count, resamples = samples.shape
    drawn = np.random.default_rng(seed).integers(0, count, size=(count, resamples))
    return np.take_along_axis(samples, drawn, axis=0).mean(axis=0)


def difference(one: Sequence[FinishedRun], other: Sequence[FinishedRun], metric: str) -> Interval | None:
    """How much more `one` has of a metric than `other`, paired by seed and item.

    Args:
        one: Runs of an arm.
        other: Runs of another.
        metric: Name.

    Returns:
        The mean difference over common seeds; None where seeds or items are not the same, or R does not give it.
    """
    seeds = [{run.files.config.get("seed"): run for run in runs} for runs in (one, other)]
    pairs = [(seeds[0][seed], seeds[1][seed]) for seed in seeds[0] if seed in seeds[1]]
    if not pairs or any(metric not in run.samples for pair in pairs for run in pair):
        return None
    if any(a.items != b.items for a, b in pairs):
        return None
    value = float(np.mean([a.metric(metric) - b.metric(metric) for a, b in pairs]))
    return resampled_interval(value, over_seeds(np.stack([a.samples[metric] - b.samples[metric] for a, b in pairs])))


def settings(runs: Sequence[FinishedRun]) -> tuple[Setting, ...]:
    """Runs gathered over seeds; in the order in which their arms come.

    Raises:
        FeatclError: If their scores measure different things.
    """
    measures = {run.matrix.measure for run in runs if run.matrix is not None}
    if len(measures) > 1:
        raise FeatclError(f"some of the runs hold {' and others '.join(sorted(measures))}; compare them apart")
    groups: dict[tuple[str, float | None, str], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.method, run.lr, run.arm), []).append(run)
    names: dict[str, str] = {}
    for method, _, arm in groups:
        name = re.sub(RATE, "", arm) or arm
        names[method] = min((names.get(method, name), name), key=lambda text: (len(text), text))
    taken: dict[str, str] = {}
    for method, name in names.items():  # two methods may use one name in different studies
        taken[method] = name if name not in taken.values() else f"{name} ({len(taken) + 1})"
    return tuple(Setting(taken[method], arm, lr, tuple(found)) for (method, lr, arm), found in groups.items())


def _without_rates(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_rates(item) for key, item in value.items() if key != "lr"}
    return [_without_rates(item) for item in value] if isinstance(value, list) else value
