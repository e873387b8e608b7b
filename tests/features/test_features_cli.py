"""`featcl features train | check | select | show` on tiny models: what they write, print and refuse."""

from __future__ import annotations

import json
import random

import pytest

from featcl import cli
from featcl.features import Directions, load_sae

WORDS = ["the", "lamp", "door", "music", "garden", "window", "kettle", "is", "open", "closed", "green", "old", "but"]


@pytest.fixture
def place(tiny_folder, tmp_path):
    """A model folder, and files of two kinds of text."""
    draw = random.Random(0)

    def write(name: str, words: list[str], count: int = 40) -> str:
        path = tmp_path / name
        path.write_text("\f".join(" ".join(draw.choices(words, k=14)) for _ in range(count)))
        return str(path)

    return {
        "model": str(tiny_folder()),
        "sae": str(tmp_path / "sae"),
        "out": str(tmp_path / "directions"),
        "text": write("text.txt", WORDS),
        "yes": write("yes.txt", ["xylophone", "zebra", "quiz", "jazz"]),
        "no": write("no.txt", ["meadow", "silent", "stone", "tree"]),
        "html": tmp_path / "features.html",
        "tmp": tmp_path,
    }


def run(capsys, *arguments: object) -> str:
    assert cli.invoke([str(argument) for argument in ("features", *arguments)]) == 0
    return capsys.readouterr().out


def train(capsys, place, *more: object) -> str:
    return run(
        capsys, "train", "--model", place["model"], "--text", place["text"], "--out", place["sae"],
        "--tokens", 12_000, "--batch-size", 256, "--d-sae", 128, *more,
    )  # fmt: skip


def test_train_check_select_show(place, capsys):
    trained = json.loads(train(capsys, place, "--layer", 1, "--json"))["1"]
    assert trained["folder"] == place["sae"]
    assert trained["fvu"] < 0.5
    given = ("--sae", place["sae"], "--model", place["model"])

    checked = json.loads(run(capsys, "check", *given, "--text", place["text"], "--json"))
    assert checked["fvu"] == pytest.approx(trained["fvu"], abs=0.1)
    assert "loss_recovered" in run(capsys, "check", *given, place["text"])

    sides = ("--positive", place["yes"], "--negative", place["no"])
    chosen = json.loads(
        run(capsys, "select", *given, "--selector", "contrast", "--k", 4, *sides, "--out", place["out"], "--json")
    )
    directions = Directions.load(place["out"])
    assert chosen == {"folder": place["out"], "feature_ids": list(directions.feature_ids), "digest": directions.digest}
    assert directions.k == 4
    combined = run(
        capsys, "select", *given, "--selector", "{union: [contrast, persona]}", "--k", 3, *sides, "--out", place["out"]
    )
    assert "union(contrast, persona)" in combined
    assert "saved in" in combined

    listed = run(capsys, "show", place["out"])
    assert "effect" in listed
    assert json.loads(run(capsys, "show", place["out"], "--json"))["feature_ids"] == list(
        Directions.load(place["out"]).feature_ids
    )
    looked = run(
        capsys, "show", place["out"], "--model", place["model"], "--text", place["yes"], "--out", place["html"]
    )
    assert "fires on" in looked
    page = place["html"].read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<h3>Feature") == 3
    seen = json.loads(run(capsys, "show", *given, "--text", place["text"], "--k", 2, "--json"))
    assert len(seen["features"]) == 2
    assert 0 < seen["features"][0]["active"] <= seen["features"][0]["tokens"] / 2


