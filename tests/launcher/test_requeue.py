"""A batch job is requeued as long as that helps, but not forever."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ptune_dist.cluster.launch import main
from ptune_dist.cluster.outcome import KINDS, Outcome
from ptune_dist.cluster.record import ReplicaRecord
from ptune_dist.cluster.requeue import RequeueLimits, decide_requeue, may_requeue
from ptune_dist.run.status import begin_status, end_status
from tests.conftest import write_config

LIMITS = RequeueLimits(num_requeues=0, max_requeues=5, max_idle_starts=3)


def decide(status: dict, step: int = 40, num_requeues: int = 0) -> int:
    """The exit status of a batch script whose run started at step 20."""
    limits = replace(LIMITS, num_requeues=num_requeues)
    return decide_requeue({"started_at_step": 20, "idle_starts": 0} | status, step, limits)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_recur_ends_the_job_and_everything_else_is_requeued(kind: str):
    state = {"done": "done", "stopped": "stopped"}.get(kind, "failed")
    expected = {"done": 0, "mistake": 2, "fault": 1}.get(kind, 75)
    assert decide({"state": state, "kind": kind, "reason": "why"}) == expected


@pytest.mark.parametrize("state", ["starting", "running"])
def test_a_launcher_that_was_killed_is_requeued(state: str):
    status = {"state": state, "kind": "", "reason": "", "started_at_step": 20}
    assert decide_requeue(status, 40, LIMITS) == (75, "ended without reporting an outcome")


def test_a_finished_run_is_done_no_matter_how_often_it_was_started():
    assert decide({"state": "done", "kind": "done", "idle_starts": 9}, step=20, num_requeues=99) == 0


def test_starts_without_progress_are_counted_including_this_one():
    stopped = {"state": "stopped", "kind": "stopped", "reason": "r"}
    assert decide(stopped | {"idle_starts": 1}, step=20) == 75
    code, reason = decide_requeue(stopped | {"idle_starts": 2, "started_at_step": 20}, 20, LIMITS)
    assert (code, reason) == (1, "3 starts in a row have gained no step: r")
    assert decide(stopped | {"idle_starts": 2}, step=21) == 75  # this one has made progress


def test_requeues_have_a_limit():
    stopped = {"state": "stopped", "kind": "stopped"}
    assert decide(stopped, num_requeues=4) == 75
    assert decide(stopped, num_requeues=5) == 1


def test_without_a_status_the_job_ends_as_srun_did(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert may_requeue(tmp_path, 2, "7", LIMITS) == 2
    assert may_requeue(tmp_path, 143, "7", LIMITS) == 143
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("state", ["stopped", "running", "done"])
def test_the_status_of_another_job_is_ignored_and_a_mistake_is_final(tmp_path: Path, state: str):
    """For instance if another job trains in the directory: this job has then written no status."""
    status = {"state": state, "kind": "", "started_at_step": 0, "job_id": "6.0"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    for code in (2, 1, 137):
        assert may_requeue(tmp_path, code, "7", LIMITS) == code
    assert may_requeue(tmp_path, 2, "6", LIMITS) == 2
    assert may_requeue(tmp_path, 1, "6", LIMITS) == {"done": 0}.get(state, 75)


def test_a_loop_without_progress_ends_at_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture):
    codes = []
    for number in range(5):
        begin_status(tmp_path, "7.0", in_place=False)
        end_status(tmp_path, Outcome("killed", "rank 1 was killed"))
        codes.append(may_requeue(tmp_path, 1, "7", replace(LIMITS, num_requeues=number)))
        if codes[-1] != 75:
            break
    assert codes == [75, 75, 1]
    assert "3 starts in a row have gained no step: rank 1 was killed" in capsys.readouterr().out


def test_of_replicas_the_last_to_end_counts_until_the_run_is_done(tmp_path: Path):
    a, b, other = (ReplicaRecord(tmp_path, job, name) for job, name in (("7.0", "a"), ("7.0", "b"), ("8.0", "c")))
    for node in (other, a, b):
        node.begin(in_place=False)
    a.end(Outcome("fault", "disk full"))
    a.close(Outcome("fault", "disk full"))
    set_time(tmp_path, "a", "2026-01-01T00:00:00+0000")
    assert may_requeue(tmp_path, 137, "7", LIMITS) == 75  # b has not ended, so its launcher was lost
    b.end(Outcome("stopped", "on request"))
    b.close(Outcome("stopped", "on request"))
    assert may_requeue(tmp_path, 1, "7", LIMITS) == 75  # job 8 has begun the run and continues it
    set_time(tmp_path, "a", "2100-01-01T00:00:00+0000")
    assert may_requeue(tmp_path, 1, "7", LIMITS) == 1
    assert may_requeue(tmp_path, 2, "7", LIMITS) == 2
    end_status(tmp_path, Outcome("done"))
    assert may_requeue(tmp_path, 137, "7", LIMITS) == 0 == may_requeue(tmp_path, 2, "7", LIMITS)
    assert may_requeue(tmp_path, 137, "9", LIMITS) == 137  # none of its nodes has started


def set_time(run_dir: Path, node: str, time: str) -> None:
    file = run_dir / "launchers" / node / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time": time}))


def test_the_launcher_answers_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    config = write_config(tmp_path / "c.yaml")
    (tmp_path / "run").mkdir()
    status = {"state": "failed", "kind": "killed", "reason": "why", "started_at_step": 0, "idle_starts": 1}
    status["job_id"] = "7.0"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "run" / "status.json").write_text(json.dumps(status))
    assert main(["--may-requeue", "1", str(config)]) == 75
    monkeypatch.setenv("PTUNE_MAX_IDLE_STARTS", "2")
    assert main(["--may-requeue", "1", str(config), "seed=0"]) == 1
    monkeypatch.setenv("PTUNE_MAX_IDLE_STARTS", "two")
    assert main(["--may-requeue", "1", str(config)]) == 2
    assert "PTUNE_MAX_IDLE_STARTS must be a whole number, not 'two'" in capsys.readouterr().err
