"""Every arm of every study is made from its config, and runs; on the laboratory's own models, with little to learn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import featcl
from featcl.build import build
from featcl.build.reuse import Reuse
from featcl.config import RunConfig
from featcl.features import Directions
from featcl.models import LAB_ASSETS
from featcl.streams import Trajectory
from featcl.studies.arms import Arm, study_arms
from featcl.studies.finalists import setting
from tests.studies.test_committed_studies import SWEPT, named

pytest.importorskip("sae_lens", reason="sae-lens is not installed")
pytestmark = pytest.mark.slow

LITTLE = ("stream.limit=2", "evaluation.suites=[]", "evaluation.canaries=null", "tracking.samples=0")
STUDIES = [folder for folder in SWEPT if folder.name not in ("rivals", "rivals_tuning", "memory")]  # have their own


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directions that stay unwritten, as the README of `constraint` has them made."""
    folder = tmp_path_factory.mktemp("protected")
    width = json.loads((LAB_ASSETS / "olmo2" / "config.json").read_text())["hidden_size"]
    vectors = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    Directions.from_vectors(vectors, layer=3).save(folder)
    return folder


def settings(folder: Path, *overrides: str) -> list[Arm]:
    """One arm of every setting: rates, and strengths of a method, make no other object."""
    found: dict[str, Arm] = {}
    for arm in study_arms(folder, [*LITTLE, *overrides]):
        found.setdefault(setting(arm), arm)
    return list(found.values())


def ready(arm: Arm, protected: Path, place: Path) -> RunConfig:
    config = arm.config.model_copy(update={"output": str(place)})
    if config.adapter.protect is None:
        return config
    return config.model_copy(update={"adapter": config.adapter.model_copy(update={"protect": str(protected)})})


@pytest.mark.parametrize("folder", STUDIES, ids=named)
def test_every_arm_is_made_and_learns_from_one_experience(
    folder: Path, protected: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    reuse, wrong = Reuse(), {}
    for arm in settings(folder):
        try:
            made = build(ready(arm, protected, tmp_path), reuse=reuse)
        except Exception as error:  # noqa: BLE001 - all that fail are named together
            wrong[arm.name] = f"{type(error).__name__}: {error}"
            continue
        first = made.material.tasks[0]
        if not made.learner.methods and isinstance(first.trajectories[0], Trajectory):
            stats = made.learner.observe(first.trajectories[0])
            assert stats.tokens > 0, arm.name
            assert arm.family == "frozen" or made.adapter.delta_norm() > 0, arm.name
    assert not wrong


@pytest.mark.parametrize("folder", STUDIES, ids=named)
def test_one_arm_of_a_study_runs_to_its_end(
    folder: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one, which is the least like the base."""
    monkeypatch.chdir(root)
    name = study_arms(folder)[0].config.stream.name
    tasks = {
        "lab/acting": "[home]",
        "lab/thousand": "[facts_00, facts_01]",
        "lab/applications": "[home_facts, home_style]",
    }
    shorter = [f"stream.tasks={tasks[name]}"] if name in tasks else []
    arm = settings(folder, *shorter)[-1]
    assert featcl.run(ready(arm, tmp_path, tmp_path)).summary["arm"] == arm.name


def test_every_kind_on_every_basis_runs(
    protected: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    folder, reuse, norms = root / "experiments" / "constraint", Reuse(), {}
    for arm in settings(folder, "stream.tasks=[home_facts, code_library]"):
        summary = featcl.run(ready(arm, protected, tmp_path), reuse=reuse).summary
        norms[arm.config.adapter.kind, arm.config.adapter.basis, arm.config.adapter.protect is None] = summary
    kinds = {kind for kind, _, _ in norms}
    assert kinds == {"none", "write", "read", "both", "residual", "gated", "shift", "scale"}
    for basis in ("chosen", "random", "pca", "random_features"):
        assert {kind for kind, own, _ in norms if own == basis} >= kinds - {"none"}
        assert ("both", basis, False) in norms, "protected"
    digests = {basis: norms["both", basis, True]["directions_digest"] for basis in ("chosen", "random", "pca")}
    assert len(set(digests.values())) == 3
    assert reuse.hits > reuse.misses
