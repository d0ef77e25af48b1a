"""Whatever is killed, suspended or cut off is found, reported and ended on every node, and the run is resumed."""

import signal
import time
from pathlib import Path

import pytest

from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.status import last_step
from tests.cluster.runs import (
    HANG_TIMEOUT_S,
    PATIENCE_S,
    SECONDS_TO_REPORT,
    Run,
    damage,
    is_alive,
    wait_until_gone,
)
from tests.cluster.slurm import Cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run without Slurm."""
    run = Run(cluster, tmp_path_factory.mktemp("runs") / "undisturbed")
    run.train_without_slurm(num_nodes=2)
    return run


@pytest.mark.long
def test_a_job_survives_a_cut_and_a_damaged_checkpoint(cluster: Cluster, undisturbed: Run, tmp_path: Path):
    """tests/launcher has the faults of ranks and launchers without Slurm."""
    run = Run(cluster, tmp_path / "disturbed")
    run.submit(PTUNE_MAX_IDLE_STARTS=9)
    run.wait_for_step(12, restarts=0)  # with two checkpoints
    cut_link(run)
    refused, used = damage_newest(run, "state.json", is_truncated=True)
    cluster.heal("n0", "n1")
    run.wait_for_end("COMPLETED")
    assert f"{refused} is damaged" in run.log and run.starts[-1] == used
    assert len(run.starts) == 2 and run.status["restarts"] == 1
    run.assert_bitwise(undisturbed)


@pytest.mark.long
@pytest.mark.extended
def test_a_job_survives_a_killed_rank_a_stopped_one_a_killed_launcher_and_a_damaged_checkpoint(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
):
    run = Run(cluster, tmp_path / "disturbed")
    run.submit(PTUNE_MAX_RESTARTS=1, PTUNE_MAX_IDLE_STARTS=9)

    run.wait_for_step(10, restarts=0)
    kill(run, "rank", "n1", in_place=True)
    cluster.wait_for_text(run.job, "; restart 1 of 1 in place", timeout=10)
    assert "rank 1 on node n1 was killed after step" in run.log

    wait_for_progress(run, restarts=1)
    stop_rank(run, "n0")  # no restart in place is left
    run.wait_for_requeue()
    refused, used = damage_newest(run, "prompt.safetensors", is_truncated=False)

    wait_for_progress(run, restarts=2)
    assert f"{refused} is damaged" in run.log and run.starts[-1] == used
    kill(run, "launcher", "n0", in_place=False)

    run.wait_for_end("COMPLETED")
    assert len(run.starts) == 4 and run.status["restarts"] == 3
    run.assert_bitwise(undisturbed)


def wait_for_progress(run: Run, *, restarts: int) -> None:
    """Wait for steps that no earlier start has done."""
    before = run.num_lines
    run.wait_for_step(before + 6, restarts=restarts)


def cut_link(run: Run) -> None:
    """Cut the link between the nodes of a job. It is found in time, and every process ends while it is still cut."""
    processes = run.attempt() + run.processes("launcher")
    run.cluster.cut("n0", "n1")
    began = time.monotonic()
    run.wait_for(lambda: run.status["state"] == "failed", HANG_TIMEOUT_S + SECONDS_TO_REPORT, "the cut in status.json")
    wait_until_gone(processes)
    status = run.status  # both nodes may have written it, the head last
    assert status["kind"] == "unreachable" and status["node"] in ("n0", "n1")
    assert f"node {status['node']} has not been heard from" in status["reason"]
    assert time.monotonic() - began < 30


def stop_rank(run: Run, node: str) -> None:
    """SIGSTOP a rank. It is found in time, the stacks of all ranks are kept, and every process of the attempt ends."""
    processes = run.attempt()
    (rank,) = run.processes("rank", node)
    began = time.time()
    rank.send_signal(signal.SIGSTOP)
    run.wait_for(lambda: run.status["state"] == "failed", HANG_TIMEOUT_S + SECONDS_TO_REPORT, "the hang in status.json")
    wait_until_gone(processes)
    assert (run.status["kind"], run.status["node"], run.status["rank"]) == ("frozen", node, 0), run.status
    assert f"rank 0 on node {node} is stopped (SIGSTOP or a debugger)" in run.status["reason"]
    for number in (0, 1):
        stack = run.dir / "stacks" / f"rank-{number:05d}.txt"
        assert stack.stat().st_mtime > began and "loop.py" in stack.read_text()


def kill(run: Run, kind: str, node: str, *, in_place: bool) -> None:
    """SIGKILL a process. Every process of the attempt ends, and without a restart in place every one of the job."""
    processes = run.attempt()
    launchers = run.processes("launcher")
    (victim,) = run.processes(kind, node)
    victim.kill()
    wait_until_gone(processes if in_place else processes + launchers)
    if in_place:
        assert all(is_alive(launcher) for launcher in launchers)
    else:
        run.wait_for_requeue()


def damage_newest(run: Run, name: str, *, is_truncated: bool) -> tuple[str, int]:
    """Damage a file of the newest checkpoint; returns the file, and the step of the checkpoint before."""
    *_, before, newest = list_checkpoints(run.dir / "checkpoints")
    assert last_step(run.dir) == int(newest.name.removeprefix("step-"))
    damage(newest / name, is_truncated=is_truncated)
    return str(newest / name), int(before.name.removeprefix("step-"))


@pytest.mark.long
@pytest.mark.extended
def test_a_job_that_lost_the_stepd_of_a_node_is_requeued_and_loses_nothing(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
):
    """srun takes 42 s to give up on the node."""
    run = Run(cluster, tmp_path / "lost")
    run.submit(nodes="n1,n2")
    run.wait_for_step(10, restarts=0)
    processes = run.attempt() + run.processes("launcher")
    assert len(processes) == 6
    (stepd,) = cluster.stepd("n2", run.job, "0")
    stepd.kill()
    wait_until_gone(processes)
    run.wait_for_end("COMPLETED")
    assert cluster.facts(run.job)["Restarts"] == "1"
    assert len(run.starts) == 2 and run.starts[1] >= 5
    run.assert_bitwise(undisturbed)


@pytest.mark.long
@pytest.mark.extended
def test_a_killed_batch_stepd_and_an_unplugged_node_are_survived(cluster: Cluster, undisturbed: Run, tmp_path: Path):
    """Slurm does not notice the first, and takes 50 s to give up on a node."""
    run = Run(cluster, tmp_path / "unplugged")
    run.submit(nodes="", PTUNE_MAX_IDLE_STARTS=9)
    run.wait_for_step(10, restarts=0)
    (stepd,) = cluster.stepd("n0", run.job, "batch")
    stepd.kill()
    time.sleep(1)
    run.wait_for_step(run.num_lines + 5, restarts=0)
    processes = run.attempt() + run.processes("launcher")
    cluster.cut_node("n1")
    wait_until_gone(processes)
    run.wait_for(lambda: run.status["restarts"] == 1, PATIENCE_S, "a start on other nodes")
    assert cluster.facts(run.job)["NodeList"] == "n[0,2]"
    cluster.heal_node("n1")
    run.wait_for_end("COMPLETED")
    run.assert_bitwise(undisturbed)
