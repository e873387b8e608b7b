"""`featcl sweep` with real submitit workers on tiny models: what is run, what is not, failures, Ctrl-C, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import featcl
from featcl import cli
from featcl.errors import FeatclError
from featcl.studies.arms import study_arms
from featcl.studies.sharing import DEATHS, Ended, Run, SharedRuns
from featcl.studies.sweep import SweepResult, planned, sweep
from tests.runs import make_home
from tests.studies.sweeps import ENOUGH, make_study, results_of, run_one_by_one, wait_until, workers_at_work

pytest.importorskip("sae_lens", reason="sae-lens is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs read."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def study(home: Path, tmp_path: Path) -> Path:
    return make_study(home, tmp_path)


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """Configs here compute with one thread; afterwards there are as many as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(study: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a shell starts it."""
    command = [sys.executable, "-m", "featcl", "sweep", str(study), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("threads")
def test_a_sweep_runs_what_is_missing_and_reports_what_fails(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "broken.yaml").write_text("base: base.yaml\nfeatures: {sae: nowhere/at/all}\n")
    featcl.run(study_arms(study)[0].with_seed(0))
    done: SweepResult = sweep(study, jobs=2)
    assert done.skipped == ("base.seed-0",)
    assert set(done.finished) == {"plain.seed-0"}
    assert set(done.failed) == {"broken.seed-0"}
    assert "nowhere/at/all" in done.failed["broken.seed-0"]
    assert (done.left, done.workers, done.jobs, done.complete) == ((), (), 2, False)
    assert "2 of 2 done, 1 of them failed, 0 running, 0 left" in capsys.readouterr().err
    assert done.table is not None
    assert [row["seeds"] for row in done.table.rows] == [[0], [], [0]]
    (study / "broken.yaml").unlink()
    apart = run_one_by_one(study, tmp_path / "apart", seeds=(0,))
    assert results_of(study, tmp_path / "results") == apart, "workers change nothing"
    tables = []
    for command in ("sweep", "table"):
        for path in (tmp_path / "results" / "demo").glob("table.*"):
            path.unlink()
        output = str(tmp_path / "results")
        assert cli.invoke([command, str(study), "--output", output, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [row["arm"] for row in (found["table"] if command == "sweep" else found)] == ["base", "plain"]
        tables.append([(path.name, path.read_bytes()) for path in sorted(Path(output, "demo").glob("table.*"))])
    assert len(tables[0]) == 2
    assert tables[0] == tables[1], "to the last byte"
    again = sweep(study)
    assert (again.complete, again.jobs, again.folder, len(again.skipped)) == (True, 0, None, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_interrupted_killed_and_started_again_is_the_same(study: Path, tmp_path: Path) -> None:
    """Ctrl-C, then SIGKILL of a worker and of the sweep itself; each time the same command goes on."""
    results, arguments = tmp_path / "results", ("--seeds", "0,1", "--jobs", "2")
    first = start(study, *arguments)
    wait_until(lambda: workers_at_work(results) or first.poll() is not None)
    working = workers_at_work(results)
    assert working
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to all of the group, submitit's processes included
    out, err = first.communicate(timeout=ENOUGH)
    assert (first.returncode, out) == (130, ""), err
    assert f"featcl: interrupted; the states are saved in {results / 'demo'}" in err
    assert not any(map(alive, working)), "no worker is left behind"
    assert len(results_of(study, results)) < 4
    assert list(results.rglob("state/current.json"))

    second = start(study, *arguments)
    wait_until(lambda: workers_at_work(results) or second.poll() is not None)
    working = workers_at_work(results)
    assert working
    os.kill(working[0], signal.SIGKILL)
    second.kill()
    second.communicate(timeout=ENOUGH)
    assert len(results_of(study, results)) < 4

    third = start(study, *arguments)  # while the other worker may still be saving its state
    _, err = third.communicate(timeout=ENOUGH)
    assert third.returncode == 0, err
    assert not any(map(alive, working))
    assert results_of(study, results) == run_one_by_one(study, tmp_path / "apart")
    resumed = [json.loads(path.read_text()).get("resumed") for path in results.rglob("env.json")]
    assert any(resumed), "and something was in fact cut off"


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_a_run_whose_worker_is_killed_or_taken_away_goes_on_in_the_same_sweep(study: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    process = start(study, "--seeds", "0,1", "--jobs", "2")
    wait_until(lambda: workers_at_work(results) or process.poll() is not None)
    [taken, *_] = workers_at_work(results)
    os.kill(taken, signal.SIGTERM)  # as a cluster does: submitit starts that worker again
    wait_until(lambda: not alive(taken))
    wait_until(lambda: set(workers_at_work(results)) - {taken} or process.poll() is not None)
    [killed, *_] = set(workers_at_work(results)) - {taken}
    os.kill(killed, signal.SIGKILL)  # the other worker takes its run over
    out, err = process.communicate(timeout=ENOUGH)
    assert process.returncode == 0, err
    assert "died; its log: " in err
    logs = "".join(path.read_text() for path in (results / "demo" / ".sweep").rglob("*_log.out"))
    assert "Calling checkpoint method" in logs + "".join(p.read_text() for p in results.rglob("*_log.err"))
    assert "base" in out
    assert results_of(study, results) == run_one_by_one(study, tmp_path / "apart")


def test_a_run_that_kills_its_workers_is_given_up(study: Path, tmp_path: Path) -> None:
    runs = planned(study_arms(study))
    shared = SharedRuns.create(tmp_path, runs)
    assert [run.config for run in shared.runs] == [run.config for run in runs]
    deadly, other = shared.runs
    assert all(shared.begin(deadly) for _ in range(DEATHS))
    assert not shared.begin(deadly)
    ended = shared.ended(deadly)
    assert ended is not None
    assert f"{DEATHS} workers died" in str(ended.error)
    assert shared.done(deadly)
    for _ in range(2 * DEATHS):  # those that leave in good order do not count
        assert shared.begin(other)
        shared.give_back(other)
    assert not shared.done(other)


def test_a_run_is_claimed_by_one_process_and_freed_by_its_death(study: Path, tmp_path: Path) -> None:
    shared = SharedRuns.create(tmp_path, planned(study_arms(study)))
    script = (
        "import sys, time\nfrom featcl.studies.sharing import SharedRuns\n"
        "shared = SharedRuns(sys.argv[1])\nwith shared.claimed(shared.runs[0]) as mine:\n"
        "    print(mine, flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(shared.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with shared.claimed(shared.runs[0]) as mine:
            assert not mine
        with shared.claimed(shared.runs[1]) as mine:
            assert mine
        process.kill()
    with shared.claimed(shared.runs[0]) as mine:
        assert mine
    assert shared.abandoned
    with shared.alive():
        assert not shared.abandoned


def test_results_of_another_config_are_neither_finished_nor_replaced_unasked(study: Path) -> None:
    [run, _] = planned(study_arms(study))
    other = Run(run.config.model_copy(update={"model": "another"}))
    folder = run.config.folder
    folder.mkdir(parents=True)
    assert not run.finished
    assert not run.foreign
    (folder / "config.json").write_text(json.dumps({"digest": other.config.digest}))
    (folder / "summary.json").write_text(json.dumps({"config_digest": other.config.digest}))
    assert (run.finished, run.foreign) == (False, True)
    assert (other.finished, other.foreign) == (True, False)
    (folder / "summary.json").write_text("{torn")
    assert not other.finished


def test_runs_with_overrides_do_not_go_among_results_of_the_plain_study(study: Path, tmp_path: Path) -> None:
    [run, _] = planned(study_arms(study))
    run.config.folder.mkdir(parents=True)
    (run.config.folder / "config.json").write_text(json.dumps({"digest": run.config.digest}))
    with pytest.raises(FeatclError, match=r"holds results of other configs under 1 of these names \(base\.seed-0\)"):
        sweep(study, overrides=["features.k=2"])
    assert not list((tmp_path / "results").rglob(".sweep")), "nothing is begun"
    elsewhere = planned(study_arms(study, ["features.k=2"]), output=str(tmp_path / "other"))
    assert not any(each.foreign for each in elsewhere)
    assert {each.config.features.k for each in elsewhere} == {2}


def test_what_became_of_a_run_is_read_back(study: Path, tmp_path: Path) -> None:
    shared = SharedRuns.create(tmp_path, planned(study_arms(study)))
    assert shared.ended(shared.runs[0]) is None
    shared.begin(shared.runs[0])
    assert shared.running_since(shared.runs[0])
    ended = Ended("why", 3, 1.0, 2.5)
    shared.end(shared.runs[0], ended)
    assert shared.ended(shared.runs[0]) == ended
    assert shared.running_since(shared.runs[0]) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launcher": "cloud"}, "--launcher 'cloud': there is local and slurm"),
        ({"jobs": 0}, "--jobs 0: at least one worker is needed"),
        ({"options": {"partition": "gpu"}}, "--slurm KEY=VALUE belongs to --launcher slurm"),
        ({"arms": ["bace"]}, "no arm 'bace'; there are base, plain"),
        ({"seeds": [0, 0]}, "give different whole numbers"),
    ],
)
def test_bad_input_before_anything_is_begun(study: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(FeatclError, match=message):
        sweep(study, **settings)  # type: ignore[arg-type]
    assert not (study.parent / "results").exists()


@pytest.mark.slow
def test_the_benchmark_of_sweeping_runs(study: Path, root: Path) -> None:
    """Its numbers mean nothing at this size."""
    command = [sys.executable, str(root / "scripts" / "bench" / "sweep.py"), "--study", str(study)]
    done = subprocess.run([*command, "--runs", "2", "--jobs", "1"], capture_output=True, text=True, timeout=ENOUGH)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["runs"], record["jobs"], record["failed"]) == (2, 1, 0)
    parts = record["seconds_per_run"]
    assert parts["run"] > max(parts["learning"], parts["set-up"], parts["close"]) > 0
    assert parts["learning"] > parts["base"] > 0
    assert 0 <= record["between"] < record["per_arm"]
    assert record["launch"] > 0
