"""The report card, from files alone: right numbers beside their references, and what is said of what is not there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcl.errors import FeatclError
from featcl.evaluation.desiderata import ReportCard, report_card
from featcl.evaluation.matrix import ScoreMatrix
from featcl.evaluation.relations import Claims, Relations
from featcl.files import write_json
from featcl.tracking.jsonl import JsonlTracker

TASKS = ("facts", "style", "changed", "rules")
COLUMNS = (*TASKS, "both", "both_named", "general/logic", "general/copying")
PROBES = ("both", "both_named")
ITEMS, EACH = 40, 10  # items of a column; experiences of a task
SHARES = np.array(
    [
        [0.0, 0.1, 0.0, 0.1, 0.0, 0.0, 1.0, 0.95],
        [0.9, 0.1, 0.0, 0.1, 0.1, 0.1, 1.0, 0.90],
        [0.7, 1.0, 0.0, 0.2, 0.4, 0.6, 0.9, 0.90],
        [0.5, 0.8, 0.9, 0.2, 0.3, 0.5, 0.8, 0.70],
        [0.5, 0.7, 0.8, 0.3, 0.2, 0.4, 0.7, 0.70],
    ]
)
JOINT = np.array([SHARES[0], [0.95, 1.0, 0.95, 0.9, 0.8, 0.8, 0.95, 0.95]])
RELATIONS = {
    "composed": {"both": ["facts", "style"]},
    "named": {"both_named": "both"},
    "across": {"both": ["facts", "style"]},
    "related": [["facts", "rules"]],
    "contradicts": {"changed": "facts"},
    "claims": {"row": "rules", "items": {"general/logic": [f"general/logic/{n}" for n in range(20)]}},
}


def matrix_of(shares: np.ndarray, tasks: tuple[str, ...], columns: tuple[str, ...] = COLUMNS) -> ScoreMatrix:
    """Exactly the shares, the first items right."""
    right = {
        column: {
            f"{column}/{n}": tuple(float(n < round(share * ITEMS)) for share in shares[:, j]) for n in range(ITEMS)
        }
        for j, column in enumerate(columns)
    }
    return ScoreMatrix(columns, len(tasks), "accuracy", ("base", *tasks), right)


def records(tasks: tuple[str, ...], *, online: bool, each: int = EACH) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"kind": "evaluation", "row": "base", "tokens_seen": 0}]
    for place, task in enumerate(tasks):
        for n in range(each):
            seen = 50 * (place * each + n + 1)
            record = {"kind": "update", "train/loss": 1.0, "seconds/update": 0.5, "tokens_seen": seen}
            if online:
                record |= {"online/score": n / each, "online/nll": math.log(2) / (n + 1), "online/tokens": 20}
                record |= {"online/base_nll": math.log(2), "cost/forward_flops": 2e6, "cost/backward_flops": 4e6}
            found.append(record)
            if n % 5 == 4:
                found.append({"kind": "canaries", "canary/kl_general": 0.1 * (place + 1), f"score/{task}": n / each})
        shift = {} if place == 0 else {"shift/gradient": [0.1, 0.9, 0.2][place - 1]}
        bits = {"general/prose_bits_per_byte": 1.0 + 0.1 * place}
        found.append({"kind": "evaluation", "row": task, "tokens_seen": 50 * each * (place + 1), **shift, **bits})
    return found


def make_run(
    folder: Path, shares: np.ndarray = SHARES, tasks: tuple[str, ...] = TASKS, *, columns: tuple[str, ...] = COLUMNS,
    online: bool = True, relations: dict[str, Any] | None = None, each: int = EACH,
) -> Path:  # fmt: skip
    tracker = JsonlTracker(folder / "metrics.jsonl")
    for number, record in enumerate(records(tasks, online=online, each=each)):
        tracker.log(record, number)
    tracker.finish({})
    matrix_of(shares, tasks, columns).save(folder / "R.json")
    summary = {
        "study": "toy",
        "arm": "base",
        "seed": 0,
        "probes": dict.fromkeys(PROBES, 0.0),
        "trained_parameters": 640,
    }
    write_json(folder / "summary.json", {**summary, "relations": relations or {}, "stored_bytes": {"adapter": 512}})
    if online:
        write_json(folder / "cost.json", {"phases": {"learning": {"peak_rss_bytes": 1 << 20}}})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", relations=RELATIONS)


@pytest.fixture
def joint(tmp_path: Path) -> Path:
    shares = np.insert(JOINT, 0, [0.05, 0.95], axis=1)
    return make_run(tmp_path / "joint", shares, ("joint",), columns=("joint", *COLUMNS), each=80)


def full(run: Path, joint: Path) -> ReportCard:
    return report_card(run, references={"joint": joint}, resamples=200)


def test_every_desideratum_has_its_numbers_with_references_and_limits(run: Path, joint: Path) -> None:
    card = full(run, joint)
    expected = {
        "general_final": (0.7, {"base": 0.975, "joint": 0.95}),
        "general_change": (-0.275, {"base": 0.0, "joint": -0.025}),
        "worst_general_change": (-0.3, {"base": 0.0, "joint": -0.05}),
        "general_right_to_wrong": (22 / 78, {"base": 0.0}),
        "kl_to_base": (0.4, {"base": 0.0}),
        "bits_per_byte_change/prose": (0.3, {"base": 0.0}),
        "acc": (0.575, {"base": 0.05, "joint": 0.95}),
        "gap_to_joint": (0.575 - 0.95, {"joint": 0.0}),
        "learning_accuracy": (0.775, {"base": 0.05, "joint": 0.95}),
        "bwt": (-(0.4 + 0.3 + 0.1) / 3, {"base": 0.0}),
        "forgetting_max_past": ((0.4 + 0.3 + 0.1) / 3, {"base": 0.0}),
        "intransigence_joint": (0.95 - 0.775, {"joint": 0.0}),
        "first_task_survival": (0.5 / 0.9, {"base": 1.0}),
        "first_task_never_lost": (20 / 36, {"base": 1.0}),
        "first_task_half_life": (math.inf, {}),
        "fwt": ((0.0 + 0.0 + 0.1) / 3, {"base": 0.0}),
        "worst_task": (0.3, {"base": 0.0, "joint": 0.9}),
        "task_spread": (0.5, {"base": 0.1, "joint": 0.1}),
        "recovered/changed": (0.9 / 0.7, {}),
        "resistance_net": (1 - 8 / 12, {"base": 0.0}),
        "experiences": (40, {}),
        "tokens": (2000, {}),
        "seconds": (20.0, {}),
        "flops": (40 * 6e6, {}),
        "trained_parameters": (640, {}),
        "adapter_bytes": (512, {}),
        "peak_bytes": (1 << 20, {}),
        "online_accuracy": (0.45, {}),
        "code_saved": (1 - sum(1 / n for n in range(1, 11)) / 10, {"base": 0.0}),
        "composed/both": (0.2, {"base": 0.0, "joint": 0.8}),
        "composition_gap/both": (0.2 - 0.35, {"base": 0.0, "joint": 0.8 - 0.95}),
        "ratio_to_joint/both": (0.25, {"joint": 1.0}),
        "naming_gain/both": (0.2, {"base": 0.0, "joint": 0.0}),
        "cross_task/both": (0.2 - 0.6, {"base": -0.05, "joint": 0.8 - 0.975}),
        "transfer_gain/facts+rules": (0.35, {"base": 0.0, "joint": 0.875}),
        "share_of_joint_gain/facts+rules": (0.35 / 0.875, {"joint": 1.0}),
    }
    for name, (value, references) in expected.items():
        number = card.number(name)
        assert number.value == pytest.approx(value, abs=1e-9), name
        assert dict(number.references) == pytest.approx(references, abs=1e-9), name
        if "without an interval" in number.note:
            assert math.isnan(number.low)
        else:
            assert number.low <= number.value <= number.high, name
    assert {name for name, _ in card.numbers()} == {each.name for each in card.desiderata}
    assert all(number.formula for _, number in card.numbers())


def test_what_it_took_to_reach_a_score_beside_joint_training(run: Path, joint: Path) -> None:
    card = report_card(run, references={"joint": joint}, target=0.5, resamples=200)
    assert card.number("experiences_to_target").value == 30
    assert dict(card.number("experiences_to_target").references) == {"joint": 80}
    assert card.number("tokens_to_target").value == 1500
    assert card.number("flops_to_target").value == 30 * 6e6
    assert card.number("data_efficiency").value == pytest.approx(80 / 30)
    never = report_card(run, references={"joint": joint}, resamples=50).number("experiences_to_target")
    assert math.isinf(never.value)
    assert never.to_dict()["reached"] is False
    assert "never" in str(never)


def test_recovery_reads_the_canaries_from_the_contradiction_on(run: Path, joint: Path) -> None:
    assert full(run, joint).number("recovery/changed").value == 10  # 0.9 of 0.7 is reached at the second reading, 0.9


def test_a_larger_shift_that_costs_more_has_a_high_rank_correlation(run: Path, joint: Path) -> None:
    """Costs of rows 2 to 4 are 0.1, 0.175 and 0.04; the shifts 0.1, 0.9 and 0.2: ρ = 1/2."""
    number = full(run, joint).number("shift_and_cost/gradient")
    assert number.value == pytest.approx(0.5)


def test_the_labels_of_tasks(run: Path, joint: Path) -> None:
    labels = {label.task: label.label for label in full(run, joint).labels}
    assert labels == {"facts": "ideal", "style": "forgetting", "changed": "forgetting", "rules": "failed"}


def test_orders_of_the_same_data_are_compared(run: Path, tmp_path: Path) -> None:
    better = SHARES.copy()
    better[-1, :4] = 0.8
    shuffled = make_run(tmp_path / "shuffled", better)
    card = report_card(run, references={"shuffled": shuffled, "single": shuffled}, resamples=50)
    assert card.number("order_spread").value == pytest.approx(0.8 - 0.575)
    assert card.number("intransigence_single").value == pytest.approx((0.8 - 0.3) / 4)  # only the last task differs


def test_what_is_missing_is_named_with_what_it_takes(tmp_path: Path) -> None:
    card = report_card(make_run(tmp_path / "run", online=False), resamples=50)
    missing = {name: why for each in card.desiderata for name, why in each.missing.items()}
    assert "online/score" in missing["online_accuracy"]
    assert "references={'joint'" in missing["gap_to_joint"]
    assert "relations in summary.json" in missing["composition_gap"]
    assert "relations.claims" in missing["resistance"]
    assert "cost/forward_flops" in missing["flops"]
    assert "cost.json" in missing["peak_bytes"]
    assert "chance in R.json" in missing["acc_chance_adjusted"]
    with pytest.raises(FeatclError, match="online_accuracy was not measured: it was not recorded"):
        card.number("online_accuracy")
    with pytest.raises(FeatclError, match="no number 'accuracy'; there are general_final"):
        card.number("accuracy")


def test_a_metrics_file_cut_in_the_middle_of_a_line_is_read_up_to_it_and_said(run: Path) -> None:
    path = run / "metrics.jsonl"
    whole = report_card(run, resamples=20)
    text = path.read_bytes()
    path.write_bytes(text[: text.rindex(b'"kind"')])
    card = report_card(run, resamples=20)
    assert not whole.notes
    assert any("is cut off" in note and "metrics.jsonl" in note for note in card.notes)
    assert "is cut off" in card.render()
    missing = card.efficient.missing["experiences_to_target"]
    assert missing == "metrics.jsonl records 4 evaluations, R.json has 5 rows"
    assert card.number("acc").value == whole.number("acc").value


def test_cells_that_were_not_measured_leave_the_means_and_are_said(run: Path) -> None:
    matrix = ScoreMatrix.load(run / "R.json")
    items = {column: dict(matrix.items[column]) for column in matrix.columns}
    items["rules"] = {item: (*scores[:4], math.nan) for item, scores in items["rules"].items()}
    ScoreMatrix(matrix.columns, 4, "accuracy", matrix.rows, items).save(run / "R.json")
    card = report_card(run, resamples=50)
    assert card.number("acc").value == pytest.approx((0.5 + 0.7 + 0.8) / 3)
    assert any("1 cells that were not measured" in note for note in card.notes)
    assert [label.task for label in card.labels] == ["facts", "style", "changed"]


def test_files_that_do_not_fit_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match=r"no R\.json"):
        report_card(tmp_path)
    with pytest.raises(FeatclError, match="own first row"):
        report_card(run, references={"base": run})
    with pytest.raises(FeatclError, match="'both_again' is no column"):
        report_card(run, relations=Relations(named={"both_again": "both"}))
    with pytest.raises(FeatclError, match="'x' is no item of column 'facts'"):
        report_card(run, relations=Relations(claims=Claims("style", {"facts": ("x",)})), resamples=20)
    with pytest.raises(FeatclError, match="no row of R after the base"):
        report_card(run, relations=Relations(claims=Claims("base", {"facts": ("facts/0",)})), resamples=20)
    other = make_run(tmp_path / "other")
    text = (other / "R.json").read_text().replace('"facts/3"', '"facts/other"')
    (other / "R.json").write_text(text)
    with pytest.raises(FeatclError, match="'joint' has other items in 'facts': 'facts/3' is only in this run"):
        report_card(run, references={"joint": other})
    matrix_of(SHARES[:1], ()).save(other / "R.json")
    with pytest.raises(FeatclError, match="no task was trained yet"):
        report_card(other)
    (run / "summary.json").write_text("[")
    with pytest.raises(FeatclError, match="not JSON"):
        report_card(run)


def test_likelihoods_count_upwards_and_have_no_shares(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    matrix = ScoreMatrix.load(folder / "R.json")
    nll = {c: {i: tuple(2.0 - value for value in s) for i, s in items.items()} for c, items in matrix.items.items()}
    ScoreMatrix(matrix.columns, 4, "nll", matrix.rows, nll).save(folder / "R.json")
    card = report_card(folder, resamples=50)
    assert card.number("acc").value == pytest.approx(0.575 - 2)
    assert card.number("forgetting_max_past").value == pytest.approx(0.8 / 3)
    assert "no shares" in card.sequential.missing["first_task_survival"]
    assert "right or wrong" in card.sequential.missing["first_task_never_lost"]
    assert "target=" in card.efficient.missing["experiences_to_target"]
    assert card.labels == ()
    assert any("joint run" in note for note in card.notes)


def test_guessing_is_taken_out_where_its_chance_is_known(run: Path) -> None:
    data = json.loads((run / "R.json").read_text())
    write_json(run / "R.json", {**data, "chance": dict.fromkeys(TASKS, 0.25)})
    number = report_card(run, resamples=50).number("acc_chance_adjusted")
    assert number.value == pytest.approx((0.575 - 0.25) / 0.75)


def test_an_interrupted_run_has_a_card_that_says_so(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    card = report_card(run, relations=Relations(), resamples=20)
    assert any("has not finished" in note for note in card.notes)
    assert any("nothing is known of the course" in note for note in card.notes)


def test_the_card_is_plain_json_and_text_and_the_same_twice(run: Path, joint: Path) -> None:
    card = full(run, joint)
    data = json.loads(json.dumps(card.to_dict(), allow_nan=False))
    assert [each["name"] for each in data["desiderata"]] == [
        "preserve", "sequential", "distributions", "efficient", "compositional"
    ]  # fmt: skip
    assert data["labels"][0]["task"] == "facts"
    assert data["references"] == {"joint": str(joint)}
    assert full(run, joint).to_dict() == card.to_dict()
    text = card.render()
    assert "toy/base, seed 0" in text
    assert "  acc " in text
    assert "exact McNemar p = " in text
    assert "not measured: order_spread" in text
    assert "rules" in text.split("tasks:")[1]
