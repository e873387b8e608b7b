"""Objects show themselves: what they show is what they hold, and no text of theirs becomes markup."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl import html
from featcl.adapters import constrain
from featcl.evaluation import ScoreMatrix
from featcl.evaluation.result import RunResult
from featcl.evaluation.samples import Sample
from featcl.features import Directions
from featcl.learning import Learner, RunLedger
from featcl.memory import MemoryState, NeuralMemory
from featcl.streams import Trajectory
from featcl.studies.ledger import log_run
from featcl.studies.ledger_blame import blame_run
from featcl.studies.ledger_diff import diff_runs

HOSTILE = "<script>alert('&')</script>"
SHOWN = {"style", "div", "h3", "table", "tr", "th", "td", "span"}  # what cards are made of


class Page(HTMLParser):
    """The tags of some HTML, its texts, and its table cells row by row with their styles."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.styles: list[list[str]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.styles.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.styles[-1].append(dict(attrs).get("style") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def facts(self) -> dict[str, str]:
        return {row[0]: row[1] for row in self.rows if len(row) == 2}

    @property
    def text(self) -> str:
        return "".join(self.texts)


def shown(thing: Any) -> Page:
    page = Page(thing._repr_html_())
    assert set(page.tags) <= SHOWN
    return page


# --- the helpers ------------------------------------------------------------------------------------------------------


def test_every_text_is_escaped() -> None:
    made = html.facts_card(HOSTILE, {HOSTILE: HOSTILE}, html.note(HOSTILE), html.table((HOSTILE,), [(HOSTILE,)]))
    assert Page(made).text.count(HOSTILE) == 6
    assert "script" not in Page(made).tags
    assert "script" in Page(f"<div>{HOSTILE}</div>").tags  # the control: unescaped, it would be found
    [link] = [tag for tag in Page(html.table((), [((HOSTILE, f'"{HOSTILE}'),)])).tags if tag not in SHOWN]
    assert link == "a"


def test_numbers_links_and_what_is_not_there() -> None:
    page = Page(html.facts_card("title", {"number": 0.123456, "nothing": None, "count": 7, "unknown": math.nan}))
    assert page.rows == [["number", "0.1235"], ["count", "7"], ["unknown", "–"]]
    assert '<a href="https://a/b"' in html.table((), [(("text", "https://a/b"),)])


def test_a_long_table_says_what_it_leaves_out() -> None:
    rows = [(str(number),) for number in range(html.SHOWN + 3)]
    page = Page(f"<div>{html.long_table(('n',), rows)}</div>")
    assert len(page.rows) == html.SHOWN + 1
    assert "and 3 more" in page.text
    assert "more" not in Page(f"<div>{html.long_table(('n',), rows[:-3])}</div>").text


def test_tokens_are_coloured_by_their_share_of_the_largest() -> None:
    sample = Sample("what?", "a b", (HOSTILE, " b", "c"), (0.5, 2.0, 0.0))
    page = shown(sample)
    assert f"{HOSTILE} bc" in page.text
    found = sample._repr_html_()
    strengths = [float(part.split(")")[0]) for part in found.split("rgba(230,130,0,")[1:]]
    assert strengths == [pytest.approx(0.175, abs=0.01), 0.7, 0.0]
    assert "mean 0.833, at most 2 nats" in page.text
    none = html.coloured(("a", "b"), (math.nan, 0.0))  # the control: nothing differs, nothing is coloured
    assert none.count("rgba(230,130,0,0.00)") == 2


# --- R ----------------------------------------------------------------------------------------------------------------


def matrix(measure: Any = "accuracy") -> ScoreMatrix:
    made = ScoreMatrix((f"first {HOSTILE}", "second", "probe"), 2, measure)
    for name, scores in (("base", (0.0, 0.0, 1.0)), ("first", (1.0, 0.25, 0.75)), ("second", (0.5, math.nan, 0.5))):
        columns = {c: {"item": s} for c, s in zip(made.columns, scores, strict=True) if not math.isnan(s)}
        made = made.with_row(name, columns)
    return made


