"""lm-evaluation-harness on a model in memory, offline: against our own scorers, cached, and leaving all as it was."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

import featcl
from featcl.adapters import constrain
from featcl.errors import FeatclError
from featcl.evaluation.harness import (
    FULL,
    QUICK,
    SMOKE,
    HarnessTier,
    evaluate_harness,
    live_digest,
    require_harness,
)
from featcl.evaluation.harness_tasks import lab
from featcl.evaluation.perplexity import text_perplexity
from featcl.evaluation.scoring import score_items
from featcl.features import Directions
from featcl.models import model_digest
from featcl.streams import Chat
from tests.conftest import tiny_model

CHOICE = HarnessTier("test", ("featcl_lab_choice",), 12)
ALL = HarnessTier("test", ("featcl_lab_choice", "featcl_lab_exact", "featcl_lab_text"), 12)


@pytest.fixture(scope="module")
def harness() -> str:
    try:
        return require_harness()
    except FeatclError as error:
        pytest.skip(f"{error}")


@pytest.fixture(scope="module", params=["olmo2", "gemma2"])
def small(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return featcl.load_model(f"lab/{request.param}")


def adapted(model: Any, *, size: float, kind: str = "both") -> Any:
    directions = Directions.from_vectors(torch.eye(model.config.hidden_size)[:4], layer=2)
    adapter = constrain(model, directions, kind=kind)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return adapter


# --- with the harness ---------------------------------------------------------------------------------------------


def test_what_the_harness_finds_is_what_our_own_scorers_find(harness: str, small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    found = evaluate_harness(model, tokenizer, ALL)
    right = score_items(model, Chat(tokenizer), lab._items()[:12])
    assert list(found.items["featcl_lab_exact"].values()) == [float(each) for each in right]
    assert found.scores["featcl_lab_exact"]["exact_match"] == pytest.approx(sum(right) / 12)
    assert found.scores["featcl_lab_choice"]["acc"] >= 0.9  # the base solves the general suite
    texts = [row["text"] for row in lab.texts()["test"]][:12]
    own = text_perplexity(model, tokenizer, texts)
    assert found.scores["featcl_lab_text"]["bits_per_byte"] == pytest.approx(own.bits_per_byte, rel=1e-3)
    assert found.counts == dict.fromkeys(ALL.tasks, 12)
    assert found.record()["general/test/featcl_lab_choice/acc"] == found.scores["featcl_lab_choice"]["acc"]


def test_a_model_that_is_broken_is_at_chance(harness: str) -> None:
    model, tokenizer = featcl.load_model("lab/olmo2")
    adapter = adapted(model, size=30.0, kind="shift")
    tier = HarnessTier("test", CHOICE.tasks)
    broken = evaluate_harness(adapter.model, tokenizer, tier)
    assert broken.scores["featcl_lab_choice"]["acc"] < 0.5  # of four
    with adapter.disabled():
        assert evaluate_harness(adapter.model, tokenizer, tier).scores["featcl_lab_choice"]["acc"] > 0.9


def test_model_and_generators_are_left_alone(harness: str) -> None:
    model, tokenizer = featcl.load_model("lab/olmo2")
    adapter = adapted(model, size=0.01)
    model.train()
    adapter.model.train()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    before = live_digest(adapter.model)
    flags = [parameter.requires_grad for parameter in adapter.model.parameters()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    evaluate_harness(adapter.model, tokenizer, CHOICE)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert live_digest(adapter.model) == before
    assert [parameter.requires_grad for parameter in adapter.model.parameters()] == flags
    assert adapter.model.training


def test_the_base_row_is_computed_once(harness: str, tmp_path: Any) -> None:
    model, tokenizer = featcl.load_model("lab/olmo2")
    first = evaluate_harness(model, tokenizer, CHOICE, cache=tmp_path)
    adapter = adapted(model, size=0.0)  # another arm, at its start
    again = evaluate_harness(adapter.model, tokenizer, CHOICE, cache=tmp_path)
    assert (first.cached, again.cached) == (False, True)
    assert again.scores == first.scores
    assert again.items == first.items
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    moved = evaluate_harness(adapter.model, tokenizer, CHOICE, cache=tmp_path)
    assert not moved.cached  # control
    with adapter.disabled():
        assert evaluate_harness(adapter.model, tokenizer, CHOICE, cache=tmp_path).cached
    fewer = HarnessTier("test", CHOICE.tasks, 4)
    assert not evaluate_harness(model, tokenizer, fewer, cache=tmp_path).cached  # control: other items
    [place] = tmp_path.glob(f"{first.digest}.json")
    place.write_text(json.dumps({"tier": "x", "more": 1}))
    with pytest.raises(FeatclError, match="is not a result that was cached"), adapter.disabled():
        evaluate_harness(adapter.model, tokenizer, CHOICE, cache=tmp_path)


def test_tasks_of_your_own_and_tasks_that_do_not_exist(harness: str, tmp_path: Any) -> None:
    model, tokenizer = featcl.load_model("lab/olmo2")
    (tmp_path / "rows.jsonl").write_text('{"q": "what is 3 plus 4?", "a": ["7", "9"]}\n' * 3)
    (tmp_path / "own.yaml").write_text(
        "task: own_sums\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = evaluate_harness(model, tokenizer, HarnessTier("own", ("own_sums",)), include=tmp_path)
    assert found.counts == {"own_sums": 3}
    with pytest.raises(FeatclError, match="no task 'featcl_lab_choise', did you mean 'featcl_lab_choice'"):
        evaluate_harness(model, tokenizer, HarnessTier("x", ("featcl_lab_choise",)))


# --- without it ---------------------------------------------------------------------------------------------------


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FeatclError, match=r"lm-eval is not installed.*pip install 'featcl\[lm-eval\]'") as caught:
        evaluate_harness(tiny_model(), None)
    assert "\n" not in str(caught.value)


def test_the_local_items_are_sound() -> None:
    """The right reply stands once among four, in every place, and the questions are those of the suite's kind."""
    rows = [lab._choice(item) for item in lab._items()]
    assert len(rows) == len(lab.SKILLS) * lab.PER_SKILL
    for row, item in zip(rows, lab._items(), strict=True):
        assert row["choices"].count(item.answer) == 1
        assert row["choices"][row["right"]] == item.answer
        assert len(set(row["choices"])) == lab.CHOICES
    places = [row["right"] for row in rows]
    assert set(places) == set(range(lab.CHOICES))
    assert max(map(places.count, set(places))) < len(rows) / 2  # always the same place would be easy to learn
    assert [lab._choice(item) for item in lab._items()] == rows


