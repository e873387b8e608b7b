"""Blame is validated by retraining; the statistics that say so are validated here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.studies.leave_one_out import _agreement, correlation, leave_one_out


def test_ranks_not_sizes_are_compared() -> None:
    one = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert correlation(one, np.exp(one)) == pytest.approx(1.0)
    assert correlation(one, -(one**3)) == pytest.approx(-1.0)
    ties = np.array([[1.0, 1.0, 2.0, 3.0]])
    assert correlation(ties, one) == pytest.approx(0.9486832980505138), "as scipy.stats.spearmanr"
    assert correlation(np.ones((1, 4)), one) == 0.0


def test_shuffled_provenance_is_the_control() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=(6, 20))
    right = _agreement(truth + 0.3 * draw.normal(size=truth.shape), truth, 0)
    wrong = _agreement(draw.normal(size=truth.shape), truth, 0)
    assert right.shuffled_high < right.low < right.correlation < right.high
    assert wrong.shuffled_low < wrong.correlation < wrong.shuffled_high


def test_updates_from_several_experiences_are_refused(root: Path) -> None:
    config = RunConfig.load(
        root / "experiments" / "quickstart" / "base.yaml", ["phases=null", "learner={steps: 1, accumulate: 2}"]
    )
    with pytest.raises(FeatclError, match="accumulate joins several experiences in one update"):
        leave_one_out(config)


@pytest.mark.slow
def test_blame_agrees_with_retraining_in_the_laboratory(root: Path, tmp_path: Path) -> None:
    config = RunConfig.load(
        root / "experiments" / "quickstart" / "base.yaml",
        ["stream.tasks=[home_facts]", "stream.limit=24", "phases=null", f"output={tmp_path}"],
    )
    found = leave_one_out(config)
    assert found.features.low > found.features.shuffled_high, found.features
    assert found.experiences == len(found.ratios) == 24
    assert found.ratios[-1] < 1e-4, "nothing came after the last: subtracting it is exact"
    with pytest.raises(FeatclError, match="a guard rolls back"):
        leave_one_out(config.model_copy(update={"learner": config.learner.model_copy(update={"guard": object()})}))
