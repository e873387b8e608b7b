"""log, diff, blame, revert and rollback on a finished run, and on one that was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import featcl
from featcl.cli import invoke
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.learning import Learner
from featcl.learning.deltas import same
from featcl.learning.guard import Stopped
from featcl.learning.history import History
from featcl.learning.revert import distance
from featcl.learning.versions import load_snapshot
from featcl.studies.ledger import log_run
from featcl.studies.ledger_blame import blame_run
from featcl.studies.ledger_diff import diff_runs
from featcl.studies.ledger_edit import revert_run, rollback_run
from featcl.studies.replay import rebuilt, replay
from tests.runs import make_config, make_home, untimed

pytest.importorskip("sae_lens", reason="sae-lens is not installed")
SHORT = ("stream.limit=4", "evaluation.canaries.every=3")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it take a copy."""
    return featcl.run(make_config(home, tmp_path_factory.mktemp("finished"))(*SHORT)).path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "test" / "arm" / "seed-0")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    assert invoke([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def state_of(run: Path) -> Any:
    """The learner's state on disk."""
    current = json.loads((run / "state" / "current.json").read_text())["folder"]
    return load_snapshot(run / "state" / current / "learner")[0]


def test_the_log_lists_every_update(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "log", str(finished))
    updates = [line for line in untimed(finished) if line["kind"] == "update"]
    assert found["head"] == len(updates) == 16
    versions = found["versions"][::-1]
    assert [entry["version"] for entry in versions] == list(range(1, 17)), "newest first"
    for entry, update in zip(versions, updates, strict=True):
        assert (entry["learned"], entry["task"]) == (update["trajectory"], "any")
        assert entry["kl"] == pytest.approx(update["update/kl"])
        assert entry["delta_norm"] == pytest.approx(update["constraint/delta_norm"])
        assert len(entry["top"]) == 3
    readings = {line["update"]: line for line in untimed(finished) if line["kind"] == "canaries"}
    changes = {entry["version"]: entry["canaries"] for entry in versions if entry["canaries"]}
    assert set(changes) == set(list(readings)[1:])
    assert changes[6]["tasks"] == pytest.approx(readings[6]["canary/loss_tasks"] - readings[3]["canary/loss_tasks"])
    assert invoke(["log", str(finished), "-n", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("v16 ")


def test_a_diff_says_what_moved(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "diff", str(finished), "v3", "v7", "--top", "100")
    history = History(finished / "ledger")
    was, now = history.coordinates(3), history.coordinates(7)
    assert found["distance"] == pytest.approx(distance(was, now))
    assert [entry["version"] for entry in found["learned"]] == [4, 5, 6, 7]
    assert len(found["features"]) == 16, "both sides of eight features"
    assert found["features"] == sorted(found["features"], key=lambda row: -row["change"])
    squares = sum(row["change"] ** 2 for row in found["features"])
    assert squares > 0
    back = diff_runs(finished, "7", "3", top=100)
    assert sum(row.change**2 for row in back.rows) == pytest.approx(squares)
    assert diff_runs(finished, "head", "v16").distance == 0.0
    assert diff_runs(finished, "base", "head").rows[0].before == 0.0, "it starts at zero"


def test_blame_of_a_feature_and_of_an_item(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feature = diff_runs(finished, "base", "head").rows[0].feature
    found = printed(capsys, "blame", str(finished), "--feature", str(feature))
    assert sum(share["amount"] for share in found["experiences"]) == pytest.approx(found["total"])
    assert all(len(share["versions"]) == 2 for share in found["experiences"]), "two phases"
    first = printed(capsys, "blame", str(finished), "--feature", str(feature), "--top", "2")["experiences"]
    assert first == found["experiences"][:2], "--top holds for JSON as for text"
    matrix = featcl.RunResult.load(finished).matrix
    item = next(iter(matrix.items["left"]))
    found = printed(capsys, "blame", str(finished), "--item", item)
    scores = matrix.items["left"][item]
    assert found["before"] == pytest.approx(scores[0], abs=1e-5)
    assert found["after"] == pytest.approx(scores[-1], abs=1e-5)
    assert sum(share["amount"] for share in found["experiences"]) == pytest.approx(found["total"], abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["log", "NOWHERE"], "not a run's folder"),
        (["diff", "RUN", "v3", "v99"], "no version v99; there are v1 to v16"),
        (["diff", "RUN", "three"], "version 'three': give v7, 7, base or head"),
        (["diff", "RUN", "v²"], "version 'v²': give v7, 7, base or head"),
        (["blame", "RUN", "--feature", "3/²"], "feature '3/²': give its number"),
        (["blame", "RUN"], "give either --feature ID or --item ID"),
        (["blame", "RUN", "--feature", "9999"], "feature 9999 is not among the chosen ones"),
        (["blame", "RUN", "--feature", "x"], "give its number"),
        (["blame", "RUN", "--item", "t999"], "no item 't999'"),
        (["revert", "RUN", "v99"], "no version v99"),
        (["rollback", "RUN", "v99"], "no version v99"),
    ],
)
def test_bad_input_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [a.replace("RUN", str(finished)).replace("NOWHERE", str(tmp_path)) for a in arguments]
    assert invoke(filled) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("featcl: error: ")


def test_pages_have_tables_and_plots(finished: Path, tmp_path: Path) -> None:
    feature = str(diff_runs(finished, "base", "head").rows[0].feature)
    for name, arguments in {
        "log": [], "diff": ["base", "v7"], "blame": ["--feature", feature],
    }.items():  # fmt: skip
        assert invoke([name, str(finished), *arguments, "--html", str(tmp_path / f"{name}.html")]) == 0
        page = (tmp_path / f"{name}.html").read_text()
        assert "data:image/png;base64," in page
        assert "<table>" in page
        assert "http" not in page.replace("http-equiv", ""), "no network"
    assert invoke(["log", str(finished), "--html", str(tmp_path)]) == 2


def test_revert_takes_one_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = History(run / "ledger")
    head, update = before.coordinates(16), before.move(5)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    found = printed(capsys, "revert", str(run), "v5", "--measure")
    assert (found["version"], found["of"], found["how"], found["later"]) == (17, 5, "exact", 11)
    history = History(run / "ledger")
    now = history.coordinates(17)
    for name in head:
        expected = head[name].double() - (update.after[name].double() - update.before[name].double())
        torch.testing.assert_close(now[name].double(), expected, rtol=0, atol=1e-6)
    assert same(state_of(run).coordinates, now)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() != adapter
    assert len(found["also"]) == 1, "the second phase learned from it too"
    assert history.record(found["also"][0])["trajectories"] == found["trajectories"]
    measured = found["distance_to_never_seen"]
    assert measured["kept"] > 0
    assert measured["ratio"] == pytest.approx(measured["reverted"] / measured["kept"])
    assert log_run(run).entries[0].learned == "revert of v5"
    with pytest.raises(FeatclError, match="v5 was already taken back, by v17; to put it in again, revert v17"):
        revert_run(run, "5")
    assert rollback_run(run, "16").undone == 1
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter, "back to the last bit"


def test_a_revert_can_be_taken_back(run: Path) -> None:
    head = History(run / "ledger").coordinates(16)
    revert_run(run, "v5")
    with pytest.raises(FeatclError, match="v17 is itself a revert, of v5: there is no experience to leave out"):
        revert_run(run, "v17", measure=True)
    done = revert_run(run, "v17")
    assert (done.reverted.version, done.learned, done.also) == (18, (), ())
    assert "v17 (a revert) subtracted; the head is v18" in str(done)
    now = state_of(run).coordinates
    assert all(torch.allclose(now[name], tensor, rtol=0, atol=2e-7) for name, tensor in head.items())
    with pytest.raises(FeatclError, match="v17 was already taken back, by v18"):
        revert_run(run, "v17")
    assert revert_run(run, "v5").reverted.version == 19, "it is in again, so it can be taken back again"


def test_what_was_measured_before_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Summary and report are of the old head: both name what was done since, and the commands tell."""
    before = json.loads((run / "summary.json").read_text())
    assert "Changed by hand" not in (run / "report.html").read_text()
    told = printed(capsys, "revert", str(run), "v5")["stale"]
    assert told == printed(capsys, "rollback", str(run), "v14")["stale"]
    assert "R.json and summary.json still tell what was measured before, and report.html says so" in told
    after = json.loads((run / "summary.json").read_text())
    done = ["revert v5; the head is v17 now", "rollback to v14; the head is v14 now"]
    assert after == {**before, "changed_by_hand": done}
    page = (run / "report.html").read_text()
    for what in done:
        assert (
            f"Changed by hand after these numbers were measured: {what}; adapter/ and state/ are of that head." in page
        )
    assert featcl.RunResult.load(run).summary["metrics"] == before["metrics"]


def test_rollback_is_exact_also_beyond_what_is_kept(run: Path) -> None:
    expected = {}
    experiment = rebuilt(run)
    replay(experiment, each=lambda stats: expected.update({stats.version: experiment.learner.present}))
    for version, remade in ((14, False), (3, True)):
        done = rollback_run(run, f"v{version}")
        assert (done.new, done.remade) == (version, remade)
        state = state_of(run)
        assert same(state.coordinates, expected[version].coordinates)
        assert state.moments.keys() == expected[version].moments.keys()
        assert all(torch.equal(value, expected[version].moments[name]) for name, value in state.moments.items())
        assert History(run / "ledger").head == version
    with pytest.raises(FeatclError, match="it was rolled back"):
        rollback_run(run, "v14")
    assert [entry.version for entry in log_run(run).entries] == [3, 2, 1]
    everything = log_run(run, everything=True).entries
    assert sum(not entry.on_line for entry in everything) == 13
    assert "rollback to v3" in " ".join(entry.learned for entry in everything)


def test_rollback_to_the_base(run: Path) -> None:
    finished = str(rollback_run(run, "base"))
    assert all(not tensor.any() for tensor in state_of(run).coordinates.values())
    assert "R.json and summary.json still tell what was measured before" in finished
    (run / "summary.json").unlink()  # as of a run that has not finished
    again = rollback_run(run, "base")
    assert "R.json" not in str(again)
    assert again.to_json()["stale"] is None
    assert not (run / "summary.json").exists()


def test_an_interrupted_run_goes_on_from_where_it_was_rolled_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(home, tmp_path)(*SHORT)
    stop_after(config, 6, monkeypatch)
    rollback_run(config.folder, "v4")
    revert_run(config.folder, "v2")
    result = featcl.run(config)
    history = History(result.path / "ledger")
    assert history.record(5)["kind"] == "revert"
    assert result.summary["updates"] == history.head == 16 - 6 + 5, "ten more experiences after v5"
    assert same(state_of(result.path).coordinates, history.coordinates(history.head))
    with pytest.raises(FeatclError, match=r"v5 came after 'revert of v2' \(or is it\).*; versions up to v4 can"):
        rollback_run(result.path, "v5")  # kept no more, and no learning of the stream makes it


def test_a_killed_run_is_edited_as_its_checkpoint_knows_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has two versions more than the checkpoint: they are forgotten, and nothing is measured from them."""
    config = make_config(home, tmp_path)(*SHORT, "checkpoint={updates: 4, seconds: 1000}")
    stop_after(config, 6, monkeypatch, error=SystemExit)
    ledger = config.folder / "ledger"
    position = json.loads(next(config.folder.glob("state/0*/session.json")).read_text())["ledger"]
    assert (position["head"], History(ledger).head) == (4, 6)
    before = {path.name: path.read_bytes() for path in ledger.iterdir()}
    with pytest.raises(FeatclError, match="no version v6; there are v1 to v4"):
        revert_run(config.folder, "v6")
    assert {path.name: path.read_bytes() for path in ledger.iterdir()} == before, "nothing was changed"
    done = revert_run(config.folder, "v4", measure=True)
    assert (done.reverted.version, done.reverted.later) == (5, 0)
    assert done.distances is not None
    assert done.distances.ratio < 1e-4, "nothing came after it, so it is as if it was never seen"
    assert History(ledger).record(5)["kind"] == "revert"


def stop_after(
    config: RunConfig, updates: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt
) -> None:
    """Run until so many updates were made, then stop as on Ctrl-C; with another error, as if it was killed."""
    observe: Callable[..., Any] = Learner.observe

    def stopping(self: Learner, trajectory: Any) -> Any:
        if self.version == updates:
            raise error
        return observe(self, trajectory)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "observe", stopping)
        with pytest.raises(error):
            featcl.run(config)


def test_a_run_that_a_guard_stopped_and_that_went_on_is_made_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update after which it stopped was made; what comes after it too."""
    observe: Callable[..., Any] = Learner.observe
    known = True

    def stopping(self: Learner, trajectory: Any) -> Any:
        stats = observe(self, trajectory)
        if stats.version == 3:
            stop = Stopped("forgetting")
            stop.stats = stats if known else None
            raise stop
        return stats

    monkeypatch.setattr(Learner, "observe", stopping)
    experiment = rebuilt(finished)
    replay(experiment, updates=5)
    assert same(experiment.learner.adapter.coordinates(), History(finished / "ledger").coordinates(5))
    known = False
    with pytest.raises(Stopped):  # the control: stopped before there was an update
        replay(rebuilt(finished), updates=5)


def test_a_damaged_ledger_is_an_error_of_one_line(run: Path) -> None:
    path = run / "ledger" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"version":3', '"version":4'))
    with pytest.raises(FeatclError, match=r"ledger\.jsonl:\d+: this line was changed"):
        log_run(run)


def test_blame_needs_what_the_run_had(run: Path) -> None:
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps({**env, "model_digest": "another"}))
    with pytest.raises(FeatclError, match="the model is not the one that this run had"):
        blame_run(run, item="t1")


def test_what_is_in_no_stream_cannot_be_learned_again(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["stream"]["limit"] = 1
    env = json.loads((run / "env.json").read_text())
    plain = {key: value for key, value in config.items() if key != "digest"}
    (run / "config.json").write_text(json.dumps({**plain, "digest": RunConfig.from_dict(plain).digest}))
    (run / "env.json").write_text(json.dumps({k: v for k, v in env.items() if not k.endswith("_digest")}))
    with pytest.raises(FeatclError, match="which is not in the config's stream"):
        revert_run(run, "v2", measure=True)
