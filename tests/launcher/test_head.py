"""What the head decides about nodes that are only simulated: who is started, ended, and started again."""

import fcntl
import threading
import time
from pathlib import Path

import pytest

from ptune_dist.cluster import head as head_module
from ptune_dist.cluster import record as record_module
from ptune_dist.cluster.head import Head
from ptune_dist.cluster.link import Link, connect
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.outcome import DONE, STOPPED, STOPPED_EARLY, Outcome
from ptune_dist.cluster.secret import sign_hello
from ptune_dist.config.load import load_config
from ptune_dist.run.folder import lock_run_dir, write_run_configs
from tests.conftest import write_config
from tests.launcher.fake_nodes import KILLED, SECRET, FakeNode, Job


def test_all_nodes_start_at_one_address_and_learn_the_same_outcome(tmp_path: Path):
    job = Job(tmp_path)
    a, b = job.play([Outcome(DONE)], [Outcome(DONE)])
    assert a.starts == b.starts and len(a.starts) == 1
    assert a.outcome == b.outcome and a.outcome.kind == DONE
    assert (job.status["state"], job.status["restarts"], job.status["job_id"]) == ("done", 0, "7")
    assert "end" not in a.received


def test_if_one_node_hangs_all_show_their_stacks_before_any_is_ended(tmp_path: Path):
    job = Job(tmp_path, max_restarts=0)
    a, b = job.play(["wait"], ["stacks"])
    assert a.outcome.kind == "hang"
    assert [kind for kind in a.received if kind != "beat"] == ["start", "stacks", "end", "leave"]


def test_a_failure_ends_the_other_nodes_and_all_are_restarted(tmp_path: Path):
    job = Job(tmp_path)
    a, b = job.play(["wait", Outcome(DONE)], [KILLED, Outcome(DONE)])
    assert len(a.starts) == 2 and a.starts[0] != a.starts[1]  # each attempt has its own store
    assert "end" in a.received and a.outcome.kind == DONE
    assert (job.status["state"], job.status["restarts"]) == ("done", 1)


def test_at_the_limit_the_first_cause_becomes_that_of_the_job(tmp_path: Path):
    job = Job(tmp_path, max_restarts=1)
    a, b = job.play(["wait"] * 2, [KILLED] * 2)
    assert a.outcome == b.outcome == KILLED
    expected = {
        "state": "failed",
        "kind": "killed",
        "reason": "rank 1 was killed",
        "node": "b",
        "rank": 1,
        "restarts": 1,
    }
    assert {key: job.status[key] for key in expected} == expected


@pytest.mark.parametrize("outcome", [Outcome("mistake", "m"), Outcome("fault", "f"), Outcome(STOPPED, "s")])
def test_what_would_recur_or_was_requested_is_not_restarted(tmp_path: Path, outcome: Outcome):
    job = Job(tmp_path)
    a, b = job.play([outcome], [outcome])
    assert len(a.starts) == 1 and b.outcome == outcome


def test_a_lost_node_ends_the_job(tmp_path: Path):
    job = Job(tmp_path)
    a, _ = job.play(["wait"], ["disconnect"])
    expected = ("unreachable", "b", "node b has closed its connection")
    assert (a.outcome.kind, a.outcome.node, a.outcome.reason) == expected
    assert job.status["node"] == "b" and len(a.starts) == 1


def test_a_silent_node_ends_the_job(tmp_path: Path):
    job = Job(tmp_path)
    silent = connect("127.0.0.1", job.port)
    facts = NodeFacts("b", num_procs=1, free_bytes=1 << 40).message()
    hello = {"kind": "hello", "node_rank": 1, "job_id": "7", "facts": facts, "clock_s": time.time(), "nonce": ""}
    silent.send(**sign_hello(SECRET, wait_for_challenge(silent), hello))
    (a,) = job.play(["wait"])
    assert (a.outcome.kind, a.outcome.node) == ("unreachable", "b")
    assert "has not been heard from for 2 s" in a.outcome.reason


def wait_for_challenge(link: Link) -> str:
    """What the head asks a newcomer to prove with."""
    message = link.receive_one()
    while message is None:
        time.sleep(0.01)
        message = link.receive_one()
    assert message["kind"] == "challenge"
    return message["nonce"]


def test_after_a_request_to_stop_nothing_is_restarted(tmp_path: Path):
    job = Job(tmp_path)
    a, b = job.play(["wait"], ["stop"])
    assert len(a.starts) == 1 and a.outcome == KILLED


def test_a_request_to_stop_between_two_attempts_stops_the_job(tmp_path: Path):
    job = Job(tmp_path)
    nodes = [FakeNode(job.port, 0, ["wait"]), FakeNode(job.port, 1, [KILLED])]
    while job.status.get("state") != "starting":
        time.sleep(0.01)
    with open(tmp_path / "run" / ".lock", "w") as lock:  # which the killed rank has not released yet
        fcntl.flock(lock, fcntl.LOCK_EX)
        while job.status.get("state") != "failed":
            time.sleep(0.01)
        nodes[0].link.send(kind="stop")
        nodes[0].join(5)
    assert nodes[0].outcome.kind == STOPPED and len(nodes[0].starts) == 1
    assert job.status["state"] == "stopped"


