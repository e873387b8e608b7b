"""`featcl report`: the same page again from the files alone, several runs on one page, and bad input in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from featcl.cli import invoke
from featcl.errors import FeatclError
from featcl.files import write_json
from featcl.run import run as run_config
from featcl.studies.comparison import write_comparison
from featcl.studies.points import FinishedRun
from featcl.studies.report import report_runs
from tests.runs import make_config, make_home
from tests.studies.test_points import finished
from tests.tracking import folders


def test_what_a_run_wrote_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    """A real run, with its report taken away and made anew from JSON lines and JSON."""
    config = make_config(make_home(tmp_path), tmp_path)("phases=null", "learner.lr=1e-2")
    folder = run_config(config).path
    wrote = (folder / "report.html").read_bytes()
    drawn = {path.name: path.read_bytes() for path in (folder / "plots").iterdir()}
    moved = tmp_path / "moved"
    for path in sorted(folder.rglob("*.json*")):
        if "state" not in path.parts:
            (moved / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, moved / path.relative_to(folder))
    report_runs([moved])
    assert b"Report card" in wrote
    assert (moved / "report.html").read_bytes() == wrote
    assert {path.name: path.read_bytes() for path in (moved / "plots").iterdir()} == drawn


def test_the_card_is_made_anew_and_kept(tmp_path: Path) -> None:
    run = finished(tmp_path / "run").files.folder
    found = report_runs([run])
    [card] = found.cards
    assert card is not None
    table = json.loads((run / "tables" / "report_card.json").read_text())
    numbers = {row[1]: row[2] for row in table["rows"] if row[9] == "measured"}
    assert numbers["general_change"] == card.number("general_change").value
    assert "Preserve: is general ability kept?" in (run / "report.html").read_text()
    assert found.to_json()["runs"][0]["card"]["desiderata"][0]["name"] == "preserve"
    assert str(run / "report.html") in str(found)


def test_a_reference_gets_its_own_column(tmp_path: Path) -> None:
    run = finished(tmp_path / "run").files.folder
    joint = finished(tmp_path / "joint", learned=0.99, arm="joint").files.folder
    write_json(joint / "R.json", json.loads((run / "R.json").read_text()))
    report_runs([run], references={"joint": joint})
    page = (run / "report.html").read_text()
    assert "<th>joint</th>" in page
    report_runs([run])
    assert "<th>joint</th>" not in (run / "report.html").read_text()


def test_several_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    evil = f"odd {folders.EVIL}"
    runs = [
        finished(tmp_path / f"{arm[:3]}-{lr}-{seed}", seed=seed, arm=arm, learner={"lr": lr},
                 adapter={"kind": arm}).files.folder
        for arm in ("base", evil) for lr, seed in ((0.001, 0), (0.001, 1), (0.003, 0))
    ]  # fmt: skip
    for run in runs:  # few pictures of each: this is about the page that compares them
        (run / "metrics.jsonl").write_text('{"kind": "canaries", "canary/kl_tasks": 0.1}\n')
        shutil.rmtree(run / "ledger")
        shutil.rmtree(run / "tables")
    found = report_runs(runs, out=tmp_path / "compared.html")
    assert found.comparison == tmp_path / "compared.html"
    page = found.comparison.read_text()
    assert page.count("<script") == 1
    assert "odd &lt;script&gt;" in page
    for words in (
        "15 comparisons with base",
        "screening: fewer than 3 seeds",
        "learner/lr",
        "Report cards",
        "adapter/",
    ):
        assert words in page, words
    assert "//" not in re.sub(r'"data:image/png;base64,[^"]*"', "", page)
    drawn = sorted(path.name for path in (tmp_path / "compared-plots").iterdir())
    assert {"frontier.png", "frontier.svg", "norm_retention.png", "kl_forgetting.svg", "R_6.png"} <= set(drawn)
    read = [FinishedRun.read(run) for run in runs]
    again = write_comparison(tmp_path / "again.html", read, title="quickstart: 6 runs")
    assert again.read_text() == page, "the same files give the same bytes"


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    good = folders.make(tmp_path / "good")
    before = sorted(path.name for path in good.iterdir())
    with pytest.raises(FeatclError, match="nowhere: not a run's folder; no such folder"):
        report_runs([good, tmp_path / "nowhere"])
    with pytest.raises(FeatclError, match="given twice"):
        report_runs([good, good])
    with pytest.raises(FeatclError, match="leave it out"):
        report_runs([good], out=tmp_path / "x.html")
    assert sorted(path.name for path in good.iterdir()) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = finished(tmp_path / "one").files.folder, finished(tmp_path / "two", seed=1).files.folder
    assert invoke(["report", str(one)]) == 0
    printed = capsys.readouterr().out
    assert "preserve: Is general ability kept?" in printed
    assert f"report: {one / 'report.html'}" in printed
    assert invoke(["report", str(one), str(two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"] == "comparison.html"
    assert (tmp_path / "comparison.html").is_file()
    (one / "R.json").write_text("{")
    for arguments, words in (
        (["report", str(tmp_path)], "not a run's folder"),
        (["report", str(one)], r"R.json: not JSON"),
        (["report", str(two), "--reference", "joint"], "give a name and a run's folder"),
        (["report", str(two), "--reference", f"joint={tmp_path}"], "R.json"),
        (["report", str(two), "--out", str(tmp_path)], "is a folder"),
        (["report"], "Missing argument"),
    ):
        assert invoke(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1, "one line"
