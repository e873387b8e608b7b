"""The memory study at a tiny size: all arms once, nothing twice, and intervals that mean what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcl.build.longtexts import in_windows
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.lab.long import long_conversations
from featcl.models import LAB_ASSETS, load_tokenizer
from featcl.streams import Chat
from featcl.studies import memory_recall
from featcl.studies.memory_arms import GAPS, ArmResult, Bench
from featcl.studies.memory_recall import interval, main, run_study


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A study of two arms whose bench answers by hand; `calls` counts what it was asked to do."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "base.yaml").write_text("study: tried\nmemory: {train: {steps: 2}}\n")
    (folder / "linear.yaml").write_text("base: base.yaml\nmemory: {depth: 1, train: {lr: 0.1}}\n")
    calls: list[str] = []

    def result(share: float, items: int) -> ArmResult:
        right = [number < share * items for number in range(items)]
        return ArmResult(dict.fromkeys(GAPS, right), {"closed": share}, {"held": 12, "trained": 3}, seconds=1.0)

    class ByHand:
        def __init__(self, config: RunConfig, *, items: int) -> None:
            self.items = items

        def trained(self, config: RunConfig) -> ArmResult:
            calls.append(f"{config.arm} {config.seed}")
            return result(0.75 if config.arm == "base" else 0.5, self.items)

        def readers(self, config: RunConfig) -> dict[str, ArmResult]:
            calls.append(f"readers {config.seed}")
            return {name: result(0.25, self.items) for name in ("truncated", "full", "untrained")}

        def held(self, config: RunConfig) -> int:
            return 12

        def lora(self, seed: int, *, numbers: int) -> ArmResult:
            calls.append(f"lora {seed} {numbers}")
            return result(0.0, self.items)

    monkeypatch.setattr(memory_recall, "Bench", ByHand)

    def run(**options: Any) -> Any:
        calls.clear()
        said: list[str] = []
        options = {"items": 8, "seeds": (0, 1), **options}
        table = run_study(folder, output=tmp_path / "results", say=said.append, **options)
        return table, list(calls)

    return run


def test_every_arm_is_run_once(study: Callable[..., Any]) -> None:
    table, calls = study(seeds=(0,))
    assert calls == ["readers 0", "lora 0 12", "base 0", "linear 0"]
    assert [row.arm for row in table.rows] == ["truncated", "full", "untrained", "lora", "base", "linear"]
    assert study(seeds=(0,))[1] == [], "it is all there"
    assert study(seeds=(0, 1), only=("linear",))[1] == ["linear 1"]
    assert study(seeds=(0,), items=4)[1] != [], "other tests are other results"
    with pytest.raises(FeatclError, match="no arm 'lorra'; there are truncated, full"):
        study(only=("lorra",))
    for nothing in ({"items": 0}, {"seeds": ()}):
        with pytest.raises(FeatclError, match="at least one test of each gap and one seed"):
            study(**nothing)


def test_the_table_compares_with_the_base_arm(study: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    table, _ = study()
    rows = {row.arm: row for row in table.rows}
    assert rows["base"].near[0] == rows["base"].recall[1] == 0.75
    assert rows["linear"].more[0] == pytest.approx(0.25)
    assert rows["lora"].more_far[0] == pytest.approx(0.75)
    assert rows["linear"].more[1] > 0 or rows["linear"].more[1] == pytest.approx(0.0, abs=0.13)
    assert rows["base"].more == (0.0, 0.0, 0.0)
    table.print()
    assert "share of right replies" in capsys.readouterr().out
    assert json.loads(json.dumps(table.to_json()))["rows"][0]["arm"] == "truncated"


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no such study" in capsys.readouterr().err
    (tmp_path / "base.yaml").write_text("study: tried\n")
    assert main([str(tmp_path)]) == 2
    assert "base has no memory" in capsys.readouterr().err


# --- intervals -------------------------------------------------------------------------------------------------------


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Seeds that differ and tests that differ, with 3 seeds and 60 tests: at least 85 % of 200 intervals of 95 %."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        skill = 0.6 + draw.normal(0, 0.02, size=(3, 1)) + draw.normal(0, 0.2, size=(1, 60))
        _, low, high = interval((draw.random((3, 60)) < skill).astype(float), groups=3, resamples=200)
        covered += low <= 0.6 <= high
    assert covered >= 170


def test_pairing_by_test_narrows_a_difference() -> None:
    draw = np.random.default_rng(1)
    hard = draw.random((1, 90))
    one, other = ((hard + shift > 0.5).astype(float).repeat(3, axis=0) for shift in (0.05, 0.0))
    paired = interval(one - other, groups=3)
    mean, low, high = interval(one, groups=3)
    assert paired[2] - paired[1] < 0.6 * (high - low)
    assert mean - interval(other, groups=3)[0] == pytest.approx(paired[0])
    assert interval(one - one, groups=3) == (0.0, 0.0, 0.0)


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_windows_are_cut_where_somebody_asks(family: str) -> None:
    """Together they are the conversation as the model is trained on it; each later one begins with a user's turn."""
    chat = Chat(load_tokenizer(LAB_ASSETS / family))
    opening = chat.prompt([{"role": "user", "content": "x"}])
    opening = opening[int(opening[0] == chat.start_id) :][:1]
    for conversation in islice(long_conversations(0, between=(1, 5)), 20):
        text = in_windows(conversation, chat)
        whole = chat.encode(conversation.messages())
        assert [id for window in text.windows for id in window.input_ids] == whole.input_ids
        assert [target for window in text.windows for target in window.loss_mask] == whole.loss_mask
        assert len(text.windows) == len(conversation.windows)
        for window, exchanges in zip(text.windows[1:], conversation.windows[1:], strict=True):
            assert window.input_ids[:1] == opening
            said = chat.tokenizer.decode(window.input_ids)
            assert all(exchange.assistant in said and exchange.user in said for exchange in exchanges)


# --- the arms themselves ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_arms_at_a_tiny_size(tmp_path: Path) -> None:
    """An untrained memory answers as the truncated context, the full context knows, a few steps change something."""
    (tmp_path / "base.yaml").write_text("study: tried\nmemory: {layer: 2, depth: 2, train: {steps: 3, batch: 4}}\n")
    config = RunConfig.load(tmp_path / "base.yaml")
    bench = Bench(config, items=6)
    readers = bench.readers(config)
    assert readers["untrained"].right == readers["truncated"].right
    assert readers["untrained"].measures["closed"] == 0.0
    near = [right for gap in (1, 2, 3) for right in readers["full"].right[gap]]
    assert np.mean(near) >= 0.8
    trained = bench.trained(config)
    assert trained.measures["closed"] != 0.0
    assert trained.numbers["held"] == readers["untrained"].numbers["held"] > 0
    lora = bench.lora(0, numbers=trained.numbers["held"])
    assert abs(lora.numbers["held"] / trained.numbers["held"] - 1) < 0.1
    assert bench.readers(config)["full"].right == readers["full"].right, "the model is as it was"
