"""The report: everything in one file, the same bytes again, honest about what is missing, and it opens in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from featcl.errors import FeatclError
from featcl.files import write_json
from featcl.tracking.jsonl import JsonlTracker
from featcl.tracking.report import CAPTIONS, draw_plots, write_report
from featcl.tracking.report_card import card_table
from tests.tracking import folders


class Reader(HTMLParser):
    """Collects what a page shows and everything it would load; open tags must close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> tuple[Reader, str]:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader, " ".join(reader.text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return folders.make(tmp_path / "run")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report; only to look at."""
    run = folders.make(tmp_path_factory.mktemp("reported") / "run")
    write_report(run)
    return run


def undrawn(run: Path) -> Path:
    """The report with one dot in the place of every picture, which takes no time."""
    dot = run / "dot.png"
    dot.write_bytes(bytes.fromhex("89504e470d0a1a0a"))
    return write_report(run, pictures=dict.fromkeys(CAPTIONS.values(), dot))


def test_the_report_is_one_small_file_that_loads_nothing(reported: Path) -> None:
    path = reported / "report.html"
    reader, text = read(path)
    assert path.stat().st_size < 5_000_000
    pictures = [source for source in reader.sources if source.startswith("data:image/png;base64,")]
    assert len(pictures) == 11
    assert all(source.startswith("#part-") for source in reader.sources if source not in pictures), "links stay inside"
    assert "//" not in re.sub(r'"data:image/png;base64,[^"]*"', "", path.read_text()), "no address of any kind"
    for words in ("quickstart/base, seed 0", "120 updates", "adapter both", "formal register", "2.13.0", "0.710"):
        assert words in text, words
    assert "mean over tasks of R[T, j]" in text
    assert "has not finished" not in text
    assert {"thead", "tbody"} <= reader.tags, "tables stand without their script"


def test_every_link_has_its_part(run: Path) -> None:
    text = html(run)
    assert sorted(re.findall(r'href="#(part-\d+)"', text)) == sorted(re.findall(r'<section id="(part-\d+)"', text))
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    for title in ("Report card", "Score matrix", "Pictures", "Flips up to the last row", "Sampled texts", "Ledger",
                  "Quarantine", "Features that drifted", "Recall of the memory", "Config"):  # fmt: skip
        assert title in titles, title


def test_text_of_the_data_is_text(run: Path) -> None:
    """Trajectory ids, feature names, prompts, alarms and reasons hold a script; the page has its own script alone."""
    text = html(run)
    assert text.count("<script") == 1
    _, shown = read(run / "report.html")
    for where in (f"t7{folders.EVIL}", f"greeting {folders.EVIL}", f"who? {folders.EVIL}", f"t9{folders.EVIL}",
                  f"losses rose {folders.EVIL}", f"one cell was not measured {folders.EVIL}"):  # fmt: skip
        assert where in shown, "it is shown as it was written"


def test_hostile_names_and_what_no_page_may_hold(tmp_path: Path) -> None:
    evil = '"><img src=x onerror=alert(1)> \x00\x1b \ufffe </title>'
    run = folders.make(tmp_path / "run")
    config = {"study": evil + "\ud800", "arm": "'><b>", "model": evil, evil: {evil: [evil]}}
    (run / "config.json").write_text(json.dumps(config))  # in ASCII: half a surrogate pair can come in no other way
    tracker = JsonlTracker(run / "metrics.jsonl")
    tracker.table("odd", (evil, "b"), [[evil, {"a": evil}], [None, [1, "x" * 10_000]]])
    tracker.finish({})
    reader, shown = read(write_report(run))
    assert "onerror" not in reader.attributes
    assert not [source for source in reader.sources if not source.startswith(("data:image/png;base64,", "#part-"))]
    assert "onerror" in shown
    assert "more characters" in shown
    assert not re.search("[\x00\x1b\ufffe]", shown)


def test_the_card_stands_with_references_and_what_is_missing(run: Path) -> None:
    text = html(run)
    _, shown = read(run / "report.html")
    assert "Preserve: is general ability kept?" in shown
    assert "-0.360\u00a0to\u00a0-0.220" in shown
    row = re.search(r'<tr><td class="text">general_change</td>(.*?)</tr>', text)
    assert row is not None
    assert re.findall(r'data-value="([^"]*)"', row[1]) == ["-0.3", "-0.05"], "its value and that of the joint run"
    assert "never reached" in shown
    assert "perplexity_ratio: no frozen text was scored" in shown
    assert "forgetting; cost to the rest 0.200" in shown


def test_a_card_as_a_table_loses_nothing() -> None:
    table = card_table(folders.CARD)
    assert len(table.rows) == 1 + 3 + 1 + 1, "a note, numbers, one that is missing, a task"
    states = dict(zip(table.column("number"), table.column("state"), strict=True))
    assert states["tokens_to_target"] == "never reached"
    assert states["perplexity_ratio"] == "not measured"


def test_reporting_again_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = write_report(run).read_bytes()
    pictures = {path.name: path.read_bytes() for path in (run / "plots").iterdir()}
    moved = tmp_path / "elsewhere"
    for name in (*folders.FILES, "ledger", "tables"):
        copy = shutil.copytree if (run / name).is_dir() else shutil.copy
        moved.mkdir(exist_ok=True)
        copy(run / name, moved / name)
    assert write_report(moved).read_bytes() == first
    assert {path.name: path.read_bytes() for path in (moved / "plots").iterdir()} == pictures
    changed = (moved / "metrics.jsonl").read_text().replace('"update/kl": 0.0', '"update/kl": 0.9', 1)
    (moved / "metrics.jsonl").write_text(changed)
    assert write_report(moved).read_bytes() != first, "negative control"


def test_a_summary_that_is_not_written_yet_gives_the_report_of_the_one_that_is(run: Path) -> None:
    summary = {"zeta": 1, "metrics": {"bwt": float("nan"), "acc": 0.5}, "alpha": {"b": (1, 2), "a": 0.25}}
    pictures = dict.fromkeys(CAPTIONS.values(), run / "R.json")
    first = write_report(run, summary=summary, pictures=pictures).read_bytes()
    write_json(run / "summary.json", summary)
    assert write_report(run, pictures=pictures).read_bytes() == first
    assert b"backward transfer" not in first, "what is not determined is no headline"


def test_pictures_that_are_drawn_already_are_not_drawn_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = draw_plots(run)
    first = write_report(run).read_bytes()
    monkeypatch.setattr("featcl.tracking.plots.save", lambda *_: pytest.fail("drawn again"))
    assert write_report(run, pictures=pictures).read_bytes() == first


def test_flips_and_scores_are_those_of_the_matrix(run: Path) -> None:
    matrix = folders.score_rows()
    lost = [item for item, scores in matrix["items"]["home/names"].items() if scores[1] > scores[-1]]
    assert lost, "the invented run must forget something"
    row = re.search(r'<tr><td class="text">home/names</td><td class="text">home/names</td>(.*?)</tr>', html(run))
    assert row is not None
    assert re.findall(r'data-value="(\d+)"', row[1])[:2] == ["8", str(len(lost))]
    assert ", ".join(lost) in html(run)


def html(run: Path) -> str:
    return undrawn(run).read_text(encoding="utf-8")


def test_an_unfinished_run_with_a_torn_line_is_reported_as_such(tmp_path: Path) -> None:
    run = folders.make(tmp_path / "run", finished=False)
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    _, text = read(undrawn(run))
    assert "is cut off" in text
    assert "has not finished" in text
    assert "120 updates" in text


def test_a_run_with_only_metrics_or_only_a_config_still_has_a_report(tmp_path: Path) -> None:
    whole = folders.make(tmp_path / "whole")
    for name in ("metrics.jsonl", "config.json"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(whole / name, folder / name)
        read(write_report(folder))


def test_bad_input_is_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match="not a run's folder"):
        write_report(tmp_path)
    with pytest.raises(FeatclError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    run = folders.make(tmp_path / "run")
    good = (run / "R.json").read_text()
    odd = json.loads(good)
    odd["items"]["home/names"]["home/names/3"].pop()
    for text, what in (
        ('{"rows": [', "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"rows": ["base"]}', "'columns' is missing"),
        (json.dumps(odd), "item 'home/names/3' of 'home/names' has 7 scores for 8 rows"),
        (json.dumps({**odd, "values": [[1.0]]}), "the values are not 8 rows of 9 columns"),
    ):
        (run / "R.json").write_text(text)
        with pytest.raises(FeatclError, match=rf"R\.json: .*{re.escape(what)}"):
            write_report(run)
    (run / "R.json").write_text(good)
    (run / "tables" / "odd.json").write_text('{"name": "odd", "columns": ["a", "b"], "rows": [[1]]}')
    with pytest.raises(FeatclError, match=r"odd\.json: a row has not 2 cells"):
        write_report(run)


def test_cells_that_were_not_measured_are_empty(run: Path) -> None:
    matrix = folders.score_rows()
    matrix["values"][0][0] = None
    for scores in matrix["items"]["home/names"].values():
        scores[0] = None
    write_json(run / "R.json", matrix)
    row = re.search(r'<tr><td class="text">base</td><td class="num">–</td>', html(run))
    assert row is not None


def test_pictures_alone_and_why_others_are_not_drawn(run: Path) -> None:
    pictures = draw_plots(run)
    assert len(pictures) == 11
    assert {path.suffix for path in (run / "plots").iterdir()} == {".png", ".svg"}
    shutil.rmtree(run / "tables")
    assert len(draw_plots(run)) == 9, "the memory is drawn from metrics.jsonl then"
    assert not (run / "plots" / "feature_drift.png").exists(), "a picture of an earlier state goes"
    _, shown = read(write_report(run))
    assert "2 pictures are not drawn" in shown
    assert "no feature drift was measured" in shown


def test_a_page_stays_under_five_megabytes(tmp_path: Path) -> None:
    run = folders.make(tmp_path / "run")
    tracker = JsonlTracker(run / "metrics.jsonl")
    for number in range(4):
        tracker.table(f"large-{number}", [f"c{i}" for i in range(70)], [["x" * 60] * 70 for _ in range(500)])
    tracker.finish({})
    path = undrawn(run)
    assert path.stat().st_size < 5_000_000
    _, shown = read(path)
    assert "The first 400 of 500 rows. The first 60 of 70 columns." in shown
    assert "This part is left out" in shown
    assert "versions and machine" in shown, "what comes after still fits"


# --- in a browser


def browse(page: Path, *options: str) -> bytes:
    """Run Debian's chromium without a screen; its standard output."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine; the page is not looked at in a browser")
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,2400"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [browser, *quiet, profile, "--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=300).stdout


