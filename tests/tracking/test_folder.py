"""The folder of a run: what a killed process leaves is taken away, a full disk is one line, what differs is found."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from featcl.errors import FeatclError
from featcl.files import write_text
from featcl.tracking.ahead import WriteAhead
from featcl.tracking.environment import differences
from featcl.tracking.folder import RunFolder, stopping_cleanly


def folder(path: Path, **options: bool) -> RunFolder:
    return RunFolder(path / "run", {"seed": 0}, digest="d", **options)


def test_halves_of_atomic_writes_are_taken_away(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    torn = [run / ".config.json.ab12_x9z", run / "state" / ".current.json.abcdefgh"]
    kept = [run / "state" / ".hidden", run / "state" / "current.json"]
    for path in (*torn, *kept):
        path.write_text("{}")
    with folder(tmp_path):
        assert not any(path.exists() for path in torn)
        assert all(path.exists() for path in kept)
    (tmp_path / "other" / "run").mkdir(parents=True)
    (tmp_path / "other" / "run" / ".mine.abcdefgh").write_text("")
    with pytest.raises(FeatclError, match=r"'\.mine\.abcdefgh' and no run"):
        folder(tmp_path / "other")


def test_a_checkpoint_goes_before_the_config_that_it_belongs_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it clears the folder for another config, it never goes on with the old state."""
    with folder(tmp_path) as run:
        run.start({})
        run.save_state(lambda target: (target / "x").write_text("old") and None)
    again = RunFolder(tmp_path / "run", {"seed": 1}, digest="other", overwrite=True)
    with again, monkeypatch.context() as patch:
        patch.setattr("featcl.tracking.folder.shutil.rmtree", _dying)
        with pytest.raises(SystemExit):
            again.start({})
    assert RunFolder(tmp_path / "run", {"seed": 1}, digest="other").state is None


def _dying(*_: object, **__: object) -> None:
    raise SystemExit(137)


def saved(tmp_path: Path, *texts: str) -> Path:
    """A run's folder after some checkpoints of one file each."""
    with folder(tmp_path) as run:
        run.start({})
        for text in texts:
            run.save_state(lambda target, text=text: write_text(target / "learner" / "x", text))
    return tmp_path / "run" / "state"


def test_without_its_name_the_newest_whole_checkpoint_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before it was named, or the name was lost: what was learned is not thrown away."""
    state = saved(tmp_path, "one", "two")
    shutil.copytree(state / "00000001", state / "00000002")
    (state / "00000002" / "learner" / "x").write_text("half")
    with folder(tmp_path) as run:
        assert run.state == state / "00000001", "the control: it is named"
        assert capsys.readouterr().err == ""
    (state / "current.json").unlink()
    with folder(tmp_path) as run:
        assert run.state == state / "00000001"
        assert "current.json is missing; the newest whole checkpoint is 00000001" in capsys.readouterr().err
        before = state / "00000001" / "learner" / "x"
        run.save_state(lambda target: write_text(target / "learner" / "x", before.read_text() + " three"))
        assert run.state == state / "00000003"
    assert [path.name for path in sorted(state.iterdir())] == ["00000003", "current.json"]


def test_a_checkpoint_that_is_gone_is_no_reason_to_start_from_nothing(tmp_path: Path) -> None:
    state = saved(tmp_path, "one", "two")
    (state / "current.json").unlink()
    for damage in (
        lambda: (state / "00000001" / "learner" / "x").write_text("tow"),
        lambda: (state / "00000001" / "check.json").unlink(),
        lambda: shutil.rmtree(state / "00000001"),
    ):
        damage()
        with folder(tmp_path) as run, pytest.raises(FeatclError, match=r"current\.json is missing, and no whole check"):
            _ = run.state
    with folder(tmp_path, overwrite=True) as run:
        assert run.state is None


def test_a_first_checkpoint_that_was_never_finished_is_none(tmp_path: Path) -> None:
    def dying(target: Path) -> None:
        write_text(target / "learner" / "x", "one")
        raise SystemExit(137)

    with folder(tmp_path) as run:
        run.start({})
        with pytest.raises(SystemExit):
            run.save_state(dying)
    with folder(tmp_path) as run:
        assert run.state is None


@pytest.mark.parametrize("how", ["edited", "cut", "gone"])
def test_a_checkpoint_is_as_it_was_saved_or_refused(tmp_path: Path, how: str) -> None:
    file = saved(tmp_path, "one") / "00000000" / "learner" / "x"
    if how == "gone":
        file.unlink()
    else:
        file.write_text("ono" if how == "edited" else "on")
    with (
        folder(tmp_path) as run,
        pytest.raises(FeatclError, match=r"learner/x: damaged \(not as it was saved\); restore"),
    ):
        _ = run.state
    file.write_text("one")
    with folder(tmp_path) as run:
        assert run.state == file.parents[1], "the control: restored, it counts"


def test_one_process_at_a_time_also_where_one_ends_as_another_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has opened the lock's file when the first takes it away: it would lock a file without a name."""
    import fcntl

    first, flock = folder(tmp_path), fcntl.flock
    first.__enter__()

    def ending(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", ending)
    with folder(tmp_path), pytest.raises(FeatclError, match="another process is running this"):
        folder(tmp_path).__enter__()


def test_what_is_quarantined_before_a_run_starts_anew_stays(tmp_path: Path) -> None:
    """The stream is read before the old results are cleared away; bad input then clears away nothing."""
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    with folder(tmp_path) as run:
        run.start({})
        quarantine.write_text("old\n")
    with folder(tmp_path, overwrite=True):
        assert not quarantine.exists()
        quarantine.write_text("new, but then the input was bad\n")
    assert quarantine.read_text() == "old\n"
    with folder(tmp_path, overwrite=True) as run:
        quarantine.write_text("new\n")
        run.start({})
    assert quarantine.read_text() == "new\n"
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(FeatclError, match="No space left on device, so nothing more can be recorded"),
        stopping_cleanly(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), stopping_cleanly(tmp_path):
        (tmp_path / "nothing").read_text()


def test_what_decides_the_last_bit_is_compared() -> None:
    before = {"threads": 1, "cpus": 4, "versions": {"torch": "2.6", "numpy": "2.1"}, "optional": {"wandb": "1"}}
    now = {"threads": 2, "cpus": 8, "versions": {"torch": "2.7", "numpy": "2.1"}, "optional": {"wandb": "2"}}
    assert differences(before, now) == ["threads was 1, is 2", "torch was 2.6, is 2.7"]
    assert differences(before, before) == []


def test_the_write_ahead_record(tmp_path: Path) -> None:
    ahead = WriteAhead(tmp_path / "state" / "ahead.json")
    assert ahead.read() is None
    ahead.begin(3, {"id": "a long trajectory " * 20})
    ahead.begin(4, {"id": "b"}, only_copy=True)
    found = ahead.read()
    assert found is not None
    assert (found.position, found.trajectory) == (4, {"id": "b"})
    ahead.close()
    whole = (tmp_path / "state" / "ahead.json").read_text()
    for torn in (whole[:-9], whole.replace('"b"', '"c"'), ""):
        (tmp_path / "state" / "ahead.json").write_text(torn)
        assert ahead.read() is None, "a torn record was not begun"
    assert json.loads(whole)["position"] == 4
