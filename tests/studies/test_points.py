"""Runs as points: intervals over seeds and items, paired differences, and what belongs to one sweep."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from featcl.errors import FeatclError
from featcl.files import write_json
from featcl.studies.comparison import comparison_figures, frontier_points
from featcl.studies.points import FinishedRun, difference, over_seeds, settings
from featcl.tracking.plots_data import Absent
from tests.tracking import folders


def finished(folder: Path, *, seed: int = 0, learned: float = 0.95, items: int = 40, **config: object) -> FinishedRun:
    """A run whose summary says what its matrix says."""
    run = folders.make(folder, seed=seed, **config)
    write_json(run / "R.json", folders.score_rows(seed=seed + 1, learned=learned, items=items))
    matrix = FinishedRun.read(run).matrix
    assert matrix is not None
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", {**summary, "metrics": matrix.metrics().to_dict()})
    return FinishedRun.read(run)


def test_one_seed_has_the_interval_of_its_items(tmp_path: Path) -> None:
    run = finished(tmp_path / "a")
    [setting] = settings([run])
    found = setting.interval("acc")
    assert found.value == run.metric("acc")
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(np.ptp(np.quantile(run.samples["acc"], (0.025, 0.975))), rel=0.1)
    fewer = settings([finished(tmp_path / "b", items=8)])[0].interval("acc")
    assert fewer.high - fewer.low > 1.5 * (found.high - found.low), "fewer items say less"


def test_seeds_that_differ_widen_the_interval() -> None:
    draw = np.random.default_rng(0)
    alike = draw.normal(0.5, 0.01, size=(3, 4000))
    apart = alike + np.array([[-0.2], [0.0], [0.2]])
    assert over_seeds(alike[:1]) == pytest.approx(alike[0])
    assert over_seeds(apart).std() == pytest.approx(np.sqrt(np.mean([0.04, 0, 0.04]) / 3 + 0.0001 / 3), rel=0.05)
    assert over_seeds(alike).std() < 0.01


def test_differences_are_paired_by_seed_and_item(tmp_path: Path) -> None:
    one = [finished(tmp_path / f"a{seed}", seed=seed) for seed in range(3)]
    same = difference(one, one, "acc")
    assert same is not None
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0), "the same answers differ in nothing, item by item"
    worse = [finished(tmp_path / f"b{seed}", seed=seed, learned=0.6, arm="worse") for seed in range(3)]
    found = difference(worse, one, "acc")
    assert found is not None
    assert found.high < 0, "three seeds of 40 items see it"
    assert found.value == pytest.approx(
        np.mean([b.metric("acc") - a.metric("acc") for a, b in zip(one, worse, strict=True)])
    )


def test_what_is_not_paired_is_not_compared(tmp_path: Path) -> None:
    run = finished(tmp_path / "a")
    assert difference([run], [finished(tmp_path / "b", seed=1)], "acc") is None, "no common seed"
    assert difference([run], [finished(tmp_path / "c", items=8)], "acc") is None, "other items"
    (tmp_path / "a" / "R.json").unlink()
    assert difference([FinishedRun.read(tmp_path / "a")], [run], "acc") is None, "no items at all"


def test_a_sweep_of_learning_rates_is_one_line(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / f"{arm}-{lr}-{seed}", seed=seed, arm=f"{arm}.lr-{lr}.kind-x", learner={"lr": lr},
                 adapter={"kind": arm})
        for arm in ("write", "none") for lr in (0.001, 0.003) for seed in (0, 1)
    ]  # fmt: skip
    found = settings(runs)
    assert [(s.line, s.lr, len(s.runs)) for s in found] == [
        ("write.kind-x", 0.001, 2), ("write.kind-x", 0.003, 2), ("none.kind-x", 0.001, 2), ("none.kind-x", 0.003, 2)
    ]  # fmt: skip
    points = frontier_points(found)
    assert [(point.arm, point.lr) for point in points] == [(s.line, s.lr) for s in found]
    for point, setting in zip(points, found, strict=True):
        lost = setting.interval("forgetting_max_past")
        down, up = point.retention_error if isinstance(point.retention_error, tuple) else (0.0, 0.0)
        assert point.retention == pytest.approx(1 - lost.value)
        assert (point.retention - down, point.retention + up) == pytest.approx((1 - lost.high, 1 - lost.low))
        assert min(down, up) > 0


def test_an_unfinished_run_has_no_point(tmp_path: Path) -> None:
    run = FinishedRun.read(folders.make(tmp_path / "a", finished=False))
    assert math.isnan(run.metric("acc"))
    assert frontier_points(settings([run])) == []
    assert isinstance(comparison_figures([run])["frontier"], Absent)


def test_other_measures_are_not_compared(tmp_path: Path) -> None:
    run = finished(tmp_path / "a")
    other = folders.make(tmp_path / "b")
    write_json(other / "R.json", {**folders.score_rows(), "measure": "nll"})
    with pytest.raises(FeatclError, match="some of the runs hold accuracy and others nll"):
        settings([run, FinishedRun.read(other)])
