"""`featcl reproduce`: the same numbers to the last bit here, within a tolerance elsewhere, and what differs by name."""

from __future__ import annotations

import json
import shutil
from math import inf
from pathlib import Path
from typing import Any

import pytest

import featcl
from featcl import cli
from featcl.errors import FeatclError
from featcl.studies.reproduce import compare, exactly_comparable, reproduce
from tests.runs import make_config, make_home

pytest.importorskip("sae_lens", reason="sae-lens is not installed")
KEPT = ("config.json", "env.json", "summary.json", "R.json")  # what of a run is kept in git


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    place = tmp_path_factory.mktemp("place")
    config = make_config(make_home(tmp_path_factory.mktemp("home")), place)
    return featcl.run(config("phases=null", "stream.limit=3", "evaluation.canaries=null")).path


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """What of it is kept."""
    folder = tmp_path / "kept"
    folder.mkdir()
    for name in KEPT:
        shutil.copy(finished / name, folder)
    return folder


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_run_is_reproduced_to_the_last_bit(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["reproduce", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "values compared to the last bit: reproduced" in printed
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(KEPT), "nothing is written there"


def test_numbers_that_differ_are_named_and_exit_1(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    edit(run_dir / "summary.json", delta_norm=summary["delta_norm"] * (1 + 1e-12), stream_digest="another")
    assert cli.invoke(["reproduce", str(run_dir), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["same"], found["exact"]) == (False, True)
    assert {each["where"] for each in found["differences"]} == {"summary.json delta_norm", "summary.json stream_digest"}


def test_elsewhere_numbers_may_differ_within_the_tolerance(run_dir: Path) -> None:
    env = json.loads((run_dir / "env.json").read_text())
    summary = json.loads((run_dir / "summary.json").read_text())
    edit(run_dir / "env.json", versions={**env["versions"], "torch": "1.0"})
    edit(run_dir / "summary.json", delta_norm=summary["delta_norm"] + 0.01)
    found = reproduce(run_dir)
    assert not found.exact
    assert found.same, found
    assert 0 < found.within <= 0.01
    assert any("torch was 1.0" in line for line in found.environment)
    assert "within 0.02: reproduced" in str(found)


def test_how_far_two_files_are_apart() -> None:
    was = {
        "a": 1.0,
        "b": {"c": [4.0, None, "x"]},
        "config_digest": "one",
        "directions_digest": "u",
        "items": {"q": 0.0},
    }
    now = {"a": 1.5, "b": {"c": [4.0, 2.0, "y"]}, "config_digest": "two", "directions_digest": "v", "items": {"q": 1.0}}
    exact = {each.where: size for each, size in compare("f", was, now, exact=True)}
    assert exact == {
        "f a": 0.5,
        "f b.c.0": 0,
        "f b.c.1": inf,
        "f b.c.2": inf,
        "f directions_digest": inf,
        "f items.q": 1,
    }
    assert {each.where for each, _ in compare("f", was, now, exact=False)} == {"f a", "f b.c.0", "f b.c.1", "f b.c.2"}
    [(_, size)] = compare("f", {"norm": 200.0}, {"norm": 201.0}, exact=False)
    assert size == 0.005, "relative to what it was, where that is more than one"
    [(gone, size)] = compare("f", {"a": 1.0}, {}, exact=False)
    assert (str(gone), size) == ("f a: was 1, is nothing", inf)


def test_what_must_give_the_same_bits() -> None:
    env = {"device": "cpu", "threads": 1, "cpu": "x", "versions": {"torch": "2"}, "commit": "a", "featcl": "1"}
    assert exactly_comparable(env, env)
    assert exactly_comparable(env, {**env, "commit": "b"}), "code that changed numbers is what is looked for"
    for other in ({"threads": 2}, {"cpu": "y"}, {"versions": {"torch": "3"}}, {"device": "cuda"}, {"featcl": "2"}):
        assert not exactly_comparable(env, {**env, **other})
    assert not exactly_comparable({**env, "device": "H200"}, {**env, "device": "H200"}), "only a CPU promises bits"
    resumed = {**env, "resumed": [{"update": 3, "differs": ["threads was 1, is 2"]}]}
    assert not exactly_comparable(resumed, env)
    assert exactly_comparable({**env, "resumed": [{"update": 3, "differs": []}]}, env)


def test_what_is_no_finished_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match=r"it has no config\.json"):
        reproduce(tmp_path / "nowhere")
    edit(run_dir / "config.json", seed=5)
    with pytest.raises(FeatclError, match=r"config\.json: its digest is not that of its content"):
        reproduce(run_dir)
    edit(run_dir / "config.json", sede=5)
    with pytest.raises(FeatclError, match=r"not a config of this version: sede: unknown key, did you mean 'seed'\?"):
        reproduce(run_dir)
    (run_dir / "summary.json").unlink()
    with pytest.raises(FeatclError, match=r"it has no summary\.json"):
        reproduce(run_dir)
