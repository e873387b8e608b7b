"""Studies as folders: deltas over a base, grids that make many arms of one file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from featcl import cli
from featcl.config import ConfigError, RunConfig
from featcl.errors import FeatclError
from featcl.studies.arms import chosen_arms, study_arms
from featcl.studies.sweep import planned

LINES = 10  # of an arm


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "base.yaml").write_text(
        "study: demo\nlearner: {lr: 5.0e-3}\ngrid: {learner.lr: [1.0e-3, 3e-3], seed: [0, 1]}\n"
    )
    return folder


def arm(study: Path, text: str, *, name: str = "arm.yaml") -> None:
    (study / name).write_text(f"base: base.yaml\n{text}\n")


def names(study: Path) -> list[str]:
    return [each.name for each in study_arms(study)]


def test_a_grid_is_every_combination_named_by_its_values(study: Path) -> None:
    arm(study, "grid: {adapter.kind: [none, both]}")
    arms = study_arms(study)
    assert [each.name for each in arms] == [
        "base.lr-0.001",
        "base.lr-0.003",
        "arm.lr-0.001.kind-none",
        "arm.lr-0.001.kind-both",
        "arm.lr-0.003.kind-none",
        "arm.lr-0.003.kind-both",
    ]
    assert [(each.config.learner.lr, each.config.adapter.kind) for each in arms[2:]] == [
        (0.001, "none"), (0.001, "both"), (0.003, "none"), (0.003, "both"),
    ]  # fmt: skip
    assert {each.seeds for each in arms} == {(0, 1)}
    assert {each.family for each in arms} == {"base", "arm"}
    assert names(study) == names(study), "the same whenever it is read"
    assert len({each.config.digest for each in arms}) == len(arms)


def test_an_expanded_arm_is_the_config_that_says_the_same_by_hand(study: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text("study: demo\narm: base.lr-0.003\nlearner: {lr: 3.0e-3}\n")
    assert study_arms(study)[1].config == RunConfig.load(plain)


def test_an_arm_takes_axes_away_or_replaces_their_values(study: Path) -> None:
    arm(study, "grid: {learner.lr: [1.0e-2]}", name="replaced.yaml")
    arm(study, "grid: {learner.lr: null}\nlearner: {lr: 7.0e-3}", name="single.yaml")
    arm(study, "grid: null", name="without.yaml")
    found = {each.name: each for each in study_arms(study)}
    assert list(found)[2:] == ["replaced.lr-0.01", "single", "without"]
    assert (found["single"].config.learner.lr, found["single"].seeds) == (0.007, (0, 1))
    assert (found["without"].config.learner.lr, found["without"].seeds) == (0.005, (0,)), "the base's own value"


def test_values_of_every_kind_have_names_of_their_own(study: Path) -> None:
    arm(
        study,
        "grid:\n  learner.lr: null\n  learner.max_kl_per_update: [null, 0.5]\n"
        "  methods: [[], [{name: l2_to_start, strength: 1.0}]]\n  model: [lab/olmo2, ../else where]",
    )
    found = names(study)[2:]
    assert len(set(found)) == 8
    assert found[0].startswith("arm.max_kl_per_update-null.methods-")
    assert found[0].endswith(".model-lab-olmo2")
    assert found[1].endswith(".model-..-else-where")


def test_a_list_of_words_is_named_by_its_ends(study: Path) -> None:
    arm(study, "grid: {learner.lr: null, stream.tasks: [[a, b], [a, c, b c], null]}")
    assert names(study)[2:] == ["arm.tasks-a-to-b", "arm.tasks-a-to-b-c", "arm.tasks-null"]
    arm(study, "grid: {learner.lr: null, stream.tasks: [[a, b], [a, c, b]]}")
    with pytest.raises(FeatclError, match=r"two arms are called 'arm\.tasks-a-to-b', from the grid of "):
        study_arms(study)


def test_an_override_holds_for_all_arms_and_takes_the_place_of_an_axis(study: Path) -> None:
    arm(study, "adapter: {kind: none}\ngrid: {features.k: [4, 8]}")
    found = study_arms(study, ["model=lab/gemma2", "adapter={rank: 2}", "learner.lr=0.5"])
    assert [each.name for each in found] == ["base", "arm.k-4", "arm.k-8"]
    assert {(each.config.model, each.config.adapter.rank, each.config.learner.lr) for each in found} == {
        ("lab/gemma2", 2, 0.5)
    }
    assert [each.config.adapter.kind for each in found] == ["both", "none", "none"], (
        "over the arms, not in place of them"
    )
    plain = {each.config.digest for each in study_arms(study)}
    assert plain.isdisjoint(each.config.digest for each in study_arms(study, ["model=lab/gemma2"]))
    assert plain == {each.config.digest for each in study_arms(study, [])}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner={steps: 2}", "command line: learner: a grid sweeps learner.lr; give learner.lr=… in its place"),
        ("learner.lr.x=2", "command line: learner.lr.x: a grid sweeps learner.lr"),
        ("seed=3", "command line: seed is not for all arms alike; there are --output, --seeds and --arms"),
        ("study=other", "command line: study is not for all arms alike"),
        ("lerner.lr=1", "command line: lerner: unknown key, did you mean 'learner'?"),
        ("learner.lr", "command line: 'learner.lr' is not key=value"),
    ],
)
def test_an_override_that_cannot_be(
    study: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("sweep", "table"):
        assert cli.invoke([command, str(study), override]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1


def test_a_single_run_of_a_grid_says_what_makes_them_all(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["run", str(study / "base.yaml")]) == 2
    printed = capsys.readouterr().err
    assert "base.yaml: grid: a grid is for many runs" in printed
    assert "featcl sweep" in printed
    assert "unknown key" not in printed


def test_keys_that_end_alike_are_written_out(study: Path) -> None:
    arm(study, "memory: {train: {}}\ngrid: {learner.lr: [0.1], memory.train.lr: [0.2]}")
    assert names(study)[2:] == ["arm.learner.lr-0.1.memory.train.lr-0.2"]


def test_phases_inherit_what_a_grid_sweeps(study: Path) -> None:
    arm(study, "phases: [{}, {lr: 0.5}]")
    rates = [[phase.lr for phase in each.config.phases or ()] for each in study_arms(study)[2:]]
    assert rates == [[0.001, 0.5], [0.003, 0.5]]
    arm(study, "phases: [{lr: 0.25}, {lr: 0.5}]")
    with pytest.raises(
        ConfigError, match=r"arm\.yaml: grid: arm\.lr-0\.001 and arm\.lr-0\.003 are one and the same run"
    ):
        study_arms(study)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {}", "arm.yaml: grid: expected keys with lists of values, got an empty grid"),
        ("grid: {learner.lr: []}", "arm.yaml: grid: learner.lr: expected a list of values, got an empty list"),
        ("grid: {learner.lr: 0.1}", "arm.yaml: grid: learner.lr: expected a list of values, got 0.1"),
        ("grid: {learner.lr: [0.1, 0.1]}", "arm.yaml: grid: learner.lr: 0.1 is there twice"),
        ("grid: [1]", "arm.yaml: grid: expected keys with lists of values, got [1]"),
        ("grid: {learner.lrr: [0.1]}", "arm.yaml: grid: learner.lrr: unknown key, did you mean 'lr'?"),
        ("grid: {lerner.lr: [0.1]}", "arm.yaml: grid: lerner: unknown key, did you mean 'learner'?"),
        ("grid: {learner.lr: [fast]}", "arm.yaml: grid: learner.lr: should be a valid number, got 'fast'"),
        (
            "methods: [{name: ewc}]\ngrid: {methods.one.strength: [1.0]}",
            "arm.yaml: grid: methods.one.strength: 'one' is not the index of one of the 1 entries of a list",
        ),
        ("grid: {seed: [-1]}", "arm.yaml: grid: seed: expected whole numbers from 0, got -1"),
        ("grid: {study: [a]}", "arm.yaml: grid: study says where results lie"),
        ("learner: {lr: 0.1}", "arm.yaml: learner.lr is set here, and swept by the grid of "),
        ("lerner: {lr: 0.1}", "arm.yaml: lerner: unknown key, did you mean 'learner'?"),
        ("arm: base", "demo: two arms are called 'base.lr-0.001', from base.yaml and arm.yaml"),
        ("grid: {learner.lr: null, model: [a/b, a-b]}", "two arms are called 'arm.model-a-b', from the grid of "),
        ("output: elsewhere", "its configs belong to several outputs, elsewhere, results"),
    ],
)
def test_one_clear_line_and_exit_2(study: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    arm(study, text)
    for command in ("sweep", "table"):
        assert cli.invoke([command, str(study)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_a_base_that_includes_itself(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "base.yaml").write_text("base: base.yaml\nstudy: demo\n")
    assert cli.invoke(["sweep", str(study)]) == 2
    assert "base: the files include each other: base.yaml -> base.yaml" in capsys.readouterr().err


def test_runs_are_planned_seed_by_seed(study: Path) -> None:
    arm(study, "grid: {learner.lr: null, seed: [0, 1, 2]}")
    runs = [run.name for run in planned(study_arms(study))]
    arms = ["base.lr-0.001", "base.lr-0.003", "arm"]
    assert runs == [*(f"{name}.seed-{seed}" for seed in (0, 1) for name in arms), "arm.seed-2"]
    assert [run.config.seed for run in planned(study_arms(study), seeds=(4,))] == [4, 4, 4]
    [first, *_] = planned(study_arms(study), output="elsewhere")
    assert first.config.folder == Path("elsewhere/demo/base.lr-0.001/seed-0")
    for wrong in ((), (1, 1), (-1,)):
        with pytest.raises(FeatclError, match="give different whole numbers from 0"):
            planned(study_arms(study), seeds=wrong)


def test_arms_are_chosen_by_their_name_or_their_file(study: Path) -> None:
    arms = study_arms(study)
    assert chosen_arms(arms, None) == chosen_arms(arms, ["base"]) == arms
    assert chosen_arms(arms, ["base.lr-0.003"]) == arms[1:]
    with pytest.raises(FeatclError, match=r"no arm 'bse'; there are base\.lr-0\.001, base\.lr-0\.003"):
        chosen_arms(arms, ["bse"])
    with pytest.raises(FeatclError, match="no arm is named"):
        chosen_arms(arms, [])


def test_studies_of_the_repository_are_short_deltas(root: Path) -> None:
    studies = {path.parent for path in (root / "experiments").rglob("base.yaml")}
    assert studies
    for folder in studies:
        assert study_arms(folder)
        assert (folder / "README.md").is_file(), f"{folder}: a study says what it asks"
        for path in folder.glob("*.yaml"):
            text = path.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
            if "base" in yaml.safe_load(text):
                assert len(lines) <= LINES, f"{path}: an arm is a delta of at most {LINES} lines"
