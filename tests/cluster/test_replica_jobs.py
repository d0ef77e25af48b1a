"""What becomes of a Slurm job of replicas when Slurm takes a node away. Real launchers, and ranks that only wait."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptune_dist.cluster.record import read_node_statuses
from tests.cluster.runs import PATIENCE_S, Run
from tests.cluster.slurm import Cluster
from tests.processes import python_path

NO_TORCH = Path(__file__).parent / "replicas_without_torch"


class Job(Run):
    """A job whose nodes show that they are there by touching a file."""

    def __init__(self, cluster: Cluster, folder: Path):
        super().__init__(cluster, folder, train={"max_steps": 9, "nodes": "replicas"})
        self.folder = folder

    def start(self, *options: str) -> None:
        env = {"PYTHONPATH": python_path(NO_TORCH), "PTUNE_TEST_FOLDER": self.folder, "PTUNE_PROCS": 1}
        self.submit(nodes="", options=list(options), **env)

    def there(self) -> set[str]:
        """The nodes that have been seen within the last seconds."""
        now = time.time()
        files = [path for path in self.folder.iterdir() if path.name.startswith("n")]
        return {path.name for path in files if now - path.stat().st_mtime < 3.0}

    def wait_until_there(self, *nodes: str) -> None:
        self.wait_for(lambda: self.there() == set(nodes), PATIENCE_S, f"{nodes}, not {self.there()}")

    def set_down(self, node: str) -> None:
        self.cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def finish(self) -> None:
        (self.folder / "finish").touch()

    def states(self) -> dict[str, str]:
        """Of the jobs of an array, by their number."""
        lines = self.cluster.ask("scontrol", "--oneliner", "show", "job", self.job).splitlines()
        facts = [dict(word.partition("=")[::2] for word in line.split()) for line in lines]
        return {each["ArrayTaskId"]: each["JobState"] for each in facts}


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path) -> Iterator[Job]:
    yield Job(cluster, tmp_path / "replicas")
    for node in cluster.nodes:  # not all come back by themselves
        cluster.ask("scontrol", "update", f"nodename={node}", "state=resume", check=False)


@pytest.mark.long
def test_a_job_with_no_kill_continues_without_a_node_that_is_set_down(cluster: Cluster, job: Job):
    job.start("--nodes=1-8", "--no-kill")
    job.wait_until_there("n0", "n1", "n2")
    assert job.log.count("trains among 3") == 3
    job.set_down("n2")
    job.wait_until_there("n0", "n1")
    assert cluster.state(job.job) == "RUNNING" and cluster.facts(job.job)["NodeList"] == "n[0-1]"
    job.finish()
    job.wait_for_end("COMPLETED")
    assert "Node failure on n2" in job.log and cluster.facts(job.job)["Restarts"] == "0"
    assert (job.status["state"], job.status["restarts"]) == ("done", 0)
    assert [status["state"] for status in read_node_statuses(job.dir)] == ["done", "done", "starting"]


@pytest.mark.extended
def test_a_job_of_an_array_that_loses_its_node_is_queued_again_and_its_signal_is_its_own(cluster: Cluster, job: Job):
    job.start("--nodes=1", "--array=0-1", "--exclusive")
    job.wait_until_there("n0-0", "n1-1")
    job.set_down("n0")
    job.wait_until_there("n1-1")
    cluster.until(lambda: len(job.there()) == 2, PATIENCE_S, lambda: str(job.states()))
    assert job.states() == {"0": "RUNNING", "1": "RUNNING"}
    cluster.cancel(f"{job.job}_1", "USR2", "--full")
    cluster.until(lambda: job.states()["1"] == "PENDING", PATIENCE_S, lambda: str(job.states()))
    assert job.states()["0"] == "RUNNING"
    cluster.until(lambda: len(job.there()) == 2, PATIENCE_S, lambda: str(job.states()))
    job.finish()
    cluster.until(lambda: set(job.states().values()) == {"COMPLETED"}, PATIENCE_S, lambda: str(job.states()))
    assert (job.status["state"], job.status["restarts"]) == ("done", 0)


@pytest.mark.long
@pytest.mark.extended
def test_a_job_that_loses_the_node_of_its_batch_script_is_finished_and_queued_again(cluster: Cluster, job: Job):
    """The second start answers for the job. Slurm takes 50 s to give up on the node."""
    job.start("--nodes=1-8", "--no-kill")
    job.wait_until_there("n0", "n1", "n2")
    cluster.cut_node("n0")
    job.wait_for(lambda: cluster.facts(job.job)["NodeList"] == "n[1-2]", PATIENCE_S, "the loss of n0")
    assert {"n1", "n2"} <= job.there() and cluster.state(job.job) == "RUNNING"
    job.finish()
    job.wait_for_end("COMPLETED")
    assert cluster.facts(job.job)["Restarts"] == "1" and "not requeueing: done" in job.log


@pytest.mark.long
@pytest.mark.extended
def test_a_job_whose_batch_script_slurm_kills_saves_and_is_queued_again(cluster: Cluster, job: Job):
    """It does when the first node is set down while it works. The ranks have KillWait, 10 s here, to save."""
    job.start("--nodes=1-8", "--no-kill")
    job.wait_until_there("n0", "n1", "n2")
    job.set_down("n0")
    # Here it returns to service at once, with the old script still on it, for which Slurm would hold the job.
    cluster.ask("scontrol", "update", "nodename=n0", "state=drain", "reason=test")
    job.wait_for_requeue()
    assert (job.status["state"], job.status["kind"]) == ("stopped", "stopped")
    job.wait_until_there("n1", "n2")
    job.finish()
    job.wait_for_end("COMPLETED")
    assert cluster.facts(job.job)["Restarts"] == "1" and job.status["restarts"] == 1
