"""The command line: exit codes, one line on standard error, what is listed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featcl import cli


def featcl(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "featcl.cli", *arguments],
        capture_output=True, text=True, timeout=300, check=False, cwd=cwd,
    )  # fmt: skip


def test_help_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["--help"]) == 0
    printed = capsys.readouterr().out
    listed = [line.split()[0] for line in printed.split("Commands:")[1].splitlines() if line.strip()]
    ledger = ["log", "diff", "blame", "revert", "rollback"]
    assert listed == [
        "run", "export", "chat", "doctor", *ledger, "report", "table", "sweep", "finalists", "reproduce", "features",
        "lab",
    ]  # fmt: skip
    for group, commands in (("features", ["train", "check", "select", "show"]), ("lab", ["check", "train"])):
        assert cli.invoke([group, "--help"]) == 0
        printed = capsys.readouterr().out
        lines = printed.split("Commands:")[1].splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == commands


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["doctor", "--json", "--output", str(tmp_path / "results")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert found["float32_matmul"] in ("highest", "high", "medium")
    assert found["devices"]["cpu"]["threads"] == found["threads"] == torch.get_num_threads()
    assert found["lab"] == {"lab/olmo2": True, "lab/gemma2": True}
    assert found["writable"][str(tmp_path / "results")] is None
    assert not (tmp_path / "results").exists(), "nothing is left behind"
    assert set(found["missing"]) == {name for name, version in found["optional"].items() if version is None}
    (tmp_path / "taken").write_text("a file")
    assert cli.invoke(["doctor", "--output", str(tmp_path / "taken")]) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert f"problem: {tmp_path / 'taken'} cannot be written to" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot read this config: No such file"),
        (["run"], "config"),
        (["rnu"], "rnu"),
        (["run", "x.yaml", "--overwritten"], "--overwritten"),
        (["table", "nowhere"], "nowhere: no such study"),
        (["features", "train", "--model", "m", "--layer", "1", "--out", "o"], "give at least one text file"),
        (["features", "train", "--layer", "one"], "'--layer'"),
        (["features", "show", "nowhere"], "nowhere"),
        (["export", "nowhere", "--to", "peft"], "nowhere is not a run's folder"),
        (["export", "nowhere", "--to", "gguf"], "unknown form 'gguf', there is peft and merged"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.invoke(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("featcl: error: ")
    assert printed.err.count("\n") == 1


def test_a_config_error_names_key_and_file(tmp_path: Path) -> None:
    path = tmp_path / "arm.yaml"
    path.write_text("learner: {stepps: 3}\n")
    done = featcl("run", str(path))
    assert done.returncode == 2
    assert done.stderr == f"featcl: error: {path}: learner.stepps: unknown key, did you mean 'steps'?\n"
    assert done.stdout == ""
    done = featcl("run", str(path), "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="no such study"):
        cli.invoke(["table", "nowhere"], debug=True)


def test_an_interrupt_exits_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import featcl.run

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("the state is saved in results/x; the same command goes on from there")

    path = tmp_path / "arm.yaml"
    path.write_text("")
    monkeypatch.setattr(featcl.run, "run", stopped)
    assert cli.invoke(["run", str(path)]) == 130
    assert capsys.readouterr().err == (
        "featcl: interrupted; the state is saved in results/x; the same command goes on from there\n"
    )


def test_errors_that_are_ours_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import featcl.run

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    path = tmp_path / "arm.yaml"
    path.write_text("")
    monkeypatch.setattr(featcl.run, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.invoke(["run", str(path)])


@pytest.mark.parametrize("place", ["taken", "taken/below", "/proc/x"])
def test_an_output_that_cannot_be_written_is_one_line(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    path = tmp_path / "arm.yaml"
    path.write_text("")
    assert cli.invoke(["run", str(path), f"output={tmp_path / place}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("featcl: error: /")
    assert "is a file" in printed or "/proc/x" in printed
    assert printed.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")
def test_cuda_where_there_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "arm.yaml"
    path.write_text("")
    assert cli.invoke(["run", str(path), "runtime.device=cuda", f"output={tmp_path / 'results'}"]) == 2
    printed = capsys.readouterr().err
    assert "device 'cuda' cannot be used here" in printed
    assert printed.count("\n") == 1
    assert not any((tmp_path / "results").iterdir()), "a run that never started leaves nothing behind"


def test_an_error_of_the_file_system_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import featcl.run

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "results/x")

    path = tmp_path / "arm.yaml"
    path.write_text("")
    monkeypatch.setattr(featcl.run, "run", full)
    assert cli.invoke(["run", str(path)]) == 2
    assert capsys.readouterr().err == "featcl: error: results/x: No space left on device\n"
