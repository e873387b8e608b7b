"""RunConfig: what it reads, and the one line it answers to what it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featcl.config import ConfigError, RunConfig
from featcl.studies.grids import expand


def load(tmp_path: Path, text: str = "", *overrides: str, name: str = "arm.yaml") -> RunConfig:
    path = tmp_path / name
    path.write_text(text)
    return RunConfig.load(path, overrides)


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.study, config.arm, config.model, config.seed) == ("quickstart", "arm", "lab/olmo2", 0)
    assert config.features.k == 32
    assert config.adapter.kind == "both"
    assert config.learner.lr == 1e-3
    assert config.evaluation.canaries is not None
    assert (config.evaluation.canaries.every, config.evaluation.canaries.items) == (25, 64)
    assert config.folder == Path("results/quickstart/arm/seed-0")


def test_a_delta_merges_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "arm: root\nlearner: {lr: 1e-2, steps: 3, objectives: [{name: sft}, {name: recover, weight: 0.5}]}\n"
    )
    config = load(tmp_path, "base: base.yaml\nlearner:\n  lr: 5.0e-3\n  objectives: [{name: sft}]\n", name="delta.yaml")
    assert config.arm == "delta", "an arm's name is its own"
    assert (config.learner.lr, config.learner.steps) == (5e-3, 3)
    assert [o.name for o in config.learner.objectives] == ["sft"], "lists replace"


def test_a_chain_of_bases_and_a_cycle(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    (tmp_path / "a.yaml").write_text("seed: 7\n")
    (folder / "b.yaml").write_text("base: ../a.yaml\nmodel: x\n")
    config = RunConfig.load(folder / "b.yaml")
    assert (config.seed, config.model) == (7, "x")
    (tmp_path / "a.yaml").write_text("base: deep/b.yaml\n")
    with pytest.raises(ConfigError, match=r"include each other: b\.yaml -> a\.yaml -> b\.yaml"):
        RunConfig.load(folder / "b.yaml")
    with pytest.raises(ConfigError, match="include each other"):
        load(tmp_path, "base: self.yaml\n", name="self.yaml")


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("2", 2.0), ("1E-4", 1e-4), (".5", 0.5)])
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, f"learner: {{lr: {text}}}").learner.lr == value
    assert load(tmp_path, "", f"learner.lr={text}").learner.lr == value


def test_words_that_look_like_numbers_stay_words(tmp_path: Path) -> None:
    assert load(tmp_path, "", "study=run-1e", "model=e5").model == "e5"


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path, "phases: [{lr: 1e-3}, {steps: 2}]", "stream={path: x.jsonl}", "phases.1.lr=0.5",
        "evaluation.suites=[]", "evaluation.canaries=null", "features.sae={1: a, 3: b}",
        "features.positive=[a.txt, b.txt]",
    )  # fmt: skip
    assert config.stream.path == "x.jsonl"
    assert config.stream.name is None, "a path replaces the name"
    assert config.evaluation.suites == ()
    assert config.evaluation.canaries is None
    assert config.features.sae == {1: "a", 3: "b"}
    assert config.phases is not None
    assert [(p.lr, p.steps) for p in config.phases] == [(1e-3, 1), (0.5, 2)]


def test_phases_are_deltas_over_the_learner(tmp_path: Path) -> None:
    config = load(tmp_path, "learner: {lr: 0.25}\nphases: [{objectives: [{name: self_distillation}]}, {lr: 0.5}]")
    assert config.phases is not None
    first, second = config.phases
    assert (first.lr, first.objectives[0].name) == (0.25, "self_distillation")
    assert (second.lr, second.objectives[0].name) == (0.5, "sft")


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    one, two = load(tmp_path, "seed: 1"), load(tmp_path, "", "seed=1", "output=/elsewhere")
    assert one.digest == two.digest
    assert one.digest != load(tmp_path, "seed: 2").digest
    again = RunConfig.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again == one
    assert again.digest == one.digest


def test_a_config_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: {stepps: 2}", "learner.stepps: unknown key, did you mean 'steps'?"),
        ("lr: 1", "lr: unknown key, did you mean 'learner.lr'?"),
        ("evaluation: {canaries: {evry: 5}}", "evaluation.canaries.evry: unknown key, did you mean 'every'?"),
        ("learner: {objectives: [{nme: sft}]}", "learner.objectives.0.nme: unknown key, did you mean 'name'?"),
        ("features: {k: many}", "features.k: should be a valid integer, got 'many'"),
        ("features: {k: '8'}", "features.k: should be a valid integer, got '8'"),
        ("learner: {lr: true}", "learner.lr: should be a valid number, got True"),
        ("learner: {lr: .nan}", "learner.lr: should be a finite number, got nan"),
        ("learner: {lr: -1}", "learner.lr: should be greater than 0, got -1"),
        ("adapter: 3", "adapter: should be a mapping of keys"),
        ("learner: {objectives: sft}", "learner.objectives: should be a list, got 'sft'"),
        ("adapter: {kind: bth}", "adapter.kind: should be 'none', 'write', 'read', 'both'"),
        ("phases: []", "phases: an empty list"),
        ("learner: {objectives: [{name: sftt}]}", "unknown objective 'sftt', did you mean 'sft'?"),
        ("methods: [{name: ewcc, strength: 1.0}]", "methods.0.name: unknown method 'ewcc', did you mean 'ewc'?"),
        ("methods: [{name: ewc, strenght: 1.0}]", "methods.0: method ewc has no parameter 'strenght', did you mean"),
        ("methods: [{name: mica, rank: 4}]", "methods.0: method mica has no parameter 'rank'; there is none"),
        ("stream: {setting: jiont}", "stream.setting: should be 'streaming', 'batches', 'domain', 'joint' or 'alone'"),
        ("stream: {passes: 3}", "stream: passes 3: what is streamed comes once; choose setting batches"),
        ("stream: {name: lab/acting, setting: joint}", "stream: lab/acting has episodes that are played when they are"),
        ("adapter: {preserved: 0.5}", "adapter: preserved belongs to kind osf, not to 'both'"),
        ("adapter: {kind: full, basis: random}", "adapter: basis belongs to the kinds that bound an update"),
        ("memory: {hads: 4}", "memory.hads: unknown key, did you mean 'heads'?"),
        ("memory: {train: {step: 4}}", "memory.train.step: unknown key, did you mean 'steps'?"),
        ("memory: {heads: 2}", "memory: an untrained memory changes nothing: give train"),
        ("memory: {train: {window: 64, context: 64}}", "memory.train: context 64 must be longer than window 64"),
        ("memory: {kind: feature, train: {}}", "memory.kind: should be 'free' or 'features', got 'feature'"),
        ("learner: {weighing: {signals: [memory]}}", "learner.weighing: the signal memory"),
        ("stream: {name: null}", "stream: give name"),
        ("study: ../up", "study: String should match pattern"),
        ("a: [1, 2", "line 1: "),
        ("seed: 1\nseed: 2", "line 2: duplicate key 'seed'"),
        ("- 1", "a config is a mapping of keys, not a list"),
        ("base: missing.yaml", "missing.yaml: cannot read this config: No such file"),
        ("base: [1]", "base: expected the path"),
    ],
)
def test_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    line = str(caught.value)
    assert message in line
    assert "\n" not in line
    assert ".yaml" in line.split(": ")[0]


def test_errors_name_where_the_key_came_from(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("learner: {stepps: 1}\n")
    with pytest.raises(ConfigError, match=r"base\.yaml: learner\.stepps"):
        load(tmp_path, "base: base.yaml\nlearner: {lr: 1.0}\n")
    with pytest.raises(ConfigError, match=r"^command line: features\.kk: unknown key, did you mean 'k'"):
        load(tmp_path, "", "features.kk=1")
    with pytest.raises(ConfigError, match="is not key=value"):
        load(tmp_path, "", "features.k")
    with pytest.raises(ConfigError, match="not the index of one of the 1 entries"):
        load(tmp_path, "phases: [{lr: 1.0}]", "phases.3.lr=1")


def test_every_config_of_the_repository_parses(root: Path) -> None:
    files = sorted((root / "experiments").rglob("*.yaml"))
    assert files
    for path in files:
        for point in expand(path):  # a file without a grid is one arm
            assert point.config.study == path.parent.name, f"{path}: the study is the folder's name"
            assert point.family == path.stem
            assert (point.config.arm == path.stem) == (not point.values)


def test_selectors_are_names_or_combinations_of_names(tmp_path: Path) -> None:
    text = "features: {selector: {union: [contrast, {rank: [rarity, persona]}]}}"
    config = load(tmp_path, text)
    assert config.features.selector == {"union": ["contrast", {"rank": ["rarity", "persona"]}]}
    assert RunConfig.from_dict(config.to_dict()) == config
    assert load(tmp_path, text, "features.selector={rank: [ids, hand]}").features.selector == {"rank": ["ids", "hand"]}
    assert load(tmp_path, text, "features.selector=rarity").features.selector == "rarity"
    for wrong, says in (
        ("contarst", "unknown selector 'contarst', did you mean 'contrast'"),
        ("{unoin: [contrast, rarity]}", "unknown combination 'unoin', did you mean 'union'"),
        ("{union: [contrast, rarety]}", "did you mean 'rarity'"),
        ("{union: [contrast]}", "expected a list of two or more selectors"),
        ("{union: [ids, hand], rank: [ids, hand]}", "expected a selector's name or one of union"),
    ):
        with pytest.raises(ConfigError, match=rf"features\.selector: .*{says}"):
            load(tmp_path, f"features: {{selector: {wrong}}}")


def test_a_basis_needs_a_kind_that_it_bounds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter: basis belongs to the kinds that bound an update") as caught:
        load(tmp_path, "adapter: {kind: none, basis: random}")
    assert "\n" not in str(caught.value)
    assert load(tmp_path, "adapter: {kind: none, basis: chosen}").adapter.kind == "none"
