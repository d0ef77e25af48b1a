"""Jobs of slurm/train.sbatch: undisturbed, asked to stop, and resumed on another number of nodes."""

import shutil
from pathlib import Path

import pytest

from ptune_dist.run.folder import list_checkpoints
from ptune_dist.run.status import last_step
from tests.cluster.runs import NUM_STEPS, PATIENCE_S, VALIDATION, Run, wait_until_gone
from tests.cluster.slurm import Cluster

EVALUATED = 20
SECTIONS = {
    "data": VALIDATION,
    # Greedy answers to all of the validation rows take more than a second.
    "evaluate": {"every": EVALUATED, "metrics": ["loss", "exact_match"], "num_samples": 0},
    "checkpoint": {"every": 15, "keep": 3},
}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run without Slurm."""
    run = Run(cluster, tmp_path_factory.mktemp("runs") / "undisturbed", **SECTIONS)
    run.train_without_slurm(num_nodes=2)
    return run


@pytest.mark.long
def test_a_job_saves_on_a_request_to_stop_and_resumes_bitwise(cluster: Cluster, undisturbed: Run, tmp_path: Path):
    run = Run(cluster, tmp_path / "stopped", **SECTIONS)
    run.submit()
    run.wait_for_step(EVALUATED, restarts=0)
    processes = run.attempt() + run.processes("launcher")
    cluster.requeue(run.job)
    assert wait_for_stop(run) == EVALUATED and run.checkpoint_steps() == [15, EVALUATED]
    assert f"step {EVALUATED}  validation" not in run.log  # the evaluation was interrupted, and is repeated
    wait_until_gone(processes, timeout=15)

    run.wait_for_end("COMPLETED")
    assert cluster.facts(run.job)["Restarts"] == "1" and run.status["restarts"] == 1
    assert run.log.count(f"step {EVALUATED}  validation") == 1
    logs = {path.name: path.read_text() for path in (run.dir / "logs").iterdir()}
    assert set(logs) == {"n0.log", "n1.log"} and f"step {NUM_STEPS}/{NUM_STEPS}" in logs["n0.log"]
    run.assert_bitwise(undisturbed)


@pytest.mark.long
@pytest.mark.extended  # tests/launcher does the same without Slurm
def test_a_job_that_is_asked_to_stop_before_the_first_step_is_requeued_and_a_finished_run_is_not_repeated(
    cluster: Cluster, tmp_path: Path
):
    run = Run(cluster, tmp_path / "stopped", train={"max_steps": 5})
    run.submit(PTUNE_MAX_IDLE_STARTS=5)
    run.wait_for(lambda: len(run.processes("rank")) == 2, PATIENCE_S, "two ranks")
    cluster.cancel(run.job, "USR2", "--full")
    assert wait_for_stop(run) == 0 and run.checkpoint_steps() == []
    run.wait_for_end("COMPLETED")
    status = run.status
    before = run.final_files()
    run.submit()
    run.wait_for_end("COMPLETED")
    assert "is finished: nothing to do" in run.log and run.status == status
    assert run.final_files() == before


def wait_for_stop(run: Run) -> int:
    """Wait until the job is queued again; returns the step that was saved on request, which must be the last one."""
    run.wait_for_requeue()
    status = run.status
    assert (status["state"], status["kind"]) == ("stopped", "stopped"), run.describe()
    assert status["step"] == last_step(run.dir) == run.num_lines
    return status["step"]


@pytest.mark.long
@pytest.mark.extended  # numerics/test_resume.py does the same without Slurm
def test_a_run_of_two_nodes_resumes_on_one_node_and_on_two_again_to_1e_5(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
):
    run = Run(cluster, tmp_path / "resumed", **SECTIONS)
    first = copy_as_of_oldest_checkpoint(undisturbed, run)
    run.submit(nodes="n0", PTUNE_MAX_REQUEUES=0)
    run.wait_for_step(first + 5, restarts=0)
    cluster.cancel(run.job, "USR2")
    run.wait_for_end("FAILED")
    assert "requeued 0 times, which is the limit: stopped on request" in run.log
    assert "1 ranks on cpu" in run.log and run.starts == [first] and run.status["state"] == "stopped"
    second = last_step(run.dir)
    assert first < second < NUM_STEPS
    run.submit()
    run.wait_for_end("COMPLETED")
    assert "2 ranks on cpu" in run.log and run.starts == [second]
    assert run.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)  # another order of samples would be far off


def copy_as_of_oldest_checkpoint(source: Run, target: Run) -> int:
    """Copy a finished run as it was at its oldest remaining checkpoint; returns that step."""
    shutil.copytree(source.dir, target.dir)
    for name in ("summary.json", "status.json"):
        (target.dir / name).unlink()
    for checkpoint in list_checkpoints(target.dir / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    step = last_step(target.dir)
    metrics = target.dir / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:step]))
    return step


@pytest.mark.long
@pytest.mark.extended
def test_a_job_saves_and_is_requeued_at_its_time_limit(cluster: Cluster, tmp_path: Path):
    """Slurm checks the limits every 30 s, so --signal=B:USR2@30 arrives 60 to 90 s after the start."""
    run = Run(cluster, tmp_path / "limited", train={"max_steps": 20_000}, checkpoint={"every": 0})
    run.submit(options=["--time=2", "--signal=B:USR2@30"])
    run.wait_for(lambda: run.num_lines >= 5, PATIENCE_S, "step 5")
    assert wait_for_stop(run) >= 5
    assert run.checkpoint_steps() == [run.status["step"]]
    run.wait_for(lambda: len(run.starts) == 2, PATIENCE_S, "a second start")
    assert run.starts == [0, run.status["step"]]


@pytest.mark.long
@pytest.mark.extended  # launcher/test_topology.py reads what such a job's steps get
def test_a_heterogeneous_job_trains_on_the_nodes_of_all_its_components(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
):
    run = Run(cluster, tmp_path / "heterogeneous", **SECTIONS)
    first = ["--nodes=1", "--nodelist=n0", "--cpus-per-task=1"]
    second = ["--nodes=1", "--nodelist=n1", "--cpus-per-task=2", "--ntasks-per-node=1"]
    run.submit(nodes="", options=[*first, ":", *second])
    run.wait_for_end("COMPLETED")
    logs = {path.name: path.read_text() for path in (run.dir / "logs").iterdir()}
    assert set(logs) == {"n0.log", "n1.log"} and "2 ranks on cpu" in logs["n0.log"]
    assert run.status["state"] == "done"
    run.assert_bitwise(undisturbed)
