"""slurm/*.sbatch as users submit them. tests/cluster/test_jobs.py has slurm/train.sbatch with real training."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import PATIENCE_S
from tests.cluster.slurm import Cluster
from tests.commands import run_command
from tests.conftest import write_config
from tests.processes import ROOT, process_env

ENDED = ["COMPLETED", "FAILED", "CANCELLED"]


@pytest.fixture
def env() -> dict[str, str]:
    return process_env({"PTUNE_PYTHON": sys.executable, "PTUNE_PROCS": "1"})


def array_states(cluster: Cluster, job: str) -> list[str]:
    """The states of all jobs of an array."""
    words = cluster.ask("scontrol", "--oneliner", "show", "job", job).split()
    return [word.partition("=")[2] for word in words if word.startswith("JobState=")]


@pytest.mark.long
def test_each_job_of_an_array_trains_its_config_and_one_without_a_config_is_a_mistake(
    cluster: Cluster, tmp_path: Path, env: dict[str, str]
):
    configs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        configs.append(str(write_config(tmp_path / name / "config.json", train={"max_steps": 3})))
    assert run_command("train", configs[0]).returncode == 0  # the first job has nothing left to do, to save time
    job = cluster.submit(
        "slurm/sweep.sbatch", *configs, options=["--array=0-2", "--nodes=1", f"--output={tmp_path}/%a.log"], env=env
    )
    cluster.until(
        lambda: set(array_states(cluster, job)) <= set(ENDED), PATIENCE_S, lambda: cluster.describe(job, ENDED)
    )
    assert sorted(array_states(cluster, job)) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert f"{tmp_path}/a/run is finished" in (tmp_path / "0.log").read_text()
    assert json.loads((tmp_path / "b" / "run" / "summary.json").read_text())["steps"] == 3
    assert "no config number 2 among 2" in (tmp_path / "2.log").read_text()


def test_a_matrix_of_benchmarks_runs_and_writes_its_result(cluster: Cluster, tmp_path: Path, env: dict[str, str]):
    side = "{python} -c \"import json; json.dump({'samples_per_s': 1.5}, open('{result}', 'w'))\""
    matrix = {"name": "m", "sides": {"one": side}, "repeats": 1, "cases": [{"name": "c"}]}
    (tmp_path / "matrix.yaml").write_text(json.dumps(matrix))
    job = cluster.submit("slurm/bench.sbatch", str(tmp_path / "matrix.yaml"), str(tmp_path / "out"), env=env)
    cluster.wait(job, ENDED, PATIENCE_S)
    assert cluster.state(job) == "COMPLETED", cluster.log(job)
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["cases"][0]["sides"]["one"]["samples_per_s"]["median"] == 1.5


def test_a_script_submitted_from_another_directory_is_a_mistake(cluster: Cluster, tmp_path: Path, env: dict[str, str]):
    job = cluster.submit(
        "slurm/train.sbatch", "x.yaml", options=[f"--chdir={tmp_path}"], env=env | {"PTUNE_HOME": os.devnull}
    )
    cluster.wait(job, ENDED, PATIENCE_S)
    assert "submit from the repository's root, or set PTUNE_HOME" in cluster.log(job)


# In place of launch/run.sh: a step that saves on a request to stop, and an answer that repeats srun's status.
LAUNCHER = """#!/usr/bin/env python3
import signal, sys, time
if sys.argv[1] == "--may-requeue":
    sys.exit(int(sys.argv[2]))
if sys.argv[1] == "--show-nodes":
    print("one_world")
    sys.exit()
received = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(number))
print("training", flush=True)
while not received:
    time.sleep(0.05)
time.sleep(1)
print("saved", flush=True)
sys.exit(75)
"""


def write_launcher(folder: Path) -> Path:
    """A folder for PTUNE_HOME."""
    run = folder / "launch" / "run.sh"
    run.parent.mkdir()
    run.write_text(LAUNCHER)
    run.chmod(0o755)
    (folder / "slurm").mkdir()
    (folder / "slurm" / "train.sbatch").write_bytes((ROOT / "slurm" / "train.sbatch").read_bytes())
    return folder


def wait_for_starts(cluster: Cluster, job: str, number: int) -> None:
    """Wait until launchers have started `number` times."""
    cluster.until(lambda: cluster.log(job).count("training") == number, 60, lambda: cluster.describe(job, number))


def test_a_signal_to_the_batch_script_reaches_the_ranks_and_requeues_the_job_unless_it_is_canceled(
    cluster: Cluster, tmp_path: Path, env: dict[str, str]
):
    """`scancel --full --signal=USR2`, `--signal=B:USR2@300`, its form for an array, and plain `scancel`."""
    env |= {"PTUNE_HOME": str(write_launcher(tmp_path))}
    options = ["--nodes=2", "--ntasks-per-node=1"]
    full, batch, canceled = (cluster.submit("slurm/train.sbatch", "c.yaml", options=options, env=env) for _ in range(3))
    jobs = [full, batch, canceled]
    for job in jobs:
        cluster.until(
            lambda job=job: cluster.log(job).count("training") == 2, 60, lambda job=job: cluster.describe(job, 2)
        )
    cluster.cancel(full, "USR2", "--full")
    cluster.cancel(batch, "USR2", "--batch")
    cluster.cancel(canceled)
    for job in (full, batch):
        cluster.wait(job, ["PENDING"], 20)
        assert cluster.log(job).count("saved") == 2, cluster.log(job)
    cluster.wait(canceled, ["CANCELLED"], 20)
    assert cluster.log(canceled).count("saved") == 2
    assert "not requeueing: Slurm has ended the job" in cluster.log(canceled)
    for job in (full, batch):
        cluster.until(
            lambda job=job: cluster.log(job).count("training") == 4, 30, lambda job=job: cluster.describe(job, 4)
        )
        assert cluster.facts(job)["Restarts"] == "1"
    assert cluster.state(canceled) == "CANCELLED" and cluster.log(canceled).count("training") == 2


@pytest.mark.extended
def test_one_job_of_an_array_is_requeued_without_the_others(cluster: Cluster, tmp_path: Path, env: dict[str, str]):
    """The last job of an array to start has the id of the array, by which scontrol would requeue all of them."""
    env |= {"PTUNE_HOME": str(write_launcher(tmp_path))}
    options = ["--array=0-1", "--nodes=1", f"--output={tmp_path}/%a.log"]
    job = cluster.submit("slurm/sweep.sbatch", "a.yaml", "b.yaml", options=options, env=env)
    logs = [tmp_path / "0.log", tmp_path / "1.log"]

    def starts() -> list[int]:
        return [log.read_text().count("training") if log.exists() else 0 for log in logs]

    cluster.until(lambda: starts() == [1, 1], 60, lambda: cluster.describe(job, "both started"))
    ids = dict(
        re.findall(r"JobId=(\d+) ArrayJobId=\d+ ArrayTaskId=(\d+)", cluster.ask("scontrol", "-o", "show", "job", job))
    )
    cluster.cancel(f"{job}_{ids[job]}", "USR2", "--batch")
    expected = [2 if str(task) == ids[job] else 1 for task in range(2)]
    cluster.until(lambda: starts() == expected, 30, lambda: f"{starts()}: {[log.read_text() for log in logs]}")
    assert "saved" not in logs[1 - int(ids[job])].read_text()
