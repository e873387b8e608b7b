"""Tuning: the best trial of every arm, alike for all, in files; and the committed trials of the rivals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from featcl import files
from featcl.errors import FeatclError
from featcl.studies.arms import Arm, study_arms
from featcl.studies.table import study_table
from featcl.studies.tuning import TunedArm, Tuning, tune, write_values_

ROOT = Path(__file__).parents[2] / "experiments"
TRIALS = 9
Score = Callable[[Arm], dict[str, Any] | None]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A study of two arms beside `base`, and trials of both."""
    study, trials = tmp_path / "rivals", tmp_path / "rivals_tuning"
    study.mkdir()
    trials.mkdir()
    (study / "base.yaml").write_text(f"study: rivals\noutput: {tmp_path / 'results'}\nstream: {{world: unseen}}\n")
    (study / "ewc.yaml").write_text(
        "# A penalty.\nbase: base.yaml\nmethods: [{name: ewc, strength: 100.0}, {name: replay, budget: 9}]\n"
    )
    (study / "plain.yaml").write_text("base: base.yaml\nadapter: {kind: none}\n")
    grids = {
        "ewc": "{learner.lr: [1.0e-3, 3.0e-3], methods.0.strength: [10.0, 1000.0]}",
        "plain": "{learner.lr: [3.0e-4, 1.0e-3, 3.0e-3, 1.0e-2]}",
    }
    for name, grid in grids.items():
        (trials / f"{name}.yaml").write_text(
            f"base: ../rivals/{name}.yaml\nstudy: rivals_tuning\nstream: {{world: development}}\ngrid: {grid}\n"
        )
    return study, trials


def finish(trials: Path, metrics: Score) -> None:
    """Write what every trial would have; nothing where `metrics` says None."""
    for arm in study_arms(trials):
        found = metrics(arm)
        if found is not None:
            _write(arm, found)


def _write(arm: Arm, metrics: dict[str, Any], seed: int = 0) -> None:
    config = arm.with_seed(seed)
    files.write_json(config.folder / "config.json", config.to_dict())
    summary = {"config_digest": config.digest, "metrics": metrics, "delta_norm": 1.0}
    files.write_json(config.folder / "summary.json", summary)


def metrics(acquired: float, forgotten: float | None = 0.0, general: float = 0.0) -> dict[str, Any]:
    return {"learning_accuracy": acquired, "forgetting_max_past": forgotten, "general_change": general}


def by_rate(arm: Arm) -> dict[str, Any]:
    """A higher rate acquires more, and forgets more than that from 3e-3 on."""
    rate = arm.config.learner.lr
    return metrics(0.5 + math.log10(rate) / 10, 0.5 if rate > 2e-3 else 0.1)


def test_the_best_by_acquired_less_forgotten_is_written_into_the_study(folders: tuple[Path, Path]) -> None:
    study, trials = folders
    before = (study / "plain.yaml").read_text()
    finish(trials, lambda arm: by_rate(arm) | {"general_change": -0.1 if "strength-10.0" in arm.name else 0.0})
    tuning = tune(trials, study)
    assert tuning.arms["ewc"].chosen == {"learner.lr": 1e-3, "methods.0.strength": 1000.0}
    assert tuning.arms["plain"].chosen == {"learner.lr": 1e-3}
    assert [len(arm.trials) for arm in tuning.arms.values()] == [4, 4]
    assert (tuning.world, tuning.seeds) == ("development", (0,))
    text = (study / "ewc.yaml").read_text()
    assert text.startswith("# A penalty.\nbase: base.yaml\n")
    assert yaml.safe_load(text) == {
        "base": "base.yaml",
        "methods": [{"name": "ewc", "strength": 1000.0}, {"name": "replay", "budget": 9}],
        "learner": {"lr": 1e-3},
    }
    assert yaml.safe_load((study / "plain.yaml").read_text()) == {**yaml.safe_load(before), "learner": {"lr": 1e-3}}
    assert Tuning.load(study) == tuning
    written = (study / "tuning.json").read_bytes()
    assert tune(trials, study) == tuning, "its own work does not make its trials those of another config"
    assert (study / "tuning.json").read_bytes() == written


def test_the_choice_follows_the_scores(folders: tuple[Path, Path]) -> None:
    """Negative control: with forgetting left out, another trial would be the best."""
    study, trials = folders
    finish(trials, lambda arm: by_rate(arm) | {"forgetting_max_past": None})
    tuning = tune(trials, study)
    assert tuning.arms["plain"].chosen == {"learner.lr": 1e-2}
    assert tuning.arms["plain"].at_edge == ("learner.lr",)
    assert tuning.arms["ewc"].at_edge == (), "of two values both are the edge: that says nothing"
    finish(trials, by_rate)
    assert tune(trials, study).arms["plain"].at_edge == ()


