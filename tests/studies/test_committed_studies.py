"""The studies of the repository: they expand, are deltas, keep to their budgets, and have what they are compared with.

A study is swept where its `base.yaml` has a grid; the others are examples, or have a budget and a runner of their own.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from featcl.errors import FeatclError
from featcl.studies.arms import Arm, study_arms

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = sorted({path.parent for path in EXPERIMENTS.rglob("base.yaml")} | set(EXPERIMENTS.glob("*_final")))
SWEPT = [
    folder
    for folder in STUDIES
    if folder.parent == EXPERIMENTS  # those for research GPUs have tests of their own
    and not folder.name.endswith("_final")  # what is left after screening, within the budget of the study screened
    and "grid" in yaml.safe_load((folder / "base.yaml").read_text(encoding="utf-8"))
]
TUNED = ("learner.lr", "methods.0.")  # a method without a rate has a strength of its own
LINES, RUNS, RATES, SEEDS = 10, 200, 3, 3
FINALISTS = 6  # the best three, the best rival, random and pca
AFTER = FINALISTS * (RATES * SEEDS + SEEDS) + 2 * SEEDS  # here at three rates, second family at one, frozen on both
CONTROLS = ("frozen", "full_lora", "lora_weight_decay", "random", "pca")


def named(folder: Path) -> str:
    return folder.name


def trials(arms: tuple[Arm, ...]) -> Counter[str]:
    """Setting, which is an arm but for its rate -> in how many rates it is tried."""

    def setting(arm: Arm) -> str:
        other = [(key, str(value)) for key, value in arm.values.items() if not key.startswith(TUNED)]
        return f"{arm.family} {sorted(other)}"

    return Counter(setting(arm) for arm in arms if arm.family != "frozen")


@pytest.mark.parametrize("folder", STUDIES, ids=named)
def test_a_study_expands_to_arms_with_names_of_their_own_and_says_what_it_asks(folder: Path) -> None:
    arms = study_arms(folder)
    assert len({arm.name for arm in arms}) == len(arms)
    assert {arm.config.study for arm in arms} == {folder.name}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("**Question.**", "**Prediction", "**Finding"):
        assert part in readme
    for path in folder.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert path.stem == "base" or "base" in yaml.safe_load(text), f"{path}: an arm is a delta"
        assert path.stem == "base" or len(lines) <= LINES, f"{path}: of at most {LINES} lines"


@pytest.mark.parametrize("folder", SWEPT, ids=named)
def test_a_swept_study_has_controls_and_as_many_trials_for_each(folder: Path) -> None:
    arms = study_arms(folder)
    missing = set(CONTROLS) - {arm.family for arm in arms}
    assert not missing
    found = trials(arms)
    assert set(found.values()) == {RATES}, found
    for basis in ("random", "pca"):
        assert {arm.config.adapter.basis for arm in arms if arm.family == basis} == {basis}
    assert all(arm.config.stream.world == "development" for arm in arms), "nothing is tuned on the world of the claims"
    [frozen] = [arm for arm in arms if arm.family == "frozen"]
    assert [term.weight for term in frozen.config.learner.objectives] == [0.0]


@pytest.mark.parametrize("folder", SWEPT, ids=named)
def test_a_swept_study_keeps_to_the_budget_of_its_readme(folder: Path) -> None:
    screening = len(study_arms(folder))
    assert screening + AFTER <= RUNS
    readme = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    assert f"**Budget.** {screening + AFTER} runs in all: {screening} for screening" in readme


def test_no_two_settings_of_a_swept_study_are_the_same_run() -> None:
    """The name is part of a run's digest: without it, twins are seen."""
    for folder in SWEPT:
        seen = Counter(arm.config.model_copy(update={"arm": None}).digest for arm in study_arms(folder))
        assert max(seen.values()) == 1, folder


def test_a_twin_or_a_missing_rate_would_be_seen(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(SWEPT[0], folder)
    before = study_arms(folder)
    (folder / "unequal.yaml").write_text("base: base.yaml\ngrid: {learner.lr: [1.0e-3]}\n")
    assert set(trials(study_arms(folder)).values()) == {1, RATES}
    twins = Counter(arm.config.model_copy(update={"arm": None}).digest for arm in study_arms(folder))
    assert max(twins.values()) == 2
    assert len(study_arms(folder)) == len(before) + 1
    (folder / "named.yaml").write_text("base: base.yaml\narm: unequal\ngrid: {learner.lr: [1.0e-3]}\n")
    with pytest.raises(FeatclError, match="two arms are called"):
        study_arms(folder)
