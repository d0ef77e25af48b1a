"""Jobs of slurm/train.sbatch: the ordinary one, requests to stop, other numbers of nodes."""

import json

import pytest

from ptune_dist.run.status import last_step
from tests.cluster.runs import NUM_STEPS, PATIENCE_S, VALIDATION, Run, only_in_full, wait_until_gone, write_run
from tests.commands import run_command

EVALUATED = 60
# Greedy answers to all of the validation rows take over a second.
SECTIONS = {
    "data": VALIDATION,
    "evaluate": {"every": EVALUATED, "metrics": ["loss", "exact_match"], "num_samples": 0},
    "checkpoint": {"every": 25, "keep": 3},
}


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """A run over two nodes to which nothing happens."""
    run = Run(cluster, tmp_path_factory.mktemp("runs") / "undisturbed", **SECTIONS)
    run.submit()
    run.wait_for_end("COMPLETED")
    return run


def test_a_job_of_two_nodes_learns_as_one_node_of_two_ranks_and_is_not_begun_twice(undisturbed, tmp_path):
    status, lines = undisturbed.status, (undisturbed.dir / "metrics.jsonl").read_bytes()
    assert (status["state"], status["step"], status["restarts"]) == ("done", NUM_STEPS, 0)
    logs = {path.name: path.read_text() for path in (undisturbed.dir / "logs").iterdir()}
    assert set(logs) == {"n0.log", "n1.log"} and f"step {NUM_STEPS}/{NUM_STEPS}" in logs["n0.log"]

    config = write_run(tmp_path / "one", **SECTIONS)
    done = run_command("train", str(config), num_ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one = [json.loads(line)["loss"] for line in (tmp_path / "one/run/metrics.jsonl").read_text().splitlines()]
    assert undisturbed.losses() == pytest.approx(one, rel=1e-5)

    undisturbed.submit()
    undisturbed.wait_for_end("COMPLETED")
    assert "is finished: nothing is left to do" in undisturbed.log
    assert undisturbed.status == status and (undisturbed.dir / "metrics.jsonl").read_bytes() == lines


def test_a_job_saves_once_for_each_request_to_stop_and_goes_on_bitwise(cluster, undisturbed, tmp_path):
    run = Run(cluster, tmp_path / "stopped", **SECTIONS)
    run.submit(PTUNE_MAX_IDLE_STARTS=5)

    run.wait_for(lambda: len(run.processes("rank")) == 2, PATIENCE_S, "two ranks")  # before the first step
    cluster.cancel(run.job, "USR2")
    assert stopped_step(run) == 0 and run.checkpoint_steps() == []

    run.wait_for_step(EVALUATED, restarts=1)
    cluster.cancel(run.job, "USR2")
    assert stopped_step(run) == EVALUATED and run.checkpoint_steps() == [25, 50, EVALUATED]
    assert f"step {EVALUATED}  validation" not in run.log  # it was broken off, and is done again

    run.wait_for_step(EVALUATED + 8, restarts=2)
    processes = run.attempt() + run.processes("launcher")
    cluster.requeue(run.job)
    assert stopped_step(run) > EVALUATED
    wait_until_gone(processes, timeout=15)

    run.wait_for_end("COMPLETED")
    assert cluster.facts(run.job)["Restarts"] == "3" and run.status["restarts"] == 3
    assert run.log.count(f"step {EVALUATED}  validation") == 1
    run.assert_bitwise(undisturbed)


def stopped_step(run: Run) -> int:
    """The step that was saved on request; nothing came after it. Returns when the job is in the queue again."""
    run.wait_for_requeue()
    status = run.status
    assert (status["state"], status["kind"]) == ("stopped", "stopped"), run.told()
    assert status["step"] == last_step(run.dir) == run.num_lines
    return status["step"]


def test_a_run_goes_on_with_one_node_and_with_two_to_1e_5(cluster, undisturbed, tmp_path):
    run = Run(cluster, tmp_path / "spread", **SECTIONS)
    for step, nodes in ((30, "n0,n1"), (EVALUATED + 5, "n0")):
        run.submit(nodes=nodes, PTUNE_MAX_REQUEUES=0)
        run.wait_for(lambda step=step: run.num_lines >= step, PATIENCE_S, f"step {step}")
        cluster.cancel(run.job, "USR2")
        run.wait_for_end("FAILED")
        assert "requeued 0 times, the most that is allowed: stopped on request" in run.log
        assert f"{nodes.count('n')} ranks on cpu" in run.log and run.status["state"] == "stopped"
    before = last_step(run.dir)
    run.submit()
    run.wait_for_end("COMPLETED")
    assert run.starts == [before]
    assert run.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)  # another order of samples would be far off


@pytest.mark.long
@only_in_full
def test_a_job_whose_time_is_up_saves_and_is_requeued(cluster, tmp_path):
    """Slurm looks at the limits each 30 s, so that --signal=USR2@30 comes 60 to 90 s after the start."""
    run = Run(cluster, tmp_path / "limited", train={"max_steps": 20_000}, checkpoint={"every": 0})
    run.submit(options=["--time=2", "--signal=USR2@30"])
    run.wait_for(lambda: run.num_lines >= 5, PATIENCE_S, "step 5")
    assert stopped_step(run) >= 5
    assert run.checkpoint_steps() == [run.status["step"]]
    run.wait_for(lambda: len(run.starts) == 2, PATIENCE_S, "a second start")
    assert run.starts == [0, run.status["step"]]
