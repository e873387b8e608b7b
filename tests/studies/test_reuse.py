"""What a worker keeps: no result changes, and it is made anew where anything it depends on differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import featcl
from featcl.build import build
from featcl.build.reuse import INEXACT, KEPT, Reuse
from featcl.config import RunConfig
from tests.runs import make_config, make_home, make_sae, untimed

pytest.importorskip("sae_lens", reason="sae-lens is not installed")

SHORT = ("stream.limit=2", "phases=null", "evaluation.canaries=null")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture
def config(home: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return make_config(home, tmp_path)


def results(config: RunConfig, place: Path, reuse: Reuse | None) -> tuple[object, bytes, bytes]:
    """metrics.jsonl but for its times, R.json and summary.json."""
    path = featcl.run(config.model_copy(update={"output": str(place)}), reuse=reuse).path
    return untimed(path), (path / "R.json").read_bytes(), (path / "summary.json").read_bytes()


@pytest.mark.parametrize(
    "change",
    [(), ("learner.lr=3e-3",), ("adapter.kind=write",), ("adapter.kind=full",), ("adapter.kind=gated",)],
    ids=lambda change: "-".join(change) or "same",
)
def test_a_warm_run_writes_what_a_cold_one_writes(
    config: Callable[..., RunConfig], tmp_path: Path, change: tuple[str, ...]
) -> None:
    reuse = Reuse()
    results(config(*SHORT), tmp_path / "first", reuse)
    assert (reuse.hits, reuse.misses) == (0, 2)
    wanted = config(*SHORT, *change)
    warm = results(wanted, tmp_path / "warm", reuse)
    assert (reuse.hits, reuse.misses) == (2, 2), "the directions and the base row were there"
    assert warm == results(wanted, tmp_path / "cold", None)


@pytest.mark.parametrize("kind", ["none", "read", "residual", "shift", "scale", *INEXACT])
def test_row_0_of_every_kind_is_the_base_models(config: Callable[..., RunConfig], kind: str) -> None:
    """To the last bit, which is why it may be scored once for all of them."""
    made = build(config(*SHORT, f"adapter.kind={kind}"))
    own = made.material.board.score(made.adapter.model)
    with made.adapter.disabled():
        base = made.material.board.score(made.adapter.model)
    assert kind in INEXACT or own == base


def test_what_is_kept_is_what_is_written(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Control: a wrong row that lies in wait would be seen."""
    reuse = Reuse()
    right = results(config(*SHORT), tmp_path / "first", reuse)
    [row] = [found for found in reuse._found.values() if isinstance(found, dict)]
    column = next(iter(row))
    row[column] = dict.fromkeys(row[column], 5.0)
    wrong = results(config(*SHORT), tmp_path / "second", reuse)
    assert json.loads(wrong[1]) != json.loads(right[1])


@pytest.mark.parametrize(
    ("change", "misses"),
    [
        (("features.k=4",), 1),
        (("features.selector=gradient_energy",), 1),
        (("adapter.basis=random",), 1),
        (("adapter.basis=pca",), 1),
        (("seed=1",), 2),
        (("stream.holdout=0.3",), 2),
        (("runtime.float32_matmul=high",), 2),
        (("runtime.dtype=bfloat16", "runtime.device=cpu"), 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_another_setting_is_worked_out_anew(
    config: Callable[..., RunConfig], change: tuple[str, ...], misses: int
) -> None:
    reuse = Reuse()
    for overrides in ((), change):
        made = build(config(*SHORT, *overrides), reuse=reuse)
        made.material.board.score(made.adapter.model)
    assert (reuse.hits, reuse.misses) == (2 - misses, 2 + misses)


@pytest.mark.parametrize(("file", "misses"), [("sae", 1), ("background.txt", 2), ("stream.jsonl", 2), ("model", 2)])
def test_another_file_is_worked_out_anew(config: Callable[..., RunConfig], home: Path, file: str, misses: int) -> None:
    reuse = Reuse()
    for changed in (False, True):
        if changed and file == "sae":
            make_sae(home / "sae", layer=2)
        elif changed and file == "model":
            from safetensors.torch import load_file, save_file

            weights = load_file(home / "model" / "model.safetensors")
            weights["model.norm.weight"] *= 1.5
            save_file(weights, home / "model" / "model.safetensors", metadata={"format": "pt"})
        elif changed:
            lines = (home / file).read_text().splitlines()
            (home / file).write_text("\n".join(lines[:-1]) + "\n")
        made = build(config(*SHORT), reuse=reuse)
        made.material.board.score(made.adapter.model)
    assert (reuse.hits, reuse.misses) == (2 - misses, 2 + misses)


def test_answers_of_methods_and_later_rows_are_not_the_base_models(config: Callable[..., RunConfig]) -> None:
    reuse = Reuse()
    made = build(config(*SHORT, "methods=[{name: ewc}]"), reuse=reuse)
    made.material.board.score(made.adapter.model)
    assert reuse.misses == 1, "the directions alone"
    made = build(config(*SHORT), reuse=reuse)
    made.learner.observe(made.material.tasks[0].trajectories[0])
    made.material.board.score(made.adapter.model)
    assert (reuse.hits, reuse.misses) == (1, 1), "what has learned is scored"


def test_a_copy_is_given_and_the_oldest_is_dropped() -> None:
    reuse = Reuse()
    first = reuse.of("a", {"n": 0}, lambda: {"x": [1]})
    first["x"].append(2)
    assert reuse.of("a", {"n": 0}, lambda: {"x": []}) == {"x": [1]}
    for n in range(1, KEPT + 1):
        reuse.of("a", {"n": n}, dict)
    assert reuse.of("a", {"n": 0}, lambda: {"made": "anew"}) == {"made": "anew"}
    assert reuse.of("a", None, lambda: 1) != reuse.of("a", None, lambda: 2), "what cannot be told is made every time"
