"""A batch job goes on while that helps, and not for ever."""

import json

import pytest

from ptune_dist.cluster.requeue import decide, may_requeue
from ptune_dist.cluster.signs import KINDS
from ptune_dist.run.status import begin_status, end_status
from tests.conftest import write_config

LIMITS = {"num_requeues": 0, "max_requeues": 5, "max_idle": 3}


def decided(status: dict, step: int = 40, **limits) -> int:
    return decide({"started_at_step": 20, "idle_starts": 0} | status, step, **LIMITS | limits)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_come_again_ends_and_all_else_goes_on(kind):
    state = {"done": "done", "stopped": "stopped"}.get(kind, "failed")
    wanted = {"done": 0, "mistake": 2, "fault": 1}.get(kind, 75)
    assert decided({"state": state, "kind": kind, "reason": "why"}) == wanted


@pytest.mark.parametrize("state", ["starting", "running"])
def test_a_launcher_that_was_killed_leaves_no_word_and_goes_on(state):
    code, reason = decide({"state": state, "kind": "", "reason": "", "started_at_step": 20}, 40, **LIMITS)
    assert (code, reason) == (75, "ended without a word")


def test_a_finished_run_is_done_however_often_it_was_started():
    assert decided({"state": "done", "kind": "done", "idle_starts": 9}, step=20, num_requeues=99) == 0


def test_starts_without_a_step_gained_are_counted_with_this_one():
    stopped = {"state": "stopped", "kind": "stopped", "reason": "r"}
    assert decided(stopped | {"idle_starts": 1}, step=20) == 75
    code, reason = decide(stopped | {"idle_starts": 2, "started_at_step": 20}, 20, **LIMITS)
    assert (code, reason) == (1, "3 starts in a row have gained no step: r")
    assert decided(stopped | {"idle_starts": 2}, step=21) == 75  # this one has gained


def test_requeues_have_a_limit():
    stopped = {"state": "stopped", "kind": "stopped"}
    assert decided(stopped, num_requeues=4) == 75
    assert decided(stopped, num_requeues=5) == 1


def test_a_start_that_came_to_no_status_ends_as_srun_did(tmp_path, capsys):
    assert may_requeue(tmp_path, 2, "7", **LIMITS) == 2
    assert may_requeue(tmp_path, 143, "7", **LIMITS) == 143
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("state", ["stopped", "running", "done"])
def test_what_another_job_wrote_decides_nothing_and_a_mistake_is_final(tmp_path, state):
    """A changed key over a run, say, or a folder in which another job trains: this job has written no status."""
    status = {"state": state, "kind": "", "started_at_step": 0, "job_id": "6.0"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    for code in (2, 1, 137):
        assert may_requeue(tmp_path, code, "7", **LIMITS) == code
    assert may_requeue(tmp_path, 2, "6", **LIMITS) == 2
    assert may_requeue(tmp_path, 1, "6", **LIMITS) == {"done": 0}.get(state, 75)


def test_a_loop_without_progress_ends_after_the_limit(tmp_path, capsys):
    from ptune_dist.cluster.signs import End

    codes = []
    for number in range(5):
        begin_status(tmp_path, "7.0", in_place=False)
        end_status(tmp_path, End("killed", "rank 1 was killed"))
        codes.append(may_requeue(tmp_path, 1, "7", **LIMITS | {"num_requeues": number}))
        if codes[-1] != 75:
            break
    assert codes == [75, 75, 1]
    assert "3 starts in a row have gained no step: rank 1 was killed" in capsys.readouterr().out


def test_the_launcher_answers_for_the_batch_script(tmp_path, monkeypatch, capsys):
    from ptune_dist.cluster.__main__ import main

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