@pytest.mark.parametrize(("other", "kind"), [(KILLED, STOPPED), (Outcome("fault", "disk full", 1, "b"), "fault")])
def test_ranks_that_lose_those_of_a_node_that_is_stopped_while_it_starts_did_not_fail(
    tmp_path: Path, other: Outcome, kind: str
):
    a, b = Job(tmp_path).play(["stop early"], [other])
    assert a.outcome == b.outcome and a.outcome.kind == kind and len(a.starts) == 1


def test_a_node_that_is_stopped_just_before_its_start_ends_the_others_at_once(tmp_path: Path):
    job = Job(tmp_path)
    began = time.monotonic()
    a, b = job.play(["wait"], ["stop early"])
    assert a.outcome == b.outcome == STOPPED_EARLY and "end" in a.received
    assert time.monotonic() - began < 30 and job.status["state"] == "stopped"


def test_a_lock_that_outlives_its_killed_owner_prevents_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_module, "SECONDS_FOR_LOCK", 1.0)
    job = Job(tmp_path)
    with open(tmp_path / "lock", "w") as lock:

        def die_and_hold(node: FakeNode) -> None:
            (tmp_path / "lock").rename(tmp_path / "run" / ".lock")
            fcntl.flock(lock, fcntl.LOCK_EX)
            node.report(KILLED)

        a, b = job.play(["wait"], [die_and_hold])
    assert a.outcome == b.outcome == KILLED and len(a.starts) == 1


def test_a_hello_that_is_read_late_is_not_a_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """This happens when the head waits for its disk."""
    wait_for_lock = Head._wait_for_lock

    def wait_for_disk(head: Head) -> bool:
        time.sleep(6.5)
        return wait_for_lock(head)

    monkeypatch.setattr(Head, "_wait_for_lock", wait_for_disk)
    job = Job(tmp_path, silence_s=9.0)
    first = FakeNode(job.port, 0, [Outcome(DONE)])
    time.sleep(6.0)
    second = FakeNode(job.port, 1, [Outcome(DONE)])
    for thread in (job.head, first, second):
        thread.join(10)
    assert first.outcome.kind == second.outcome.kind == DONE


def test_a_failing_disk_on_the_head_is_reported_to_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(record_module, "begin_status", fail)
    monkeypatch.setattr(record_module, "end_status", fail)
    a, b = Job(tmp_path).play([], [])
    assert a.outcome == b.outcome and a.outcome.kind == "error" and "Input/output error" in a.outcome.reason


def test_a_node_that_does_not_join_is_named(tmp_path: Path):
    job = Job(tmp_path, start_timeout_s=0.5)
    (a,) = job.play([])
    assert a.outcome.reason.startswith("node b did not join within")
    assert (a.outcome.kind, job.status["state"], job.status["node"]) == ("unreachable", "failed", "b")


def test_an_unfit_node_is_named_before_anything_is_started(tmp_path: Path):
    job = Job(tmp_path)
    first = FakeNode(job.port, 0, [], config_digest="1")
    second = FakeNode(job.port, 1, [], config_digest="2")
    job.head.join(10)
    first.join(5)
    assert first.outcome.kind == "mistake" and first.outcome.node == "b"
    assert not (first.starts or second.starts)


def test_two_launchers_of_the_same_number_are_a_mistake(tmp_path: Path):
    job = Job(tmp_path)
    FakeNode(job.port, 0, [])
    other = FakeNode(job.port, 0, [])
    job.head.join(10)
    other.join(5)
    assert other.outcome.reason == "two launchers claim to be node a, number 0"


def test_a_run_that_another_job_trains_is_refused_and_keeps_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_module, "SECONDS_FOR_LOCK", 3.0)  # longer than a node waits for the head's heartbeat
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "running", "job_id": "7"}')
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = Job(tmp_path)
        a, b = job.play([], [])
    assert a.outcome == b.outcome and a.outcome.kind == "mistake"
    assert "another process is training here" in a.outcome.reason
    assert a.received.count("beat") >= 2 and a.link.silent_s < 2
    assert job.status == {"state": "running", "job_id": "7"}


def test_the_lock_of_a_killed_job_is_waited_for(tmp_path: Path):
    (tmp_path / "run").mkdir()
    lock = open(tmp_path / "run" / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(1.0, lock.close).start()
    job = Job(tmp_path)
    a, b = job.play([Outcome(DONE)], [Outcome(DONE)])
    assert a.outcome.kind == DONE


def test_a_finished_run_is_not_started_and_every_node_learns_that(tmp_path: Path):
    config = load_config(write_config(tmp_path / "c.yaml"))
    with lock_run_dir(config):
        write_run_configs(config, {})
    (tmp_path / "run" / "summary.json").write_text('{"steps": 20, "evaluations_since_best": 0}')
    job = Job(tmp_path)
    a, b = job.play([], [])
    assert a.outcome == b.outcome == Outcome(DONE) and not a.starts
    assert job.status == {}


def test_an_output_dir_that_cannot_be_created_is_a_mistake(tmp_path: Path):
    (tmp_path / "file").write_text("")
    job = Job(tmp_path, f"output_dir={tmp_path}/file/run")
    a, b = job.play([], [])
    assert a.outcome.kind == "mistake" and "output_dir" in a.outcome.reason and a.outcome == b.outcome