def colours(shot: Path) -> list[tuple[int, tuple[int, int, int]]]:
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (1100, 2400)
        return sorted(image.convert("RGB").resize((110, 240)).getcolors(30_000) or (), reverse=True)


def test_the_page_opens_in_a_real_browser_in_light_and_dark(reported: Path, tmp_path: Path) -> None:
    page = reported / "report.html"
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    browse(page, f"--screenshot={light}")
    browse(
        page, f"--screenshot={dark}", "--force-dark-mode", "--enable-features=WebContentsForceDark:inversion_method/0"
    )
    assert len(colours(light)) > 200, "the page is blank"
    assert sum(colours(light)[0][1]) > 700, "light paper"


def test_a_real_browser_sorts_tables_and_runs_no_script_of_the_data(run: Path, tmp_path: Path) -> None:
    """The same page with a click on a heading; the document that results is read back."""
    find = "Array.from(document.querySelectorAll('section')).find(s => s.textContent.includes('R[i, j]'))"
    click = f"<script>{find}.querySelectorAll('th')[1].click();</script></body>"
    page = tmp_path / "clicked.html"
    page.write_text(html(run).replace("</body>", click))
    sorted_page = browse(page, "--dump-dom").decode()
    assert 'aria-sort="ascending"' in sorted_page
    assert sorted_page.count("<script") == 2, "of the page and of this test"
    place = sorted_page.index('aria-sort="ascending"')
    cells = re.findall(r'<tr><td class="text">[^<]*</td><td [^>]*data-value="([^"]*)"', sorted_page[place:])
    column = [row[0] for row in folders.score_rows()["values"]]
    assert list(map(float, cells[: len(column)])) == sorted(column) != column
