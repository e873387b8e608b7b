"""The report: everything in one file, the same bytes again, honest about what is missing, and it opens in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from featcl.errors import FeatclError
from featcl.tracking.report import draw_plots, write_report
from tests.tracking import folders


class Reader(HTMLParser):
    """Collects what a page shows and everything it would load; open tags must close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.sources: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.rows += tag == "tr"
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


def test_the_report_is_one_small_file_that_loads_nothing(run: Path) -> None:
    path = write_report(run)
    reader, text = read(path)
    assert path.stat().st_size < 5_000_000
    assert len(reader.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "//" not in re.sub(r'"data:image/png;base64,[^"]*"', "", path.read_text()), "no address of any kind"
    for words in ("quickstart/base, seed 0", "120 updates", "adapter both", "formal register", "2.13.0", "0.710"):
        assert words in text, words
    assert "greeting <b>" in text, "text of the data is escaped, not markup"
    assert "mean over tasks of R[T, j]" in text
    assert "has not finished" not in text


def test_reporting_again_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = write_report(run).read_bytes()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("config.json", "env.json", "metrics.jsonl", "R.json", "summary.json"):
        shutil.copy(run / name, moved / name)
    shutil.copytree(run / "tables", moved / "tables")
    assert write_report(moved).read_bytes() == first
    assert write_report(run).read_bytes() == first


def test_flips_and_scores_are_those_of_the_matrix(run: Path) -> None:
    matrix = folders.score_rows()
    lost = [item for item, scores in matrix["items"]["home/names"].items() if scores[1] > scores[-1]]
    assert lost, "the invented run must forget something"
    row = re.search(r'<tr><td class="text">home/names</td><td class="text">home/names</td>(.*?)</tr>', html(run))
    assert row is not None
    assert re.findall(r'data-value="(\d+)"', row[1])[:2] == ["8", str(len(lost))]
    assert ", ".join(lost) in html(run)


def html(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_an_unfinished_run_with_a_torn_line_is_reported_as_such(tmp_path: Path) -> None:
    run = folders.make(tmp_path / "run", finished=False)
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    _, text = read(write_report(run))
    assert "line 120 is cut off" in text
    assert "has not finished" in text
    assert "119 updates" in text


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
    run = folders.make(tmp_path / "run")
    (run / "R.json").write_text('{"rows": [')
    with pytest.raises(FeatclError, match=r"R\.json: not JSON"):
        write_report(run)


def test_pictures_alone(run: Path) -> None:
    pictures = draw_plots(run)
    assert sorted(path.name for path in pictures.values()) == ["R.png", "drift.png", "forgetting.png", "loss.png"]


def test_the_page_opens_in_a_real_browser(run: Path, tmp_path: Path) -> None:
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no chromium on this machine; the page is not looked at in a browser")
    page, shot = write_report(run), tmp_path / "page.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,2400"]
    command = [browser, *options, f"--screenshot={shot}", f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (1100, 2400)
        assert len(image.convert("RGB").resize((110, 240)).getcolors(30_000) or ()) > 200, "the page is blank"