def test_contrast_says_how_many_features_pass_its_false_discovery_rate(place, capsys):
    train(capsys, place, "--layer", 1)
    few = [place["tmp"] / "yes_few.txt", place["tmp"] / "no_few.txt"]
    few[0].write_text("xylophone zebra\fquiz jazz")
    few[1].write_text("meadow silent\fstone tree")

    def select(positive: object, negative: object) -> tuple[int, list[float], str]:
        arguments = ["select", "--sae", place["sae"], "--model", place["model"], "--selector", "contrast", "--k", 2,
                     "--positive", positive, "--negative", negative, "--out", place["out"]]  # fmt: skip
        assert cli.invoke([str(argument) for argument in ("features", *arguments)]) == 0
        manifest = Directions.load(place["out"]).manifest
        return manifest["chosen_significant"], manifest["scores"]["q_value"], capsys.readouterr().err

    passing, q_value, said = select(*few)
    assert passing == sum(q <= 0.05 for q in q_value) < 2
    assert f"contrast: {passing} of 2 chosen features pass a false discovery rate of 0.05; more texts" in said
    passing, _, said = select(place["yes"], place["no"])
    assert passing == 2
    assert "false discovery rate" not in said


def test_select_validates_on_texts_it_did_not_choose_by(place, capsys):
    train(capsys, place, "--layer", 1)
    printed = run(
        capsys, "select", "--sae", place["sae"], "--model", place["model"], "--selector", "contrast", "--k", 2,
        "--positive", place["yes"], "--negative", place["no"], "--out", place["out"], "--validate", "--json",
    )  # fmt: skip
    finding = json.loads(printed)["validation"]
    assert finding["texts"] == [20, 20]  # every second of 40
    manifest = Directions.load(place["out"]).manifest
    assert set(manifest["validation"]["data"].values()).isdisjoint(manifest["data"].values())
    assert len(finding["random"][0]) >= 20


def test_train_like_a_manifest(place, capsys):
    train(capsys, place, "--layer", 0, "--architecture", "topk")
    other = str(place["tmp"] / "again")
    run(
        capsys,
        "train",
        "--like",
        f"{place['sae']}/featcl.json",
        "--model",
        place["model"],
        "--text",
        place["text"],
        "--out",
        other,
    )
    for name in ("sae_weights.safetensors", "cfg.json", "featcl.json"):
        assert (place["tmp"] / "again" / name).read_bytes() == (place["tmp"] / "sae" / name).read_bytes()
    assert load_sae(other).cfg.architecture() == "topk"