def test_the_table_prints_how_many_trials_an_arm_had(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    study, trials = folders
    finish(trials, by_rate)
    tune(trials, study)
    for arm in study_arms(study):
        _write(arm, metrics(0.5) | {"acc": 0.5})
    output = study_arms(study)[0].config.output
    rows = {row["arm"]: row["trials"] for row in study_table(study, output=output).rows}
    assert rows == {"base": None, "ewc": 4, "plain": 4}
    assert "trials: settings tried on the world development with seed 0" in study_table(study, output=output).markdown()
    (study / "plain.yaml").write_text("base: base.yaml\nadapter: {kind: none}\nlearner: {lr: 0.5}\n")
    rows = {row["arm"]: row["trials"] for row in study_table(study, output=output).rows}
    assert rows["plain"] is None, "it does not run with what was chosen"
    (study / "tuning.json").unlink()
    table = study_table(study, output=output)
    assert "trials" not in table.rows[0]
    assert "trials" not in table.markdown()


def test_what_is_not_finished_is_no_trial(folders: tuple[Path, Path]) -> None:
    study, trials = folders
    finish(trials, lambda arm: None if arm.name == "plain.lr-0.001" else by_rate(arm))
    with pytest.raises(FeatclError, match=r"1 of 4 trials of plain have not finished \(plain.lr-0.001 …\)"):
        tune(trials, study)
    tuning = tune(trials, study, failed=True)
    assert tuning.arms["plain"].chosen == {"learner.lr": 3e-4}
    assert len(tuning.arms["plain"].trials) == 4, "a trial that failed was one"
    finish(trials, lambda arm: None if arm.family == "ewc" else metrics(math.nan))
    with pytest.raises(FeatclError, match="none of the 4 trials of plain gave a score"):
        tune(trials, study, failed=True)


def test_all_arms_are_tuned_alike(folders: tuple[Path, Path]) -> None:
    study, trials = folders
    finish(trials, by_rate)
    text = (trials / "plain.yaml").read_text()
    for wrong, message in (
        (text.replace("1.0e-3, ", ""), "ewc has trials 4, plain has 3"),
        (text.replace("grid: {", "grid: {seed: [0, 1], "), r"ewc has seeds \(0,\), plain has \(0, 1\)"),
        (text.replace("development", "unseen"), "ewc has world development, plain has unseen"),
        (text.replace("../rivals/plain", "../rivals/ewc"), "both hold trials of ewc.yaml; one file each"),
        (text.replace("../rivals/plain.yaml", "ewc.yaml").replace("grid", "x-grid").split("x-grid")[0],
         "trials have an arm of"),
    ):  # fmt: skip
        (trials / "plain.yaml").write_text(wrong)
        with pytest.raises(FeatclError, match=message):
            tune(trials, study)
    (trials / "plain.yaml").write_text(text)
    base = (study / "base.yaml").read_text()
    (study / "base.yaml").write_text(base.replace("unseen", "development"))
    with pytest.raises(FeatclError, match="reports on the world development, on which its arms would have been tuned"):
        tune(trials, study)


def test_a_key_in_a_list_that_the_file_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "arm.yaml"
    path.write_text("base: base.yaml\n")
    with pytest.raises(FeatclError, match=r"methods\.0\.strength was tuned, and this file has no methods"):
        write_values_(path, {"methods.0.strength": 1.0})


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    assert Tuning.load(tmp_path) is None
    Tuning({"a": TunedArm((), {}, ())}, "development", (0,)).save(tmp_path)
    found = json.loads((tmp_path / "tuning.json").read_text())
    (tmp_path / "tuning.json").write_text(json.dumps({**found, "arms": {"a": {}}}))
    with pytest.raises(FeatclError, match=r"tuning.json: damaged \(KeyError"):
        Tuning.load(tmp_path)


# --- the rivals --------------------------------------------------------------------------------------------------


def test_every_rival_has_nine_trials_on_the_development_world() -> None:
    trials, study = study_arms(ROOT / "rivals_tuning"), study_arms(ROOT / "rivals")
    counts: dict[str, int] = {}
    for arm in trials:
        assert arm.config.stream.world == "development"
        assert arm.seeds == (0,)
        target = Path(yaml.safe_load(arm.path.read_text())["base"]).stem
        counts[target] = counts.get(target, 0) + 1
    assert {arm.path.stem for arm in study} - set(counts) == {"frozen"}, "what learns nothing has nothing to tune"
    assert set(counts.values()) == {TRIALS}, {name: count for name, count in counts.items() if count != TRIALS}
    assert {arm.config.stream.world for arm in study} == {"unseen"}


def test_the_rates_that_are_tried_bracket_the_default() -> None:
    """Numbers rise along an axis, and the rate that an arm has by itself lies between those that are tried."""
    study = {arm.path.stem: arm for arm in study_arms(ROOT / "rivals")}
    for path in sorted((ROOT / "rivals_tuning").glob("*.yaml")):
        found = yaml.safe_load(path.read_text())
        arm = study[Path(found["base"]).stem]
        for key, values in found["grid"].items():
            numbers = [value for value in values if isinstance(value, int | float)]
            if len(numbers) == len(values) > 1:
                assert numbers == sorted(numbers), (path.name, key)
        rates = found["grid"]["learner.lr"]
        assert len(rates) == 1 or rates[0] <= arm.config.learner.lr <= rates[-1], path.name


def test_a_tuned_study_has_the_values_that_were_chosen() -> None:
    tuning = Tuning.load(ROOT / "rivals")
    if tuning is None:
        assert "were not tuned yet" in (ROOT / "rivals" / "README.md").read_text(), "the README says what holds"
        return
    for arm in study_arms(ROOT / "rivals"):
        if arm.path.stem != "frozen":
            assert tuning.trials(arm.path.stem, arm.config) == TRIALS, arm.name
