"""Workers on a cluster, as far as a machine without Slurm goes: the submission, its array, and queueing again.

`sbatch`, `srun`, `scontrol` and `sacct` are small scripts that run the array's tasks here as Slurm would.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featcl.errors import FeatclError
from featcl.studies.launch import check_launcher, default_jobs, launch, read_options, threads_of, visible_devices
from featcl.studies.sharing import SharedRuns
from featcl.studies.worker import Worker
from tests.runs import make_home
from tests.studies.sweeps import ENOUGH, make_study, wait_until, workers_at_work

SCRIPTS = {
    # Runs every task of the array in the background, and again as often as `scontrol requeue` asks for.
    "sbatch": """
cp "$1" "$FAKE/submission.sh"
count=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
for task in $(seq 0 ${count:-0}); do
  (export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
   if [ -n "$count" ]; then
     export SLURM_JOB_ID=$((100 + task)) SLURM_ARRAY_JOB_ID=100 SLURM_ARRAY_TASK_ID=$task; queued=requeue-100_$task
   else
     export SLURM_JOB_ID=100; queued=requeue-100
   fi
   bash "$1"
   while [ -e "$FAKE/$queued" ]; do rm "$FAKE/$queued"; bash "$1"; done) > "$FAKE/log-$task" 2>&1 < /dev/null &
done
echo Submitted batch job 100
""",
    "srun": 'while [ "${1#--}" != "$1" ]; do case $1 in --output|--error) shift;; esac; shift; done; exec "$@"\n',
    "scontrol": 'echo "$@" >> "$FAKE/asked"; touch "$FAKE/requeue-$2"\n',
    "sacct": "echo 'JobID|State|NodeList'\n",
    "scancel": 'echo "$@" >> "$FAKE/asked"\n',
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with what stands in for Slurm."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in SCRIPTS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    return folder


def empty_list(place: Path) -> SharedRuns:
    """A list on which nothing is left to do."""
    return SharedRuns.create(place / "results" / "demo", [])


def test_the_submission_is_a_job_array(slurm: Path, tmp_path: Path) -> None:
    shared = empty_list(tmp_path)
    options = {"partition": "gpu", "time": 30, "gpus_per_node": 2, "cpus_per_task": 6}
    jobs = launch(shared, launcher="slurm", jobs=3, options=options)
    assert [job.job_id for job in jobs] == ["100_0", "100_1", "100_2"]
    script = (slurm / "submission.sh").read_text()
    for line in ("--array=0-2%3", "--partition=gpu", "--time=30", "--gpus-per-node=2", "--cpus-per-task=6",
                 "--signal=USR2@90", "--open-mode=append", "--job-name=featcl"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert [job.result() for job in jobs] == ["nothing left"] * 3
    workers = [job.submission().function for job in jobs]
    assert [(worker.number, worker.local, worker.device) for worker in workers] == [(n, False, None) for n in range(3)]


@pytest.mark.slow
def test_a_worker_that_is_taken_away_is_queued_again(slurm: Path, tmp_path: Path) -> None:
    """The signal that Slurm sends before a time limit: the state is saved, the job queued again, the run goes on."""
    study, results = make_study(make_home(tmp_path / "home"), tmp_path), tmp_path / "results"
    command = [sys.executable, "-m", "featcl", "sweep", str(study), "--arms", "plain", "--launcher", "slurm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sweep:
        wait_until(lambda: workers_at_work(results) or sweep.poll() is not None)
        [worker] = workers_at_work(results)
        os.kill(worker, signal.SIGUSR2)
        out, err = sweep.communicate(timeout=ENOUGH)
    assert sweep.returncode == 0, err
    assert (slurm / "asked").read_text() == "requeue 100\n"
    assert "plain" in out
    [env] = results.rglob("env.json")
    assert len(json.loads(env.read_text())["resumed"]) == 1
    logs = (slurm / "log-0").read_text()
    assert "Calling checkpoint method" in logs
    assert "going on after" in logs


def test_checkpoint_is_the_same_worker_again() -> None:
    worker = Worker(Path("sweep"), 2, None, None, local=False)
    again = worker.checkpoint()
    assert again.function == worker
    assert not again.done()
    assert pickle.loads(pickle.dumps(worker)) == worker


def test_without_slurm_it_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FeatclError, match='--launcher slurm: Could not detect "srun"'):
        launch(empty_list(tmp_path), launcher="slurm", jobs=1)


@pytest.mark.usefixtures("slurm")
def test_an_option_that_sbatch_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match="Unknown argument 'partitoin' for executor 'slurm'"):
        launch(empty_list(tmp_path), launcher="slurm", jobs=1, options={"partitoin": "gpu"})


def test_options_are_read_as_yaml() -> None:
    assert read_options(["partition=gpu", "time=30", "exclusive=true"]) == {
        "partition": "gpu", "time": 30, "exclusive": True,
    }  # fmt: skip
    for wrong in ("partition", "=3", "a={"):
        with pytest.raises(FeatclError, match="--slurm"):
            read_options([wrong])
    with pytest.raises(FeatclError, match="there is local and slurm"):
        check_launcher("lsf", jobs=None, options=None)


def test_threads_and_devices_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [threads_of(jobs) for jobs in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of(2) == 3, "what is asked for explicitly"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, MIG-abc")
    assert visible_devices() == ("4", "MIG-abc")
    assert (default_jobs("local"), default_jobs("slurm")) == (2, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_devices() == ()
    assert default_jobs("local") == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_devices() == ("0", "1")


def test_each_local_worker_has_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    shared = empty_list(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with shared.alive():
        jobs = launch(shared, launcher="local", jobs=3)
        assert [job.submission().function.device for job in jobs] == ["5", "7", "5"]
        assert [job.result() for job in jobs] == ["nothing left"] * 3
    assert signal.getsignal(signal.SIGINT) is before