def alpha(style: str) -> float:
    return float(style.split("rgba(0,114,178,")[1].split(")")[0])


def test_scores_are_on_colours_and_what_was_just_learned_is_framed() -> None:
    page = shown(matrix())
    assert page.rows == [
        ["after", f"first {HOSTILE}", "second", "probe"],
        ["base", "0.000", "0.000", "1.000"],
        ["first", "1.000", "0.250", "0.750"],
        ["second", "0.500", "–", "0.500"],
    ]
    assert [alpha(style) for style in page.styles[2][1:]] == [0.5, pytest.approx(0.125, abs=0.01), 0.38]
    assert page.styles[3][2] == ""
    assert [["outline" in style for style in row] for row in page.styles[1:]] == [
        [False] * 4, [False, True, False, False], [False, False, False, False]]  # fmt: skip


def test_of_losses_the_lowest_of_a_column_is_strongest() -> None:
    page = shown(matrix("nll"))
    assert [alpha(row[1]) for row in page.styles[1:]] == [0.5, 0.0, 0.25]  # of 0, 1 and 0.5 nats
    assert [alpha(row[3]) for row in page.styles[1:]] == [0.0, 0.25, 0.5]  # of 1, 0.75 and 0.5
    assert "lower is better" in page.text
    assert shown(ScoreMatrix(("a",), 1, "nll")).rows == [["after", "a"]]


def test_a_run_shows_r_its_metrics_and_its_leak(tmp_path: Path) -> None:
    summary = {
        "study": "s", "arm": HOSTILE, "seed": 3, "metrics": {"acc": 0.375, "bwt": -0.5, "fwt": None}, "updates": 12,
        "tokens": 345, "leak": {"leak": 3e-8, "rescale": 0.5}, "delta_norm": 2.0,
    }  # fmt: skip
    page = shown(RunResult(tmp_path, matrix(), summary))
    assert f"s/{HOSTILE}, seed 3" in page.texts
    assert ["second", "0.500", "–", "0.500"] in page.rows
    assert {row[0]: row[1] for row in page.rows if len(row) == 3} == {"metric": "", "acc": "0.375", "bwt": "-0.5"}
    assert page.facts == {"updates": "12", "tokens": "345", "delta_norm": "2", "leak: leak": "3e-08",
                          "leak: rescale": "0.5"}  # fmt: skip


# --- directions, adapter, updates, ledger -----------------------------------------------------------------------------


@pytest.fixture
def learned(tiny: Callable[..., Any], tmp_path: Path) -> Any:
    """A tiny model with named features that learned three hostile trajectories; its directions, learner and folder."""
    model, tokenizer = tiny("olmo2", n_layers=2)
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    directions = Directions.from_vectors(rows, layer=1, feature_ids=(5, 6, 7, 8), names=(HOSTILE, "b", "c", "d"))
    adapter = constrain(model, directions, kind="both")
    ledger = RunLedger(tmp_path / "ledger", adapter)
    learner = Learner(model, tokenizer, adapter, lr=1e-2, ledger=ledger, objective=["sft", "kl_to_base"])
    talk = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"})
    made = [Trajectory(f"{HOSTILE}{i}", source=HOSTILE, task=HOSTILE, messages=talk) for i in range(3)]
    return directions, learner, [learner.observe(trajectory) for trajectory in made], tmp_path


def test_directions(learned: Any) -> None:
    directions, *_ = learned
    page = shown(directions)
    assert "4 directions" in page.texts
    assert ["5", HOSTILE] in page.rows
    assert "blocks.1.hook_resid_post (layer 1), d_model 32" in page.text
    marked = replace(directions, manifest={"validation": {"without_effect": [6]}})
    assert "no effect of 6" in shown(marked).text
    assert "no effect" not in page.text


