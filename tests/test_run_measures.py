"""Runs that measure all that can be asked for, on a tiny random model: records, controls, resuming, the card."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import featcl
from featcl import cli
from featcl.build import build
from featcl.config import ConfigError, RunConfig
from featcl.errors import FeatclError
from featcl.evaluation import report_card
from featcl.evaluation.cost import CostMeter
from featcl.evaluation.result import RunResult
from featcl.studies.report import report_runs
from tests.runs import make_config, make_home, untimed
from tests.test_run import interrupt_at

pytest.importorskip("sae_lens", reason="sae-lens is not installed")

SHORT = ("phases=null", "stream.limit=4", "evaluation.canaries.every=3", "tracking.samples=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("home"))
    (home / "background.txt").write_text("\n".join(f"line {i} of quiet text" for i in range(60)))
    (home / "prose.txt").write_text("a quiet text of some words\fand another one, which speaks of nothing much")
    (home / "names.jsonl").write_text(
        "".join(
            json.dumps({"modelId": "tiny", "layer": "2", "index": i, "description": f"feature {i}"}) + "\n"
            for i in range(64)
        )
    )
    return home


def everything(home: Path) -> tuple[str, ...]:
    """All that needs nothing beside the package."""
    return (
        "evaluation.online=true",
        "evaluation.cost=true",
        "evaluation.drift={texts: 8, top: 5, scales: [0.0, 2.0]}",
        "evaluation.shift={sequences: 4}",
        f"evaluation.perplexity={{files: [{home / 'prose.txt'}], context: 32}}",
        f"features.explanations={home / 'names.jsonl'}",
    )


@pytest.fixture
def config(home: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return make_config(home, tmp_path)


@pytest.fixture(scope="module")
def measured(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[dict[str, Any]]]:
    """A run that measures everything, and its records."""
    result = featcl.run(make_config(home, tmp_path_factory.mktemp("run"))(*SHORT, *everything(home)))
    return result, untimed(result.path)


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def table(result: RunResult, name: str) -> dict[str, list[Any]]:
    data = json.loads((result.path / "tables" / f"{name}.json").read_text())
    return {column: [row[place] for row in data["rows"]] for place, column in enumerate(data["columns"])}


def test_every_experience_is_scored_before_it_is_learned(measured: Any) -> None:
    _, records = measured
    updates = of_kind(records, "update")
    assert len(updates) == 8
    for update in updates:
        assert update["online/nll"] == pytest.approx(update["train/loss"], rel=1e-4), "as the loss of sft has it"
        assert update["online/tokens"] == update["cost/tokens"]
        assert 0 <= update["online/score"] <= 1
    assert updates[0]["online/base_nll"] == pytest.approx(updates[0]["online/nll"], rel=1e-5), "nothing was learned"
    later = updates[-1]
    assert later["online/nll"] < later["online/base_nll"] - 0.1, "what came before helps"


def test_an_experience_counts_once_however_often_it_is_learned_from(config: Callable[..., RunConfig]) -> None:
    two = "phases=[{objectives: [{name: sft}]}, {objectives: [{name: sft}]}]"
    result = featcl.run(config(*SHORT, two, "stream.limit=2", "evaluation.online=true"))
    updates = of_kind(untimed(result.path), "update")
    assert ["online/nll" in update for update in updates] == [True, True, False, False] * 2


def test_what_learning_costs_is_that_of_the_meter(measured: Any, config: Callable[..., RunConfig], home: Path) -> None:
    result, records = measured
    updates, rows = of_kind(records, "update"), of_kind(records, "evaluation")
    spent = sum(update["cost/forward_flops"] + update["cost/backward_flops"] for update in updates)
    assert "cost/train_flops" not in rows[0], "the base model has learned nothing"
    assert rows[-1]["cost/train_flops"] == spent > 0
    assert result.summary["cost"]["learning"]["flops"]["backward"] == sum(u["cost/backward_flops"] for u in updates)
    assert 0 < rows[0]["cost/evaluation_flops"] < rows[1]["cost/evaluation_flops"]
    experiment = build(config(*SHORT))
    with CostMeter(experiment.adapter.model) as meter, meter.phase("by hand"):
        experiment.learner.observe(experiment.material.tasks[0].trajectories[0])
    assert {name: updates[0][name] for name in meter.total.record()} == meter.total.record()
    saved = json.loads((result.path / "cost.json").read_text())
    assert saved["phases"]["learning"]["peak_rss_bytes"] > 1 << 20
    assert saved["phases"]["learning"]["seconds"] > 0
    assert saved["stored_bytes"]["adapter"] == result.summary["stored_bytes"]["adapter"] > 0
    assert "seconds" not in (result.path / "summary.json").read_text()


def test_drift_is_zero_before_learning_and_not_after(measured: Any) -> None:
    result, records = measured
    base, *_, last = of_kind(records, "evaluation")
    for name in ("kl_new", "kl_background", "reverse_kl_new", "flipped_background", "features_changed",
                 "features_relative", "delta_norm_1", "delta_norm_2"):  # fmt: skip
        assert base[f"drift/{name}"] == 0.0, name
    assert last["drift/kl_new"] > 0.01
    assert last["drift/kl_background"] > 0.01
    norms = [last[f"drift/delta_norm_{layer}"] for layer in (1, 2)]
    assert math.hypot(*norms) == pytest.approx(result.summary["delta_norm"], rel=1e-4)
    changes = table(result, "feature_drift")
    assert len(changes["feature_id"]) == 5
    assert changes["name"] == [f"feature {i}" for i in changes["feature_id"]]
    validity = table(result, "sae_validity")
    assert validity["scale"] == [0.0, 2.0]
    assert validity["fvu"][0] == pytest.approx(base["drift/sae_fvu"], rel=1e-5)
    assert validity["delta_norm"] == pytest.approx([0.0, 2 * result.summary["delta_norm"]], rel=1e-4)


def test_distances_and_frozen_text(measured: Any) -> None:
    result, records = measured
    base, first, last = of_kind(records, "evaluation")
    steps = table(result, "shift")
    assert (steps["before"], steps["after"]) == (["left"], ["right"])
    assert not any(name.startswith("shift/") for name in (*base, *first)), "nothing comes before the first task"
    assert last["shift/gradient"] == steps["gradient"][0] == result.summary["shift"]["gradient"] > 0
    bits = [row["general/prose_bits_per_byte"] for row in (base, first, last)]
    assert all(value > 0 for value in bits)
    assert len(set(bits)) == 3
    assert base["general/prose_perplexity"] > 1
    canaries = of_kind(records, "canaries")
    best = [reading["score/left"] + reading["forgetting/left"] for reading in canaries]
    assert best == pytest.approx(sorted(best)), "forgetting is the best score so far minus the score now"


def test_the_card_has_the_numbers_or_says_why_not(measured: Any) -> None:
    result, _ = measured
    card = report_card(result.path, resamples=50)
    shown = {name: number.value for name, number in ((n.name, n) for _, n in card.numbers())}
    for name in ("bits_per_byte_change/prose", "kl_to_base", "flops", "peak_bytes", "adapter_bytes", "online_accuracy",
                 "code_length", "code_saved", "experiences", "tokens", "seconds"):  # fmt: skip
        assert math.isfinite(shown[name]), name
    assert shown["code_saved"] > 0
    missing = {name: why for each in card.desiderata for name, why in each.missing.items()}
    assert missing["shift_and_cost/gradient"] == "at least three shifts after the first task"
    assert all(why for why in missing.values())


def test_the_report_is_made_again_from_its_files_byte_for_byte(measured: Any) -> None:
    result, _ = measured
    page = (result.path / "report.html").read_bytes()
    for text in (b"Beside the score matrix", b"drift/kl_background", b"Whether the SAE still fits", b"feature 1",
                 b"How far apart consecutive segments"):  # fmt: skip
        assert text in page, text
    report_runs([result.path])
    assert (result.path / "report.html").read_bytes() == page


@pytest.mark.parametrize("stop", [1, 6])
def test_interrupted_and_resumed_it_measures_the_same(
    measured: Any, config: Callable[..., RunConfig], home: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole, records = measured
    wanted = config(*SHORT, *everything(home))
    with monkeypatch.context() as patch:
        interrupt_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            featcl.run(wanted)
    resumed = featcl.run(wanted)
    assert untimed(resumed.path) == records
    assert resumed.summary == whole.summary
    for name in ("shift", "feature_drift", "sae_validity", "samples"):
        assert table(resumed, name) == table(whole, name)
    before, after = (json.loads((run.path / "cost.json").read_text())["phases"] for run in (whole, resumed))
    assert {name: cost["flops"] for name, cost in before.items()} == {n: cost["flops"] for n, cost in after.items()}


def test_killed_in_an_evaluation_it_measures_the_same(
    measured: Any, config: Callable[..., RunConfig], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcl.evaluation.measures import drifting

    whole, records = measured
    wanted, drift, calls = config(*SHORT, *everything(home)), drifting.weight_drift, []

    def dying(adapter: Any) -> Any:
        calls.append(adapter)
        if len(calls) == 3:  # once when it is built, once for the base model
            raise KeyboardInterrupt
        return drift(adapter)

    with monkeypatch.context() as patch:
        patch.setattr(drifting, "weight_drift", dying)
        with pytest.raises(KeyboardInterrupt):
            featcl.run(wanted)
    resumed = featcl.run(wanted)
    assert untimed(resumed.path) == records
    assert resumed.summary == whole.summary


def test_what_nobody_asks_for_is_not_measured(config: Callable[..., RunConfig]) -> None:
    result = featcl.run(config(*SHORT))
    names = {name for record in untimed(result.path) for name in record}
    assert not any(name.startswith(("online/", "drift/", "shift/", "cost/forward")) for name in names)
    assert not (result.path / "cost.json").exists()
    assert not {"cost", "shift", "relations"} & set(result.summary)


def test_an_arm_that_learns_nothing_does_not_drift(config: Callable[..., RunConfig], home: Path) -> None:
    frozen = ("learner.objectives=[{name: sft, weight: 0.0}]", "evaluation.drift={texts: 8, features: false}")
    rows = of_kind(untimed(featcl.run(config(*SHORT, *frozen, "evaluation.cost=true")).path), "evaluation")
    for row in rows:
        assert {row["drift/kl_new"], row["drift/kl_background"], row["drift/delta_norm_2"]} == {0.0}
    assert rows[-1]["cost/train_flops"] > 0, "it has cost something all the same"


def test_a_graded_stream_has_relations_and_scores_between(config: Callable[..., RunConfig], home: Path) -> None:
    asked = ("evaluation.online=true", "evaluation.shift={sequences: 4}", "evaluation.drift={texts: 8}")
    result = featcl.run(
        config("phases=null", "stream={path: null, name: lab/labels, limit: 3}", "features.selector=contrast",
               "features.background=null", "evaluation.canaries.every=2", "tracking.samples=0", *asked)
    )  # fmt: skip
    assert result.summary["relations"] == {"across": {"labels_across": ["labels_first", "labels_last"]}}
    records = untimed(result.path)
    assert {"score/labels_first", "score/labels_last"} <= set(of_kind(records, "canaries")[0])
    card = report_card(result.path, resamples=20)
    assert card.number("cross_task/labels_across").value == 0.0, "it knows nothing, within tasks and across"
    assert card.number("online_accuracy").value == 0.0
    assert of_kind(records, "evaluation")[-1]["shift/gradient"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.perplexity={files: [/nowhere.txt]}"], "/nowhere.txt"),
        (["evaluation.perplexity={files: [HOME/prose.txt, HOME/prose.txt]}"], "two files are called prose"),
        (["evaluation.perplexity={files: [HOME/prose.txt], context: 100000}"], "a context of 100000 tokens"),
        (["evaluation.shift={layers: [9]}"], "layer 9 is out of range"),
        (["evaluation.shift={segments: 400}"], "do not make 400 segments"),
        (["evaluation.shift={}", "stream.setting=joint"], "the stream has one task; give the number of segments"),
        (["evaluation.drift={}", "adapter.kind=osf"], "evaluation.drift.scales"),
        (["evaluation.drift={}", "adapter.kind=mixture"], "another at every token"),
        (["evaluation.drift={}", "features={background: null, selector: gradient_energy}"], "name features.background"),
        (["evaluation.cost=true", "adapter.kind=mixture"], "the FLOPs of kind mixture are not counted"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_the_run(
    config: Callable[..., RunConfig], home: Path, overrides: list[str], message: str
) -> None:
    wanted = config(*SHORT, *(override.replace("HOME", str(home)) for override in overrides))
    with pytest.raises(FeatclError) as caught:
        featcl.run(wanted)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not wanted.folder.exists()


def test_a_tier_that_does_not_exist_names_the_right_one(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.harness\.fulll: unknown key, did you mean 'full'"):
        config("evaluation.harness={fulll: {}}")


# --- lm-evaluation-harness: without it one line, with it every tier

CHOICE = "tasks: [featcl_lab_choice]"
HARNESS = f"evaluation.harness={{smoke: {{every: 3, limit: 2}}, quick: {{{CHOICE}, limit: 1}}, full: {{limit: 3}}}}"


def test_where_the_harness_is_not_installed_it_is_one_line(
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config()  # writes the file
    assert cli.invoke(["run", str(tmp_path / "arm.yaml"), "evaluation.harness={}"]) == 2
    said = capsys.readouterr().err.strip()
    assert "lm-eval is not installed" in said
    assert "pip install 'featcl[lm-eval]'" in said
    assert "\n" not in said


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_every_tier_is_asked_and_the_base_model_once(config: Callable[..., RunConfig]) -> None:
    short = (*SHORT, "stream.limit=2", "evaluation.canaries=null", HARNESS)
    result = featcl.run(config(*short))
    records = untimed(result.path)
    base, first, last = of_kind(records, "evaluation")
    tiers = {row["row"]: {n.split("/")[1] for n in row if n.startswith("general/") and n.endswith(("acc", "match"))}
             for row in (base, first, last)}  # fmt: skip
    assert tiers == {"base": {"smoke", "quick", "full"}, "left": {"quick"}, "right": {"quick", "full"}}
    [smoke] = of_kind(records, "harness")
    assert "general/smoke/featcl_lab_choice/acc" in smoke
    kept = set((result.path.parents[2] / "harness").glob("*.json"))
    assert len(kept) == 3 + 1 + 1 + 2
    again = featcl.run(config(*short, "learner.lr=0.02", "arm=other"))
    more = set(again.path.parents[2].glob("harness/*.json")) - kept
    assert len(more) == 4, "the base model's are not computed again"
    with pytest.raises(FeatclError, match="the harness has no task 'featcl_lab_choise', did you mean"):
        featcl.run(config(*short, "evaluation.harness.full.tasks=[featcl_lab_choise]", "arm=third"))
    with pytest.raises(FeatclError, match=r"methods \(in_context\) have a say"):
        featcl.run(config(*short, "methods=[{name: in_context, tokens: 64}]", "arm=fourth"))
