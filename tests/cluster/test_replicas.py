"""Jobs whose nodes train as replicas: a node that Slurm takes away does not end them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ptune_dist.run.metrics_log import read_metrics
from tests.cluster.runs import PATIENCE_S, Run
from tests.cluster.slurm import Cluster

STEPS = 500
SECTIONS = {
    "train": {"max_steps": STEPS, "nodes": "replicas", "num_blocks": 4, "micro_batch_tokens": 1024},
    "checkpoint": {"every": 50, "keep": 3},
}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run on one node without Slurm."""
    run = Run(cluster, tmp_path_factory.mktemp("runs") / "undisturbed", **SECTIONS)
    run.train_without_slurm(num_nodes=1)
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
def test_a_job_that_loses_the_node_of_its_batch_script_trains_to_the_end_and_is_queued_again(
    cluster: Cluster, run: Run, undisturbed: Run
):
    """The second start finds a finished run. Slurm takes 50 s to give up on the node."""
    run.submit(nodes="", options=["--nodes=1-3", "--no-kill"])
    wait_for_nodes(run, 3)
    cluster.cut_node("n0")
    wait_for_nodes(run, 2)
    run.wait_for(lambda: run.status["state"] == "done", PATIENCE_S, "the end of the run")
    run.wait_for_end("COMPLETED")
    assert cluster.facts(run.job)["Restarts"] == "1"
    assert "node n0, on which the batch script ran, is lost: queueing job" in log_of_nodes(run)
    run.assert_bitwise(undisturbed, STEPS)


def log_of_nodes(run: Run) -> str:
    """What the nodes of the second start have not overwritten."""
    return run.log + "".join(file.read_text() for file in (run.dir / "logs").iterdir())


@pytest.mark.long
@pytest.mark.extended
def test_jobs_of_an_array_are_nodes_of_one_run_and_one_that_is_lost_comes_back(
    cluster: Cluster, run: Run, undisturbed: Run
):
    run.submit(nodes="", options=["--nodes=1", "--array=0-1", "--exclusive"])
    wait_for_nodes(run, 2)
    nodes = {name: node for name, node in array_nodes(cluster, run.job).items()}
    set_down(cluster, nodes["0"])
    wait_for_nodes(run, 1)
    wait_for_nodes(run, 2)
    for task in ("0", "1"):
        cluster.until(lambda task=task: states(cluster, run.job)[task] == "COMPLETED", PATIENCE_S, run.describe)
    run.assert_bitwise(undisturbed, STEPS)
    assert sorted(path.name.rpartition("-")[2] for path in (run.dir / "launchers").glob("n*"))[-1] == "1"


def array_facts(cluster: Cluster, job: str) -> list[dict[str, str]]:
    lines = cluster.ask("scontrol", "--oneliner", "show", "job", job).splitlines()
    return [dict(word.partition("=")[::2] for word in line.split()) for line in lines]


def array_nodes(cluster: Cluster, job: str) -> dict[str, str]:
    return {facts["ArrayTaskId"]: facts["NodeList"] for facts in array_facts(cluster, job)}


def states(cluster: Cluster, job: str) -> dict[str, str]:
    return {facts["ArrayTaskId"]: facts["JobState"] for facts in array_facts(cluster, job)}