def test_adapter_and_leak(learned: Any) -> None:
    _, learner, _, _ = learned
    adapter = learner.adapter
    page = shown(adapter)
    assert page.facts["kind"] == "both"
    assert page.facts["writes, layer 1"] == page.facts["reads, layer 1"] == "4 of 32 dimensions"
    assert page.facts["trained numbers"] == str(sum(p.numel() for p in adapter.parameters()))
    assert float(page.facts["‖ΔW‖"]) == pytest.approx(adapter.delta_norm(), rel=1e-3)
    sizes = {row[0]: float(row[2]) for row in page.rows if len(row) == 3 and row[0] != "trained"}
    assert sizes == pytest.approx({n: float(p.norm()) for n, p in adapter.coordinates().items()}, rel=1e-3)
    leak = adapter.leak(torch.arange(10)[None])
    page = shown(leak)
    assert float(page.facts["leak, worst site"]) == pytest.approx(leak.leak, rel=1e-3)
    assert leak.leak < 1e-6
    assert {row[0] for row in page.rows if len(row) == 4} == {"module", *leak.per_site}


def test_an_update_says_what_it_was_learned_from_and_what_was_measured(learned: Any) -> None:
    *_, updates, _ = learned
    page = shown(updates[1])
    assert "Update, version 2" in page.texts
    assert page.facts["learned from"] == f"{HOSTILE}1 ({HOSTILE}, {HOSTILE})"
    assert float(page.facts["loss"]) == pytest.approx(updates[1].loss, rel=1e-3)
    assert set(updates[1].losses) <= set(page.facts)
    assert float(page.facts["KL(before ‖ after), nats per token"]) == pytest.approx(updates[1].kl, rel=1e-3)
    assert "quarantined" not in page.facts
    refused = shown(replace(updates[1], quarantined=HOSTILE, loss=math.nan))
    assert refused.facts["quarantined"] == HOSTILE
    assert "loss" not in refused.facts


def test_the_ledger(learned: Any) -> None:
    *_, folder = learned
    log = log_run(folder)
    page = shown(log)
    assert [row[0] for row in page.rows] == ["version", "v3", "v2", "v1"]
    assert page.rows[1][2] == f"{HOSTILE}2"
    assert shown(log.entries[0]).rows == [page.rows[0], page.rows[1]]
    diff = diff_runs(folder, "v1", "head")
    assert shown(diff).rows[1] == diff.cells()[1][0]
    assert HOSTILE in shown(diff).text
    blame = blame_run(folder, feature="5")
    page = shown(blame)
    assert {row[3] for row in page.rows[1:]} == {f"{HOSTILE}{i}" for i in range(3)}
    shares = [float(row[0].rstrip("%")) for row in page.rows[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.2)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_memory_state_shows_its_size_and_norms() -> None:
    memory = NeuralMemory(8, heads=2, depth=2, chunk_size=4)
    with torch.no_grad():
        state: MemoryState = memory(torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)))[1]
    page = shown(state)
    assert page.facts == {"memories": "3", "heads": "2", "bytes": f"{state.nbytes:,}",
                          "tokens in the open chunk": "2, 2, 2"}  # fmt: skip
    _, *layers = [row for row in page.rows if len(row) == 4]
    assert [row[1] for row in layers] == ["2×4×8", "2×8×4"]
    found = [[float(cell) for cell in row[2:]] for row in layers]
    assert found == [pytest.approx(list(norms.values()), rel=1e-3) for norms in state.norms()]
    plain = NeuralMemory(8, heads=2, depth=1, momentum=False).initial_state(1)
    assert "largest ‖momentum‖" in page.text
    assert "momentum" not in shown(plain).text


def test_html_is_what_json_would_say_of_a_shade() -> None:
    cell = html.Shade(1 / 3, 2.0, framed=True)
    page = Page(html.table((), [(cell,), (html.Shade(math.nan, 1.0),)]))
    assert page.rows == [["0.333"], ["–"]]
    assert alpha(page.styles[0][0]) == 0.5  # a share beyond 1 is 1
    assert json.loads(html.table((), [(cell,)]).split('title="')[1].split('"')[0]) == 1 / 3