def test_ctrl_c_exits_with_130_and_the_same_command_goes_on(place, capsys, monkeypatch):
    import os
    import signal

    from featcl.features import saelens

    step, calls = saelens.train_step_, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments, **options)

    monkeypatch.setattr(saelens, "train_step_", interrupted)
    arguments = ["features", "train", "--model", place["model"], "--text", place["text"], "--out", place["sae"],
                 "--layer", "1", "--tokens", "12000", "--batch-size", "256", "--d-sae", "64"]  # fmt: skip
    assert cli.invoke(arguments) == 130
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "the state is saved in" in printed.err
    calls[:] = [1] * 100
    assert cli.invoke(arguments) == 0
    assert len(calls) == 100 + 46 - 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--model", "MODEL", "--layer", "9", "--text", "TEXT", "--out", "OUT"], "blocks 0 to 2"),
        (["train", "--model", "MODEL", "--text", "TEXT", "--out", "OUT"], "name at least one layer"),
        (
            ["train", "--model", "MODEL", "--layer", "1", "--text", "nowhere.txt", "--out", "OUT"],
            "nowhere.txt does not exist",
        ),
        (
            ["train", "--model", "MODEL", "--layer", "1", "--text", "TEXT", "--out", "OUT", "--site", "left"],
            "site 'left'",
        ),
        (["train", "--model", "MODEL", "--text", "TEXT", "--out", "OUT", "--like", "TEXT"], "not the manifest"),
        (
            ["train", "--model", "nothing", "--layer", "1", "--text", "TEXT", "--out", "OUT"],
            "no model folder 'nothing'",
        ),
        (
            ["train", "--model", "MODEL", "--layer", "1", "--text", "TEXT", "--out", "OUT", "--lr", "-1"],
            "must be positive",
        ),
        (["check", "--model", "MODEL", "--sae", "nowhere", "--text", "TEXT"], "nowhere"),
        (["check", "--model", "MODEL", "--sae", "nowhere"], "at least one text file"),
        (["select", "--sae", "nowhere", "--model", "MODEL", "--out", "OUT"], "either --selector or --bundle"),
        (
            ["select", "--sae", "s", "--model", "MODEL", "--out", "OUT", "--bundle", "home", "--selector", "ids"],
            "either",
        ),
        (["select", "--sae", "s", "--model", "MODEL", "--out", "OUT", "--bundle", "homeassistant"], "does not exist"),
        (["select", "--sae", "s", "--model", "MODEL", "--out", "OUT", "--selector", "ids", "--ids", "x"], "--ids 'x'"),
        (
            ["select", "--sae", "s", "--model", "MODEL", "--out", "OUT", "--selector", "{union: ["],
            "a combination reads",
        ),
        (["show"], "either a folder of directions or --sae"),
        (["show", "OUT", "--sae", "s"], "either a folder of directions or --sae"),
        (["show", "--sae", "s"], "needs --model and --text"),
        (["show", "--sae", "s", "--model", "MODEL"], "at least one text file"),
        (["show", "--sae", "s", "--model", "MODEL", "--text", "TEXT", "--k", "0"], "k must be at least 1"),
        (["show", "--sae", "s", "--model", "MODEL", "--text", "TEXT", "--out", "MODEL"], "is a folder; name a file"),
        (["show", "--sae", "s", "--model", "MODEL", "--text", "TEXT", "--out", "new/"], "new/ is a folder"),
        (["show", "--sae", "s", "--model", "MODEL", "--text", "TEXT", "--out", "/proc/x/y.html"], "/proc/x"),
        (["select", "--sae", "s", "--model", "MODEL", "--out", "TEXT", "--selector", "ids"], "is a file; a folder"),
        (["select", "--sae", "s", "--model", "MODEL", "--out", "/proc/x", "--selector", "ids"], "/proc/x cannot be"),
        (["select", "--sae", "s", "--model", "MODEL", "--out", "OUT", "--bundle", "/tmp/X.txt"], "--bundle /tmp/X.txt"),
        (["train", "--model", "MODEL", "--layer", "1", "--text", "TEXT", "--out", "TEXT"], "is a file; a folder"),
        (
            ["train", "--model", "MODEL", "--layer", "1", "--text", "TEXT", "--out", "OUT", "--d-sae", "0"],
            "error: d_sae = 0 must be at least 1",
        ),
        (
            ["train", "--model", "MODEL", "--layer", "1", "--text", "TEXT", "--out", "OUT", "--d-sae", "2"],
            "error: d_sae = 2 is too small for the default l0",
        ),
        (
            ["train", "--model", "MODEL", "--layer", "1", "--text", "TEXT", "--out", "OUT", "--l0", "0"],
            "error: l0 = 0.0 must lie between 1 and d_sae",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(place, capsys, arguments, says):
    known = {"MODEL": place["model"], "TEXT": place["text"], "OUT": place["out"]}
    assert cli.invoke(["features", *(known.get(argument, argument) for argument in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.startswith("featcl: error: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt.gz", b"not gzip", "gzip"),
        ("a.txt", b"\n\n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "record 2"),
        ("a.jsonl", b'{"id": "1", "mesages": []}\n', "did you mean 'messages'"),
        ("a.txt", b"too short", "too few to train"),
    ],
)
def test_bad_text_files_are_one_line(place, capsys, name, content, says):
    path = place["tmp"] / name
    path.write_bytes(content)
    assert (
        cli.invoke(
            ["features", "train", "--model", place["model"], "--layer", "1", "--out", place["out"], "--text", str(path)]
        )
        == 2
    )
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
