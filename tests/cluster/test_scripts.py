"""slurm/sweep.sbatch and slurm/bench.sbatch, as users submit them."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import PATIENCE_S
from tests.cluster.slurm import Cluster
from tests.commands import run_command
from tests.conftest import write_config
from tests.processes import process_env

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
