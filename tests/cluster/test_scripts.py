"""slurm/sweep.sbatch and slurm/bench.sbatch, as people submit them."""

import json
import os
import sys

import pytest

from tests.conftest import write_config
from tests.processes import process_env

END = ["COMPLETED", "FAILED", "CANCELLED"]


@pytest.fixture
def env(tmp_path):
    return process_env({"PTUNE_PYTHON": sys.executable, "PTUNE_PROCS": "1"})


def array_states(cluster, job: str) -> list[str]:
    told = cluster.ask("scontrol", "--oneliner", "show", "job", job).splitlines()
    return [word.partition("=")[2] for line in told for word in line.split() if word.startswith("JobState=")]


def test_an_array_trains_a_config_in_each_of_its_jobs_and_a_number_too_many_is_a_mistake(cluster, tmp_path, env):
    configs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        configs.append(str(write_config(tmp_path / name / "config.json", train={"max_steps": 3})))
    job = cluster.submit(
        "slurm/sweep.sbatch", *configs, options=["--array=0-2", "--nodes=1", f"--output={tmp_path}/%a.log"], env=env
    )
    cluster.until(lambda: set(array_states(cluster, job)) <= set(END), 90, lambda: cluster.told(job, END))
    assert sorted(array_states(cluster, job)) == ["COMPLETED", "COMPLETED", "FAILED"]
    for name in ("a", "b"):
        assert json.loads((tmp_path / name / "run" / "summary.json").read_text())["steps"] == 3
    assert "no config number 2 among 2" in (tmp_path / "2.log").read_text()


def test_a_matrix_of_benchmarks_runs_and_leaves_its_result(cluster, tmp_path, env):
    side = "{python} -c \"import json; json.dump({'samples_per_s': 1.5}, open('{result}', 'w'))\""
    matrix = {"name": "m", "sides": {"one": side}, "repeats": 1, "cases": [{"name": "c"}]}
    (tmp_path / "matrix.yaml").write_text(json.dumps(matrix))
    job = cluster.submit("slurm/bench.sbatch", str(tmp_path / "matrix.yaml"), str(tmp_path / "out"), env=env)
    cluster.wait(job, END, 60)
    assert cluster.state(job) == "COMPLETED", cluster.log(job)
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["cases"][0]["sides"]["one"]["samples_per_s"]["median"] == 1.5


def test_a_script_that_is_submitted_from_elsewhere_says_so(cluster, tmp_path, env):
    job = cluster.submit(
        "slurm/train.sbatch", "x.yaml", options=[f"--chdir={tmp_path}"], env=env | {"PTUNE_HOME": os.devnull}
    )
    cluster.wait(job, END, 30)
    assert "submit from the repository's root, or set PTUNE_HOME" in cluster.log(job)
