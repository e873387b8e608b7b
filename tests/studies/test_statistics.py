"""Comparisons at matched acquisition and matched ‖ΔW‖: numbers worked out by hand, pairing, what is not determined."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from featcl import cli
from featcl.errors import FeatclError
from featcl.files import write_json
from featcl.studies.arms import study_arms
from featcl.studies.points import FinishedRun
from featcl.studies.statistics import (
    StudyStatistics,
    Sweep,
    compare_at_norm,
    compare_frontiers,
    curve,
    frontier,
    study_statistics,
)

E = math.e


def points(arm: str, *seeds: list[tuple[float, float]]) -> Sweep:
    """A sweep as measured, without resamples."""
    x, y = ({seed: np.array([[pair[side] for pair in pairs]]) for seed, pairs in enumerate(seeds)} for side in (0, 1))
    return Sweep(arm, x, y)


ONE = points("one", [(0.6, 0.7), (0.2, 0.9), (0.5, 0.6), (0.9, 0.3)])  # (0.5, 0.6) is beaten by (0.6, 0.7)
OTHER = points("other", [(0.4, 0.8), (0.8, 0.4)])


def test_a_frontier_has_no_point_that_another_beats() -> None:
    x, y = frontier(ONE.x[0][0], ONE.y[0][0])
    assert (x.tolist(), y.tolist()) == ([0.2, 0.6, 0.9], [0.9, 0.7, 0.3])
    x, y = frontier(np.array([0.5, 0.5, 0.7]), np.array([0.1, 0.2, 0.2]))
    assert (x.tolist(), y.tolist()) == ([0.7], [0.2]), "equal retention, more acquired"


def test_points_with_one_x_are_one_at_their_mean() -> None:
    x, y = curve(np.array([2.0, 1.0, 2.0]), np.array([4.0, 1.0, 6.0]))
    assert (x.tolist(), y.tolist()) == ([1.0, 2.0], [1.0, 5.0])


def test_the_mean_gap_of_two_frontiers() -> None:
    """One: 0.8, 0.7, 13/30 at 0.4, 0.6, 0.8; other: 0.8, 0.6, 0.4. The mean of 0, 0.1, 1/30 by trapezoids is 7/120."""
    found = compare_frontiers(ONE, OTHER, measure="kept")
    assert found.gap.value == pytest.approx(7 / 120)
    assert compare_frontiers(OTHER, ONE, measure="kept").gap.value == pytest.approx(-7 / 120)
    assert compare_frontiers(ONE, ONE, measure="kept").gap.value == 0
    assert (found.seeds, found.screening) == ((0,), True)
    assert math.isnan(found.gap.low), "one seed without items says nothing about how sure it is"


@pytest.mark.parametrize(("at", "gap"), [(0.6, 0.1), (0.8, 1 / 30), (0.1, 0.1), (0.85, math.nan)])
def test_the_gap_at_one_acquisition(at: float, gap: float) -> None:
    """Below its first point a frontier is flat; above its last nothing is known."""
    found = compare_frontiers(ONE, OTHER, measure="kept", at=at)
    assert found.gap.value == pytest.approx(gap, nan_ok=True)
    assert found.seeds == (() if math.isnan(gap) else (0,))


def test_an_arm_that_always_acquires_more_is_compared_where_the_other_ends() -> None:
    more, less = points("more", [(0.9, 0.5)]), points("less", [(0.4, 0.8), (0.6, 0.7)])
    assert compare_frontiers(more, less, measure="kept").gap.value == pytest.approx(-0.2)
    assert compare_frontiers(less, more, measure="kept").gap.value == pytest.approx(0.2)


def test_the_gap_at_matched_norm_is_over_its_logarithm() -> None:
    """y = log ‖ΔW‖ on [0, 2] against y = 1 on [1, 3]: the mean of u - 1 over [1, 2]."""
    one, other = points("one", [(1.0, 0.0), (E**2, 2.0)]), points("other", [(E, 1.0), (E**3, 1.0)])
    assert compare_at_norm(one, other, measure="acquired").gap.value == pytest.approx(0.5)
    far = points("far", [(E**9, 1.0)])
    assert math.isnan(compare_at_norm(one, far, measure="acquired").gap.value), "nothing in common"
    frozen = points("frozen", [(0.0, 1.0)])
    assert math.isnan(compare_at_norm(one, frozen, measure="acquired").gap.value), "one that never moved"


def test_seeds_are_paired() -> None:
    """Gaps of 0.1, 0.2, 0.3; seeds differ by far more than arms do, which an unpaired comparison would drown in."""
    levels = (0.0, 5.0, -3.0)
    one = points("one", *([(0.5, level + gap)] for level, gap in zip(levels, (0.1, 0.2, 0.3), strict=True)))
    other = points("other", *([(0.5, level)] for level in levels))
    found = compare_frontiers(one, other, measure="kept")
    assert found.gap.value == pytest.approx(0.2)
    assert 0.1 - 1e-9 <= found.gap.low < 0.15 < 0.25 < found.gap.high <= 0.3 + 1e-9
    assert not found.screening
    shuffled = Sweep("other", other.x, {seed: other.y[(seed + 1) % 3] for seed in other.y})
    assert compare_frontiers(one, shuffled, measure="kept").gap.low < -4, "control: another pairing"
    fewer = Sweep("other", {1: other.x[1]}, {1: other.y[1]})
    assert compare_frontiers(one, fewer, measure="kept").gap.value == pytest.approx(0.2), "only common seeds count"
    assert compare_frontiers(one, fewer, measure="kept").seeds == (1,)


def test_items_are_paired_and_give_one_seed_an_interval() -> None:
    rng = np.random.default_rng(0)
    noise = np.concatenate([[0.0], rng.normal(0, 0.1, 400)])[:, None]
    own = np.concatenate([[0.0], rng.normal(0, 0.1, 400)])[:, None]
    x = {0: np.full((401, 1), 0.5)}
    other = Sweep("other", x, {0: 0.6 + noise})
    same = compare_frontiers(Sweep("one", x, {0: 0.7 + noise}), other, measure="kept")
    assert (same.gap.low, same.gap.high) == (pytest.approx(0.1), pytest.approx(0.1)), "items that move both move no gap"
    apart = compare_frontiers(Sweep("one", x, {0: 0.7 + own}), other, measure="kept")
    assert apart.gap.high - apart.gap.low == pytest.approx(2 * 1.96 * 0.1 * math.sqrt(2), rel=0.15)
    assert 0.0 in apart.gap


def test_resamples_without_a_gap_are_counted() -> None:
    x = {0: np.array([[1.0], [1.0], [1.0], [100.0]])}  # of a curve in one point, none is in common with another x
    flat = {0: np.zeros((4, 1))}
    found = compare_at_norm(Sweep("one", x, flat), Sweep("other", {0: np.ones((4, 1))}, flat), measure="kept")
    assert found.undetermined == pytest.approx(1 / 3)


def make_runs(place: Path, *, gap: float) -> list[FinishedRun]:
    """Two arms at two rates with three seeds; `ours` keeps `gap` more at equal acquisition and norm."""
    runs = []
    for arm, more in (("plain", 0.0), ("ours", gap)):
        for lr, acquired in ((0.001, 0.5), (0.01, 0.9)):
            for seed in range(3):
                folder = place / arm / f"{lr}-{seed}"
                adapter = {"kind": "none" if arm == "plain" else "both"}
                config = {"arm": f"{arm}.lr-{lr}", "seed": seed, "adapter": adapter, "learner": {"lr": lr}}
                kept = acquired / 2 - more
                metrics = {"learning_accuracy": acquired, "forgetting_max_past": kept, "general_change": -kept}
                write_json(folder / "config.json", config)
                write_json(folder / "summary.json", {"metrics": metrics, "delta_norm": acquired})
                runs.append(FinishedRun.read(folder))
    return runs


def test_a_study_against_its_rival(tmp_path: Path) -> None:
    found: StudyStatistics = study_statistics(make_runs(tmp_path, gap=0.1), rival="plain")
    assert len(found.comparisons) == 7
    assert {each.arm for each in found.comparisons} == {"ours"}
    kept = [each for each in found.comparisons if each.measure != "learning_accuracy"]
    assert [each.gap.value for each in kept] == pytest.approx([0.1] * 6)
    [acquired] = [each for each in found.comparisons if each.measure == "learning_accuracy"]
    assert (acquired.gap.value, acquired.matched) == (0.0, "‖ΔW‖")
    assert [each.at for each in found.comparisons[2:4]] == pytest.approx([0.95 * 0.9] * 2)
    assert all(each.seeds == (0, 1, 2) for each in found.comparisons)
    assert "7 comparisons with plain" in str(found)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["count"] == 7
    nothing = study_statistics(make_runs(tmp_path / "control", gap=0.0), rival="plain")
    assert [each.gap.value for each in nothing.comparisons] == pytest.approx([0.0] * 7)
    with pytest.raises(FeatclError, match=r"no finished run of the arm 'other'; there are plain, ours"):
        study_statistics(make_runs(tmp_path, gap=0.1), rival="other")


def test_the_table_compares_with_a_rival(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "demo"
    study.mkdir()
    (study / "base.yaml").write_text("study: demo\narm: plain\ngrid: {learner.lr: [0.001, 0.01]}\n")
    (study / "ours.yaml").write_text("base: base.yaml\nadapter: {kind: write}\n")
    for arm in study_arms(study):
        rate = arm.config.learner.lr
        for seed in (0, 1, 2):
            config = arm.with_seed(seed)
            metrics = {"learning_accuracy": 50 * rate, "forgetting_max_past": rate + 0.1 * (arm.family == "plain")}
            folder = tmp_path / "results" / "demo" / arm.name / f"seed-{seed}"
            write_json(folder / "config.json", config.to_dict())
            summary = {"config_digest": config.digest, "metrics": metrics, "delta_norm": rate}
            write_json(folder / "summary.json", summary)
    command = ["table", str(study), "--output", str(tmp_path / "results"), "--rival", "plain"]
    assert cli.invoke([*command, "--json"]) == 0
    matched = json.loads(capsys.readouterr().out)["matched"]
    kept = [each for each in matched["comparisons"] if each["measure"] == "forgetting_max_past"]
    assert [each["gap"]["value"] for each in kept] == pytest.approx([0.1] * 3)
    assert matched["count"] == 7, "also those that nothing determines"
    assert cli.invoke(command) == 0
    assert "ours − plain, forgetting_max_past at matched acquisition: +0.100" in capsys.readouterr().out
    assert cli.invoke([*command[:-1], "nobody"]) == 2
