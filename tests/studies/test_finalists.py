"""From screening to the final stage: who goes on, at which rates, and as which files."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featcl import cli
from featcl.errors import FeatclError
from featcl.studies import finalists as module
from featcl.studies.arms import study_arms
from featcl.studies.finalists import finalists, neighbours, write_finalists

BEST = {"kinds.lr-0.003.kind-read": 0.9, "kinds.lr-0.01.kind-gated": 0.85, "base.lr-0.001": 0.8,
        "kinds.lr-0.001.kind-write": 0.7, "lora_weight_decay.lr-0.01": 0.95, "random.lr-0.003.kind-both": 0.6,
        "pca.lr-0.003.kind-shift": 0.99, "random_features.lr-0.001.kind-both": 1.0}  # fmt: skip


@pytest.fixture
def screened(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`constraint`, every trial finished, with scores of our making."""
    import shutil

    folder = tmp_path / "constraint"
    shutil.copytree(root / "experiments" / "constraint", folder)

    def table(study: Path, *, output: str) -> Any:
        rows = [
            {"arm": arm.name, "seeds": [0], "metrics": {
                "acc": {"mean": BEST.get(arm.name, (zlib.crc32(arm.name.encode()) % 100) / 500) + 0.1},
                "general_change": {"mean": -0.1}}}
            for arm in study_arms(study)
        ]  # fmt: skip
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr(module, "study_table", table)
    return folder


def test_the_best_of_each_role_go_on(screened: Path) -> None:
    chosen = finalists(screened)
    assert [(each.role, each.arm.name, round(each.score, 6)) for each in chosen[:-1]] == [
        ("ours", "kinds.lr-0.003.kind-read", 0.9),
        ("ours", "kinds.lr-0.01.kind-gated", 0.85),
        ("ours", "base.lr-0.001", 0.8),
        ("rival", "lora_weight_decay.lr-0.01", 0.95),
        ("random", "random.lr-0.003.kind-both", 0.6),
        ("pca", "pca.lr-0.003.kind-shift", 0.99),
    ]
    assert (chosen[-1].role, chosen[-1].arm.name) == ("frozen", "frozen")
    assert {each.trials for each in chosen[:-1]} == {3}
    assert len(finalists(screened, best=1)) == len(chosen) - 2


def test_they_become_deltas_with_seeds_on_the_world_that_nothing_was_tuned_on(screened: Path) -> None:
    folder = write_finalists(screened, finalists(screened))
    assert folder == screened.with_name("constraint_final")
    arms = {arm.name: arm for arm in study_arms(folder)}
    before = {arm.name: arm for arm in study_arms(screened)}
    assert len(arms) == 6 * 3 + 1
    assert {arm.seeds for arm in arms.values()} == {(0, 1, 2)}
    assert {(arm.config.study, arm.config.stream.world) for arm in arms.values()} == {("constraint_final", "unseen")}
    rates = sorted(arm.config.learner.lr for name, arm in arms.items() if "kind-gated" in name)
    assert rates == [0.003, 0.01, 0.03], "beyond the largest that was tried"
    same = arms["kinds.kind-read.lr-0.003"].config
    was = before["kinds.lr-0.003.kind-read"].config
    changed = {"study": was.study, "stream": was.stream, "arm": was.arm}
    assert same.model_copy(update=changed) == was, "but for the world and names"
    assert {arm.family for arm in arms.values()} == {path.stem for path in folder.glob("*.yaml")}
    for path in folder.glob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert len(lines) <= 10, path
    for part in ("**Question.**", "**Prediction", "**Finding"):
        assert part in (folder / "README.md").read_text()
    with pytest.raises(FeatclError, match="holds configs already"):
        write_finalists(screened, finalists(screened))
    (folder / "README.md").write_text("mine")
    write_finalists(screened, finalists(screened, best=1), overwrite=True)
    assert (folder / "README.md").read_text() == "mine"
    assert len(study_arms(folder)) == 4 * 3 + 1, "those that no longer go on are gone"


def test_rates_between_their_neighbours() -> None:
    tried = (1e-3, 3e-3, 1e-2)
    assert neighbours(3e-3, tried) == [1e-3, 3e-3, 1e-2]
    assert neighbours(1e-3, tried) == [3e-4, 1e-3, 3e-3]
    assert neighbours(1e-2, tried) == [3e-3, 1e-2, 3e-2]
    assert neighbours(0.3, (0.1, 0.3)) == [0.1, 0.3, 1.0]


def test_before_all_trials_have_finished_nobody_is_chosen(
    screened: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = module.study_table

    def lacking(study: Path, *, output: str) -> Any:
        found = whole(study, output=output)
        found.rows[4]["seeds"] = []
        return found

    assert cli.invoke(["finalists", str(screened), "--best", "2"]) == 0
    assert "rival" in capsys.readouterr().out
    monkeypatch.setattr(module, "study_table", lacking)
    assert cli.invoke(["finalists", str(screened), "--overwrite"]) == 2
    assert "1 of 103 trials have not finished" in capsys.readouterr().err
