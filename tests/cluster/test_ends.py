"""Jobs that must not be restarted: a loss that is not finite, starts without progress, mistakes, a missing node."""

import subprocess
from pathlib import Path

import pytest

from ptune_dist.run.checkpoint import load_newest_checkpoint
from ptune_dist.run.metrics_log import read_metrics
from tests.cluster.runs import ENV, PATIENCE_S, Run, wait_until_gone, write_run
from tests.cluster.slurm import ROOT, Cluster
from tests.conftest import build_tiny_base


@pytest.mark.long
@pytest.mark.extended  # test_saves.py does the same with a full disk and one node
def test_a_loss_that_is_not_finite_ends_every_rank_and_the_job_for_good(cluster: Cluster, tmp_path: Path):
    """With learned positions, a few plain unclipped steps move the prompt out of float32's range."""
    diverging = {
        "optimizer": "sgd",
        "momentum": 0.999,
        "learning_rate": 1e21,
        "max_grad_norm": 0,
        "schedule": "constant",
    }
    base = build_tiny_base("gpt2", tmp_path / "base")
    run = Run(
        cluster,
        tmp_path / "diverges",
        model={"path": str(base)},
        train=diverging,
        checkpoint={"every": 1, "keep": 4},
    )
    run.submit()
    run.wait_for_end("FAILED")
    assert run.cluster.processes(job=run.job) == []
    last = read_metrics(run.dir)[-1]["step"]
    status = run.status
    assert (status["state"], status["kind"], status["step"]) == ("failed", "fault", last)
    assert f"the loss is nan at step {last + 1}" in status["reason"] and status["reason"] in run.log
    facts = cluster.facts(run.job)
    assert (facts["ExitCode"], facts["Restarts"], status["restarts"]) == ("1:0", "0", 0)
    assert "it would happen again" in run.log and "in place" not in run.log
    complaints: list[str] = []
    assert load_newest_checkpoint(run.dir / "checkpoints", complaints.append).step == last and not complaints
    for node in ("n0", "n1"):  # no rank was killed, or lost another
        assert "Traceback" not in (run.dir / "logs" / f"{node}.log").read_text()


@pytest.mark.long
@pytest.mark.extended  # launcher/test_requeue.py does the same without Slurm
def test_starts_without_progress_end_the_job_at_their_limit(cluster: Cluster, tmp_path: Path):
    run = Run(cluster, tmp_path / "idle", checkpoint={"every": 0})
    run.submit(nodes="n0", PTUNE_MAX_RESTARTS=0, PTUNE_MAX_IDLE_STARTS=2)
    run.wait_for_step(5, restarts=0)  # of which none is saved
    kill_rank(run)
    run.wait_for_requeue()
    run.wait_for(lambda: run.processes("rank") != [], PATIENCE_S, "a second start")
    kill_rank(run)
    run.wait_for_end("FAILED")
    assert "2 starts in a row have gained no step: " in run.log and "on node n0" in run.status["reason"]
    assert (run.status["state"], run.status["restarts"], run.status["idle_starts"]) == ("failed", 1, 1)
    assert cluster.facts(run.job)["Restarts"] == "1"


def kill_rank(run: Run) -> None:
    (rank,) = run.processes("rank")
    rank.kill()
    wait_until_gone([rank])


@pytest.mark.long
def test_a_mistake_ends_the_job_with_status_2_and_is_not_requeued(cluster: Cluster, tmp_path: Path):
    run = Run(cluster, tmp_path / "wrong")
    run.submit("train.batchsize=8")
    run.wait_for_end("FAILED")
    assert cluster.facts(run.job)["ExitCode"] == "2:0" and "train.batch_size" in run.log


@pytest.mark.long
@pytest.mark.extended  # launcher/test_run_ranks.py does the same without Slurm
def test_a_mistake_that_only_ranks_find_ends_the_job_too(cluster: Cluster, tmp_path: Path):
    run = Run(cluster, tmp_path / "wrong")
    missing = tmp_path / "missing.jsonl"
    run.submit(f"data.train={missing}", nodes="n0")
    run.wait_for_end("FAILED")
    assert cluster.facts(run.job)["ExitCode"] == "2:0" and run.log.count("0: error: ") == 1
    assert (run.status["state"], run.status["kind"], run.status["restarts"]) == ("failed", "mistake", 0)
    assert str(missing) in run.status["reason"] and str(missing) in run.log


@pytest.mark.extended  # tests/launcher does the same without Slurm
def test_a_node_that_does_not_join_is_named(cluster: Cluster, tmp_path: Path):
    site = tmp_path / "site.sh"
    site.write_text('[ "${SLURM_NODEID:-}" != 1 ] || [ -z "${SLURM_STEP_NODELIST:-}" ] || sleep 12\n')
    run = Run(cluster, tmp_path / "absent")
    run.submit(PTUNE_START_TIMEOUT_S=5, PTUNE_SITE=site, PTUNE_MAX_REQUEUES=0)
    run.wait_for_end("FAILED")
    assert (run.status["state"], run.status["kind"], run.status["node"]) == ("failed", "unreachable", "n1")
    assert "node n1 did not join within 5 s" in run.status["reason"] and run.status["reason"] in run.log


@pytest.mark.long
@pytest.mark.extended  # launcher/test_run_ranks.py does the same without Slurm
def test_a_check_of_two_nodes_prints_a_line_for_each_rank(cluster: Cluster, tmp_path: Path):
    config = write_run(tmp_path / "checked")
    command = ["srun", "--nodes=2", "--nodelist=n0,n1", "--ntasks-per-node=1", "launch/run.sh", "--check", str(config)]
    inside = ["ip", "netns", "exec", cluster.network.namespace("n0")]  # the nodes must be able to reach srun
    done = subprocess.run(
        [*inside, *command], cwd=ROOT, env=cluster.env | ENV, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked: 2 ranks, all fit" in done.stdout
    first, second = [line for line in done.stdout.splitlines() if "CPU" in line and "GB/s" in line]
    assert "n0" in first and "n1" in second
    assert not (tmp_path / "checked/run/status.json").exists()
