"""Pictures: the same data gives the same bytes, other data others; colours keep apart; sizes fit half a column."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from featcl.tracking import plots
from tests.tracking import folders


def size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size


def draw_all(folder: Path, records: list[dict]) -> list[Path]:
    matrix = {key: value for key, value in folders.score_rows().items() if key != "items"}
    points = [plots.FrontierPoint(arm, 0.1 * i, 1 - 0.1 * i, 0.02, 0.03) for arm in ("a", "b") for i in range(3)]
    made = [
        plots.score_heatmap(folder / "R.png", **matrix),
        plots.forgetting_curves(folder / "forgetting.png", records),
        plots.loss_curve(folder / "loss.png", records),
        plots.drift_curve(folder / "drift.png", records),
        plots.frontier(folder / "frontier.png", points),
    ]
    return [path for path in made if path is not None]


def test_the_same_data_gives_the_same_bytes_and_other_data_does_not(tmp_path: Path) -> None:
    records = folders.records()
    first, second = draw_all(tmp_path / "1", records), draw_all(tmp_path / "2", records)
    assert len(first) == 5
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
        assert one.stat().st_size < 300_000
        assert 600 <= size(one)[0] <= 1400
    changed = [{**record, "train/loss": record["train/loss"] + 1} for record in records]
    plots.loss_curve(tmp_path / "changed.png", changed)
    assert (tmp_path / "changed.png").read_bytes() != (tmp_path / "1" / "loss.png").read_bytes()


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    for draw in (plots.forgetting_curves, plots.loss_curve, plots.drift_curve):
        assert draw(tmp_path / "none.png", [{"update": 1, "cost/tokens": 3}]) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("measure", ["accuracy", "nll"])
def test_missing_cells_are_drawn_as_missing(tmp_path: Path, measure: str) -> None:
    path = plots.score_heatmap(
        tmp_path / "R.png", rows=["base"], columns=["a", "b"], values=[[None, 0.5]], n_tasks=1, measure=measure
    )
    assert size(path)[0] > 600
    plots.score_heatmap(tmp_path / "e.png", rows=["base"], columns=["a"], values=[[None]], measure=measure)


def test_the_running_mean_is_unbiased_at_its_start() -> None:
    assert plots._running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert plots._running_mean([1.0, 0.0]) == pytest.approx([1.0, 0.9 / 1.9])


def test_colours_keep_apart_for_a_dichromat() -> None:
    """Distances in linear RGB after Viénot et al. 1999 (deuteranopia): no two curves share a colour."""
    deuteranopia = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    colours = [np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2 for c in plots.COLOURS]
    seen = [deuteranopia @ colour for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.1
    red, green = deuteranopia @ np.array([0.6, 0.0, 0.0]), deuteranopia @ np.array([0.0, 0.25, 0.0])
    assert np.linalg.norm(red - green) < 0.1, "the check itself must see that red and green fall together"
