"""A config whose SAE is not there yet trains it first, once, and holds it to its gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from featcl.build import build
from featcl.config import ConfigError, RunConfig
from featcl.errors import FeatclError
from tests.runs import make_config, make_home

pytest.importorskip("sae_lens", reason="sae-lens is not installed")
PLAIN = ("phases=null", "evaluation.canaries=null", "stream.limit=2", "features.k=4")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    home = make_home(tmp_path)
    text = "\n\f".join(" ".join(f"word{(n * m) % 37}" for m in range(30)) for n in range(60))
    (home / "text.txt").write_text(text)
    make = make_config(home, tmp_path)

    def training(
        *overrides: str, sae: str = "own", gate: str = "fvu: 100.0, loss_recovered: -100.0, dead_fraction: 1.0"
    ):
        train = f"{{text: [{home / 'text.txt'}], layer: 2, d_sae: 48, tokens: 2048, {gate}}}"
        return make(*PLAIN, f"features.sae={home / sae}", f"features.train={train}", *overrides)

    return training


def test_it_is_trained_once_and_used(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    first = build(config())
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "own").iterdir()}
    again = build(config())
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "own").iterdir()} == made
    assert first.directions.digest == again.directions.digest  # type: ignore[union-attr]
    assert json.loads((tmp_path / "own" / "featcl.json").read_text())["held_out"]["tokens"] > 0


def test_one_that_misses_its_gate_is_refused(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(FeatclError, match=r"misses its gate on held-out text: .*loss_recovered .* at least 1"):
        build(config(gate="fvu: 100.0, loss_recovered: 1.0, dead_fraction: 1.0"))
    build(config())  # the same SAE, and a gate that it reaches


def test_it_is_not_trained_on_what_is_taught(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match=r"features\.train\.text"):
        build(config(f"features.train.text=[{tmp_path / 'stream.jsonl'}]"))
    with pytest.raises(FeatclError, match=r"nowhere\.txt does not exist"):
        build(config("features.train.text=[nowhere.txt]"))
    assert not (tmp_path / "own" / "featcl.json").exists()


def test_a_config_without_it_keeps_its_digest_and_a_laboratory_sae_is_there() -> None:
    plain = RunConfig()
    assert "train" not in plain.to_dict()["features"]
    assert RunConfig.from_dict(plain.to_dict()).digest == plain.digest
    with pytest.raises(ConfigError, match="train makes one SAE, in the folder that sae names"):
        RunConfig.from_dict({"features": {"train": {"text": ["a.txt"], "layer": 2}}})
