"""The study table reads what finished runs wrote, and says what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featcl import files
from featcl.errors import FeatclError
from featcl.studies.arms import seed_folders, study_arms
from featcl.studies.table import study_table
from tests.studies.test_points import finished as made


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "base.yaml").write_text("study: demo\n")
    (folder / "another.yaml").write_text("base: base.yaml\nadapter: {kind: none}\n")
    return folder


def finish(study: Path, arm: str, seed: int, *, acc: float, digest: str | None = None) -> None:
    config = next(a for a in study_arms(study) if a.name == arm).with_seed(seed)
    metrics = {"acc": acc, "bwt": None}
    summary = {"config_digest": digest or config.digest, "metrics": metrics, "delta_norm": 2.0}
    folder = study.parent / "results" / "demo" / arm / f"seed-{seed}"
    files.write_json(folder / "config.json", config.to_dict())
    files.write_json(folder / "summary.json", summary)


def test_means_over_seeds(study: Path) -> None:
    finish(study, "base", 0, acc=0.25)
    finish(study, "base", 1, acc=0.75)
    table = study_table(study, output=study.parent / "results")
    base, another = table.rows
    assert (base["arm"], another["arm"]) == ("base", "another"), "the base comes first"
    assert base["seeds"] == [0, 1]
    assert base["metrics"]["acc"]["mean"] == 0.5
    assert base["metrics"]["acc"]["std"] == pytest.approx(0.125**0.5)
    assert "bwt" not in base["metrics"], "a metric that is not determined is left out"
    assert (another["seeds"], another["kind"]) == ([], "none")
    assert another["status"].startswith("not run; featcl run ")


def test_intervals_and_paired_differences(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With R beside the summaries; identical answers differ in nothing."""
    for arm, learned in (("base", 0.95), ("another", 0.5)):
        for seed in (0, 1, 2):
            place = study.parent / "results" / "demo" / arm / f"seed-{seed}"
            made(place, seed=seed, learned=learned, study="demo", arm=arm)
            summary = json.loads((place / "summary.json").read_text())
            config = next(a for a in study_arms(study) if a.name == arm).with_seed(seed)
            files.write_json(place / "summary.json", {**summary, "config_digest": config.digest, "delta_norm": 2.0})
    table = study_table(study, output=study.parent / "results")
    base, another = table.rows
    assert base["differences"] == {}, "nothing is compared with itself"
    assert another["differences"]["acc"]["high"] < 0
    mean = another["metrics"]["acc"]["mean"] - base["metrics"]["acc"]["mean"]
    assert another["differences"]["acc"]["value"] == pytest.approx(mean)
    limits = base["intervals"]["acc"]
    assert limits["value"] == pytest.approx(base["metrics"]["acc"]["mean"])
    assert limits["low"] < limits["value"] < limits["high"]
    table.print()
    printed = capsys.readouterr().out
    assert "5 comparisons with base, paired by seed and item" in printed
    assert "screening" not in printed, "three seeds"
    page = table.write_page(study.parent / "table.html")
    assert (study.parent / "table-plots" / "frontier.svg").is_file()
    assert "5 comparisons with base" in page.read_text()


def test_few_seeds_are_screening(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(study, "base", 0, acc=0.25)
    study_table(study, output=study.parent / "results").print()
    assert "screening only, with fewer than 3 seeds: base" in capsys.readouterr().out


def test_results_of_another_config_are_left_out(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(study, "base", 0, acc=0.25)
    finish(study, "base", 1, acc=0.75, digest="another")
    table = study_table(study, output=study.parent / "results")
    assert table.rows[0]["metrics"]["acc"] == {"mean": 0.25, "std": None}
    assert "seeds [1] hold another config's results" in table.rows[0]["status"]
    table.print()
    printed = capsys.readouterr().out
    assert "0.250" in printed
    assert "mean over tasks of R[T, j]" in printed


def test_no_table_of_other_configs_only(study: Path) -> None:
    finish(study, "base", 0, acc=0.25, digest="another")
    finish(study, "base", 3, acc=0.25, digest="another")
    with pytest.raises(FeatclError, match=r"runs of another config .* lie under base \(seeds 0, 3\)"):
        study_table(study, output=study.parent / "results")


def test_what_cannot_be_a_table(study: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match="no such study"):
        study_table(tmp_path / "nowhere")
    with pytest.raises(FeatclError, match=r"no finished run; start with: featcl run .*base\.yaml"):
        study_table(study, output=tmp_path / "results")
    (study / "odd.yaml").write_text("study: other\n")
    with pytest.raises(FeatclError, match="several studies, demo, other"):
        study_arms(study)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FeatclError, match=r"holds no \.yaml"):
        study_arms(empty)


def test_seed_folders_are_numbers(tmp_path: Path) -> None:
    for name in ("seed-10", "seed-2", "seed-x", "old-seed-3"):
        (tmp_path / name).mkdir()
    assert list(seed_folders(tmp_path)) == [2, 10]