def test_tiers_ask_more_and_more() -> None:
    assert set(SMOKE.tasks) < set(QUICK.tasks) == set(FULL.tasks)
    assert SMOKE.limit < QUICK.limit  # type: ignore[operator]
    assert FULL.limit is None


@pytest.mark.parametrize("kind", ["none", "both", "residual", "shift"])
def test_the_digest_is_of_what_the_model_predicts(kind: str) -> None:
    model = tiny_model()
    base = model_digest(model)
    assert live_digest(model) == base
    adapter = adapted(model, size=0.0, kind=kind)
    if kind != "none":  # whose A is random from the start, but whose ΔW is 0
        assert live_digest(adapter.model) == base
    digests = {base}
    for seed in range(2):
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        digests.add(live_digest(adapter.model))
    assert len(digests) == 3
    with adapter.disabled():
        assert live_digest(adapter.model) == base
    assert live_digest(adapter.model, state="memory") not in digests


def test_the_same_coordinates_along_other_directions_are_another_model() -> None:
    digests = []
    for start in (0, 4):
        model = tiny_model()
        adapter = constrain(model, Directions.from_vectors(torch.eye(32)[start : start + 4], layer=2), kind="residual")
        with torch.no_grad():
            adapter.parameters()[0].fill_(0.5)
        digests.append(live_digest(adapter.model))
    assert digests[0] != digests[1]
