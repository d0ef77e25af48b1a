"""Jobs whose nodes train as replicas end as if Slurm had not taken a node away.

test_replica_jobs.py has more such losses, without training.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ptune_dist.run.metrics_log import read_metrics
from tests.cluster.runs import PATIENCE_S, Run
from tests.cluster.slurm import Cluster
from tests.commands import run_command

STEPS = 200
SECTIONS = {
    "train": {"max_steps": STEPS, "nodes": "replicas", "num_blocks": 4, "micro_batch_tokens": 1024},
    "checkpoint": {"every": 50, "keep": 3},
}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run on one node without Slurm."""
    run = Run(cluster, tmp_path_factory.mktemp("runs") / "undisturbed", **SECTIONS)
    done = run_command("train", str(run.config))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    yield Run(cluster, tmp_path / "replicas", **SECTIONS)
    for node in cluster.nodes:  # not all come back by themselves
        cluster.ask("scontrol", "update", f"nodename={node}", "state=resume", check=False)


def set_down(cluster: Cluster, node: str) -> None:
    cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def wait_for_nodes(run: Run, number: int) -> None:
    """Wait for a step that was made by so many nodes."""

    def are_there() -> bool:
        assert run.status.get("state") != "done", run.describe()
        return bool(run.num_lines) and read_metrics(run.dir)[-1]["num_nodes"] == number

    run.wait_for(are_there, PATIENCE_S, f"a step of {number} nodes")


@pytest.mark.long
@pytest.mark.extended
def test_a_job_with_no_kill_continues_without_a_node_that_is_set_down(cluster: Cluster, run: Run, undisturbed: Run):
    run.submit(nodes="", options=["--nodes=1-3", "--no-kill"])
    wait_for_nodes(run, 3)
    set_down(cluster, "n2")
    wait_for_nodes(run, 2)
    assert cluster.state(run.job) == "RUNNING" and cluster.facts(run.job)["NodeList"] == "n[0-1]"
    run.wait_for_end("COMPLETED")
    assert "Node failure on n2" in run.log and cluster.facts(run.job)["Restarts"] == "0"
    assert (run.status["state"], run.status["restarts"]) == ("done", 0)
    run.assert_bitwise(undisturbed, STEPS)


@pytest.mark.long
@pytest.mark.extended
def test_jobs_of_an_array_are_nodes_of_one_run_and_one_that_is_lost_comes_back(
    cluster: Cluster, run: Run, undisturbed: Run
):
    """The other one waits for it."""
    run.submit("train.min_nodes=2", nodes="", options=["--nodes=1", "--array=0-1", "--exclusive"])
    wait_for_nodes(run, 2)
    set_down(cluster, of_array(cluster, run.job, "NodeList")["0"])
    for task in ("0", "1"):
        cluster.until(
            lambda task=task: of_array(cluster, run.job, "JobState")[task] == "COMPLETED", PATIENCE_S, run.describe
        )
    assert of_array(cluster, run.job, "Restarts") == {"0": "1", "1": "0"} and run.status["restarts"] == 0
    run.assert_bitwise(undisturbed, STEPS)


def of_array(cluster: Cluster, job: str, key: str) -> dict[str, str]:
    """What scontrol shows of each job of an array, by its number."""
    lines = cluster.ask("scontrol", "--oneliner", "show", "job", job).splitlines()
    facts = [dict(word.partition("=")[::2] for word in line.split()) for line in lines]
    return {each["ArrayTaskId"]: each[key] for each in facts}
