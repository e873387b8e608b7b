"""Pictures: the same data gives the same bytes, every letter can be read, colours keep apart, names are only names."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from featcl.tracking import plots, plots_curves, plots_ledger, plots_matrix, plots_relations, plots_style, plots_tokens
from featcl.tracking.plots_data import Absent, Bar, Curve, Forgetting, Scores, Table, Timeline, TokenKL, Version
from tests.tracking import folders, legible

EVIL = "_$x_1\\frac{$ <script>alert(1)</script> & \x00\x1b \ud800 naïve 日本 \u202e"


def scores(**options: Any) -> Scores:
    found = folders.score_rows(**options)
    return Scores(tuple(found["rows"]), tuple(found["columns"]), tuple(map(tuple, found["values"])), found["n_tasks"])


def figures() -> dict[str, Any]:
    tables = {name: Table(columns, tuple(map(tuple, rows))) for name, (columns, rows) in folders.tables().items()}
    found = plots.run_figures(folders.records(), scores=scores(), ledger=folders.ledger_lines(), tables=tables)
    drawn = {name: draw if isinstance(draw, Absent) else draw() for name, draw in found.items()}
    return {**drawn, "frontier": plots_relations.frontier(points())}


def points(arms: tuple[str, ...] = ("a", "b")) -> list[plots.FrontierPoint]:
    return [
        plots.FrontierPoint(arm, 0.1 * i, 1 - 0.1 * i - 0.03 * n, 0.02, (0.03, 0.01), lr=10.0**-i)
        for n, arm in enumerate(arms)
        for i in range(3)
    ]


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """All pictures of the invented run."""
    return figures()


# --- bytes


def test_the_same_data_gives_the_same_bytes(run: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20.0, "axes.facecolor": "red", "svg.hashsalt": None}):
        again = figures()
        for name, figure in run.items():
            for form in ("png", "svg"):
                data = plots.render(figure, form)
                assert data == plots.render(again[name], form), f"{name}.{form}"
                assert len(data) < 300_000
    assert dict(matplotlib.rcParams) == before, "nothing global is touched"


def test_other_data_gives_other_bytes(tmp_path: Path) -> None:
    records = folders.records()
    changed = [{**r, "train/loss": r["train/loss"] + 1} if "train/loss" in r else r for r in records]
    first, second = plots.loss_curve(tmp_path / "1.png", records), plots.loss_curve(tmp_path / "2.png", changed)
    assert first is not None
    assert second is not None
    assert first.read_bytes() != second.read_bytes()


def test_an_svg_is_xml_without_a_date_or_a_script(run: dict[str, Any]) -> None:
    hostile = plots_ledger.bars([Bar(EVIL, 1.0, 0.5, 1.5), Bar(EVIL + "2", -1.0, -1.0, -1.0)], x_label=EVIL, title=EVIL)
    for figure in (*run.values(), hostile):
        data = plots.render(figure, "svg")
        root = ElementTree.fromstring(data)
        assert not [element for element in root.iter() if str(element.tag).endswith("script")]
        assert b"<dc:date>" not in data


# --- letters


@pytest.mark.parametrize("name", sorted(plots_names := (
    "R", "forgetting", "loss", "drift", "norm_retention", "kl_forgetting", "shift_forgetting", "feature_drift",
    "token_kl", "ledger", "memory", "frontier",
)))  # fmt: skip
def test_a_reader_can_read_it_at_half_a_column(run: dict[str, Any], name: str) -> None:
    assert set(run) == set(plots_names)
    assert not isinstance(run[name], Absent), run[name]
    assert legible.problems(run[name]) == []


def many(count: int) -> tuple[str, ...]:
    return tuple(f"domain-{n}/a task with a rather long name" for n in range(count))


def long_timeline(count: int) -> Timeline:
    versions = tuple(Version(n, "update", many(12)[n % 12], 0.1, 1.0, n**0.5, n % 5 > 0) for n in range(1, count))
    return Timeline(versions, ((3, "rollback", EVIL), (5, "alarm", EVIL)))


HARD = {
    "a matrix of one cell": lambda: plots_matrix.heatmap(Scores(("base",), ("a",), ((None,),), 1)),
    "a matrix of likelihoods": lambda: plots_matrix.heatmap(
        Scores(("base", "a"), ("a", EVIL), ((None, 12.5), (3.25, 2.0)), 1, "nll")
    ),
    "12 tasks": lambda: plots_matrix.heatmap(scores(tasks=many(10))),
    "100 tasks": lambda: plots_matrix.heatmap(scores(tasks=many(100))),
    "forgetting of 40 tasks": lambda: plots_curves.forgetting(
        Forgetting({task: Curve((1, 2), (0.1, 0.2)) for task in many(40)}, {}, {"general": Curve((1,), (0.5,))})
    ),
    "forgetting of hostile names": lambda: plots_curves.forgetting(
        Forgetting({f"{n}{EVIL}": Curve((1, 2), (0.1, n)) for n in range(6)}, {}, {})
    ),
    "20 arms": lambda: plots_relations.frontier(points(many(20))),
    "hostile arms": lambda: plots_relations.frontier(points((EVIL, "b"))),
    "15 features": lambda: plots_ledger.bars(
        [Bar(f"{n} {EVIL * 3}", n - 7.0, n - 8.0, n - 6.0) for n in range(15)], x_label="change of mean activation"
    ),
    "12 tasks in a ledger": lambda: plots_ledger.timeline(long_timeline(500)),
    "2000 tokens": lambda: plots_tokens.token_kl(TokenKL((" word", EVIL, "\n") * 700, (0.1, 2.0, 0.0) * 700)),
    "one token without a number": lambda: plots_tokens.token_kl(TokenKL(("",), (float("nan"),))),
    "no variance": lambda: plots_relations.relation({"a": Curve((1, 1), (2, 2))}, x_label="x", y_label="y", fit="all"),
}


@pytest.mark.parametrize("name", HARD)
def test_it_stays_legible_with_hard_data(name: str) -> None:
    assert legible.problems(HARD[name]()) == []


def test_the_check_of_legibility_sees_what_is_wrong() -> None:
    with plots_style.style():
        figure, [axes] = plots_style.panels()
        axes.text(0.5, 0.5, "tiny", fontsize=6)
        axes.text(0.5, 0.5, "on it", fontsize=8)
        figure.text(0.98, 0.5, "far too far to the right")
        figure.set_figwidth(5)
    found = " ".join(legible.problems(figure))
    for what in ("inches wide", "'tiny' has 6.0 points", "leaves the figure", "'tiny' lies on 'on it'"):
        assert what in found, what


def test_names_are_drawn_as_they_are(run: dict[str, Any]) -> None:
    figure = plots_relations.relation({"_a": Curve((1,), (2,)), "$b$": Curve((2,), (1,))}, x_label="x", y_label="y")
    texts = [text.get_text() for text in legible.drawn_texts(figure)]
    assert " _a" in texts, "Matplotlib would leave the name out"
    assert "$b$" in texts
    assert all(not text.get_parse_math() for text in legible.drawn_texts(run["kl_forgetting"]))
    assert plots_style.label("a\nb\tc") == "a b c"
    assert plots_style.label("x" * 100, 9) == "xxxx…xxxx"


def test_numbers_in_cells_have_contrast() -> None:
    """WCAG: at least 4.5 between a number and its cell, for every shade of the map."""
    ramp = np.linspace(0, 1, 12)
    figure = plots_matrix.heatmap(Scores(("base",), tuple(map(str, range(12))), (tuple(ramp),), 12))
    [image] = figure.axes[0].images
    for value, text in zip(ramp, figure.axes[0].texts, strict=True):
        cell, letters = plots_matrix.luminance(image.to_rgba(value)), {"black": 0.0, "white": 1.0}[text.get_color()]
        light, dark = max(cell, letters), min(cell, letters)
        assert (light + 0.05) / (dark + 0.05) > 4.5, value


# --- colours

SEEN_BY = {  # linear RGB, after Viénot, Brettel & Mollon 1999
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
}


@pytest.mark.parametrize("kind", SEEN_BY)
def test_colours_keep_apart_for_a_dichromat(kind: str) -> None:
    seen_by = np.array(SEEN_BY[kind])
    colours = [np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2 for c in plots.COLOURS]
    seen = [seen_by @ colour for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.1
    red, green = (seen_by @ np.array(colour) for colour in ([0.6, 0.0, 0.0], [0.0, 0.11, 0.0]))
    assert np.linalg.norm(red - green) < 0.5 * np.linalg.norm([0.6, -0.11, 0]), "the check must see them fall together"


def test_lines_that_share_a_colour_differ_in_their_dashes() -> None:
    looks = [tuple(plots_style.look(index).values()) for index in range(28)]
    assert len(set(looks)) == 28


# --- content


def test_a_line_is_fitted_by_least_squares() -> None:
    assert plots.linear_fit((0, 1, 2), (1, 3, 5)) == plots.Fit(pytest.approx(2), pytest.approx(1), pytest.approx(1), 3)
    found = plots.linear_fit((0, 1, 2, 3), (0, 1, 0, 1))  # by hand: slope 0.2, R² = 1 - 0.8 / 1
    assert found is not None
    assert (found.slope, found.intercept, found.r2) == pytest.approx((0.2, 0.2, 0.2))
    assert plots.linear_fit((0, 1), (0, 1)) is None, "two points are always on a line"
    assert plots.linear_fit((1, 1, 1), (0, 1, 2)) is None


def test_the_running_mean_is_unbiased_at_its_start() -> None:
    assert plots_curves.running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert plots_curves.running_mean([1.0, 0.0]) == pytest.approx([1.0, 0.9 / 1.9])


def test_pieces_of_a_text_lose_no_letter_and_fit_their_lines() -> None:
    tokens = ("Hello", " world", "\n", "x" * 130, "\n\n", " end")
    cells = list(plots_tokens.laid_out(tokens))
    assert "".join(piece for _, _, piece, _ in cells).replace("↵", "\n") == "".join(tokens)
    assert all(column + len(piece) <= plots_tokens.COLUMNS for _, column, piece, _ in cells)
    taken = [(line, column + i) for line, column, piece, _ in cells for i in range(len(piece))]
    assert len(set(taken)) == len(taken), "no letter lies on another"


def test_a_stronger_kl_has_a_stronger_colour() -> None:
    figure = plots_tokens.token_kl(TokenKL(("a", "b", "c"), (0.0, 0.5, 1.0)))
    blues = [patch.get_facecolor()[2] for patch in figure.axes[0].patches]
    assert blues[0] == 1.0
    assert blues[0] > blues[1] > blues[2]


def test_hollow_is_what_was_rolled_back() -> None:
    versions = tuple(Version(n, "update", "t", 0.1, 1.0, 1.0, n < 3) for n in (1, 2, 3))
    figure = plots_ledger.timeline(Timeline(versions, ((3, "rollback", ""),)))
    faces = figure.axes[0].collections[0].get_facecolors()
    assert [bool(face[3]) for face in faces] == [True, True, False]


# --- files


def test_files_are_png_or_svg_by_their_ending(tmp_path: Path) -> None:
    given = {"rows": ["base", "a"], "columns": ["a"], "values": [[None], [0.5]]}
    assert plots.score_heatmap(tmp_path / "R.png", **given).read_bytes().startswith(b"\x89PNG")
    assert plots.score_heatmap(tmp_path / "R.svg", **given).read_bytes().startswith(b"<?xml")
    plots.frontier(tmp_path / "frontier.png", points())
    plots.bars(tmp_path / "bars.png", {"a": 1.0, "b": -1.0}, label="change")
    plots.version_curves(tmp_path / "log.png", {"KL": {"of the update": ([1.0], [0.5])}, "empty": {"x": ([], [])}})
    assert len(list(tmp_path.iterdir())) == 5


def test_nothing_to_draw_draws_nothing_and_says_why(tmp_path: Path) -> None:
    for draw in (plots.forgetting_curves, plots.loss_curve, plots.drift_curve):
        assert draw(tmp_path / "none.png", [{"update": 1, "cost/tokens": 3}]) is None
    assert list(tmp_path.iterdir()) == []
    found = plots.run_figures([{"update": 1, "cost/tokens": 3}])
    assert all(isinstance(figure, Absent) and figure.reason for figure in found.values())
