"""What the head decides, told by nodes that only pretend: who is started, ended, started again."""

import fcntl
import json
import socket
import threading
import time
from dataclasses import asdict

import pytest

from ptune_dist.cluster import head as head_module
from ptune_dist.cluster.head import Head, Limits
from ptune_dist.cluster.link import connect, listen
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.signs import DONE, STOPPED, STOPPED_EARLY, End
from ptune_dist.cluster.topology import Topology
from ptune_dist.config.load import load_config
from ptune_dist.run.status import read_status
from tests.conftest import write_config

NAMES = ("a", "b")


class PretendedNode(threading.Thread):
    """Says hello, answers each start with the next of its ends, and keeps the head's last word."""

    def __init__(self, port: int, number: int, ends: list[End | str], **facts):
        super().__init__(daemon=True)
        self.number, self.ends, self.starts, self.last, self.heard = number, list(ends), [], None, []
        self.is_running = False
        self.link = connect("127.0.0.1", port)
        found = NodeFacts(NAMES[number], **({"num_procs": 1, "free_bytes": 1 << 40} | facts))
        self.link.send(kind="hello", node_rank=number, job_id="7", facts=found.message(), clock_s=time.time())
        self.start()

    def run(self) -> None:
        while self.last is None and self.link.is_open:
            for message in self.link.receive():
                self.heard.append(message["kind"])
                if message["kind"] == "start":
                    self.starts.append((message["address"], message["port"]))
                    self.act(self.ends.pop(0))
                elif message["kind"] == "end" and self.is_running:
                    self.say(End("ended", node=NAMES[self.number]))
                elif message["kind"] == "leave":
                    self.last = End(**message["end"])
            self.link.send(kind="beat", clock_s=time.time())
            time.sleep(0.02)

    def act(self, end: End | str) -> None:
        self.is_running = True
        if end == "die":
            self.link.close()
        elif end == "stop":
            self.link.send(kind="stop")
            self.say(KILLED)
        elif end == "stop early":
            self.link.send(kind="stop")
            self.say(STOPPED_EARLY)
        elif callable(end):
            end(self)
        elif end == "stacks":
            self.link.send(kind="stacks")
            self.say(End("hang", "no progress", 1, "b"))
        elif end != "wait":
            self.say(end)

    def say(self, end: End) -> None:
        self.is_running = False
        self.link.send(kind="ended", end=asdict(end))


class Job:
    """A head and the port of its ear."""

    def __init__(
        self,
        tmp_path,
        *overrides: str,
        num_nodes: int = 2,
        max_restarts: int = 2,
        start_timeout_s: float = 5,
        silence_s: float = 2.0,
    ):
        self.config = load_config(write_config(tmp_path / "c.yaml"), list(overrides))
        self.run_dir, ear = tmp_path / "run", listen(0, "127.0.0.1")
        self.port = ear.getsockname()[1]
        topology = Topology("variables", "7", num_nodes, 0, "x", self.port, NAMES[:num_nodes], 1, 0)
        limits = Limits(start_timeout_s=start_timeout_s, silence_s=silence_s, max_restarts=max_restarts)
        self.head = Head(ear, topology, self.config, limits, is_check=False)
        self.head.start()

    def play(self, *ends: list, **facts) -> list[PretendedNode]:
        """One node for each list of ends, until all are told to leave."""
        nodes = [PretendedNode(self.port, number, own, **facts) for number, own in enumerate(ends)]
        self.head.join(20)
        for node in nodes:
            node.join(5)
        assert not self.head.is_alive()
        return nodes

    @property
    def status(self) -> dict:
        return read_status(self.run_dir)


KILLED = End("killed", "rank 1 was killed", 1, "b")


def test_all_nodes_are_started_at_one_address_and_told_the_same_end(tmp_path):
    job = Job(tmp_path)
    a, b = job.play([End(DONE)], [End(DONE)])
    assert a.starts == b.starts and len(a.starts) == 1
    assert a.last == b.last and a.last.kind == DONE
    assert (job.status["state"], job.status["restarts"], job.status["job_id"]) == ("done", 0, "7")
    assert "end" not in a.heard


def test_where_one_node_hangs_all_show_their_stacks_before_any_ends(tmp_path):
    job = Job(tmp_path, max_restarts=0)
    a, b = job.play(["wait"], ["stacks"])
    assert a.last.kind == "hang"
    assert [kind for kind in a.heard if kind != "beat"] == ["start", "stacks", "end", "leave"]


def test_a_fault_ends_the_other_nodes_and_all_are_started_again(tmp_path):
    job = Job(tmp_path)
    a, b = job.play(["wait", End(DONE)], [KILLED, End(DONE)])
    assert len(a.starts) == 2 and a.starts[0] != a.starts[1]  # a store of its own for each attempt
    assert "end" in a.heard and a.last.kind == DONE
    assert (job.status["state"], job.status["restarts"]) == ("done", 1)


def test_beyond_the_limit_the_first_cause_is_the_jobs(tmp_path):
    job = Job(tmp_path, max_restarts=1)
    a, b = job.play(["wait"] * 2, [KILLED] * 2)
    assert a.last == b.last == KILLED
    assert {key: job.status[key] for key in ("state", "kind", "reason", "node", "rank", "restarts")} == {
        "state": "failed", "kind": "killed", "reason": "rank 1 was killed", "node": "b", "rank": 1, "restarts": 1,
    }  # fmt: skip


@pytest.mark.parametrize("end", [End("mistake", "m"), End("fault", "f"), End(STOPPED, "s")])
def test_what_would_come_again_or_was_asked_for_is_not_started_again(tmp_path, end):
    job = Job(tmp_path)
    a, b = job.play([end], [end])
    assert len(a.starts) == 1 and b.last == end


def test_a_node_that_is_gone_ends_the_job(tmp_path):
    job = Job(tmp_path)
    a, _ = job.play(["wait"], ["die"])
    assert (a.last.kind, a.last.node, a.last.reason) == ("unreachable", "b", "node b has closed its line")
    assert job.status["node"] == "b" and len(a.starts) == 1


def test_a_node_that_falls_silent_ends_the_job(tmp_path):
    job = Job(tmp_path)
    silent = connect("127.0.0.1", job.port)
    facts = NodeFacts("b", num_procs=1, free_bytes=1 << 40).message()
    silent.send(kind="hello", node_rank=1, job_id="7", facts=facts, clock_s=time.time())
    (a,) = job.play(["wait"])
    assert (a.last.kind, a.last.node) == ("unreachable", "b") and "has not been heard from for 2 s" in a.last.reason


def test_a_request_to_stop_is_no_reason_to_start_again(tmp_path):
    job = Job(tmp_path)
    a, b = job.play(["wait"], ["stop"])
    assert len(a.starts) == 1 and a.last == KILLED


def test_a_request_to_stop_between_two_attempts_ends_the_job_as_stopped(tmp_path):
    job = Job(tmp_path)
    nodes = [PretendedNode(job.port, number, ends) for number, ends in enumerate((["wait"], [KILLED]))]
    while not job.config or job.status.get("state") != "starting":
        time.sleep(0.01)
    with open(tmp_path / "run" / ".lock", "w") as lock:  # what the killed rank has not let go of yet
        fcntl.flock(lock, fcntl.LOCK_EX)
        while job.status.get("state") != "failed":
            time.sleep(0.01)
        nodes[0].link.send(kind="stop")
        nodes[0].join(5)
    assert nodes[0].last.kind == STOPPED and len(nodes[0].starts) == 1
    assert job.status["state"] == "stopped"


def test_a_stop_that_one_node_hears_just_before_its_start_ends_the_others_at_once(tmp_path):
    job, began = Job(tmp_path), time.monotonic()
    a, b = job.play(["wait"], ["stop early"])
    assert a.last == b.last == STOPPED_EARLY and "end" in a.heard
    assert time.monotonic() - began < 30 and job.status["state"] == "stopped"


def test_a_lock_that_outlives_its_killed_owner_ends_the_job_with_the_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(head_module, "SECONDS_FOR_LOCK", 1.0)
    job = Job(tmp_path)
    with open(tmp_path / "lock", "w") as lock:

        def die_and_hold(node: PretendedNode) -> None:
            (tmp_path / "lock").rename(tmp_path / "run" / ".lock")
            fcntl.flock(lock, fcntl.LOCK_EX)
            node.say(KILLED)

        a, b = job.play(["wait"], [die_and_hold])
    assert a.last == b.last == KILLED and len(a.starts) == 1


def test_a_hello_that_lay_unread_is_no_clock_that_is_off(tmp_path, monkeypatch):
    """As where the head waits for its disk: what comes late was sent early."""
    wait_for_lock = Head._wait_for_lock
    monkeypatch.setattr(Head, "_wait_for_lock", lambda head: (time.sleep(6.5), wait_for_lock(head))[1])
    job = Job(tmp_path, silence_s=9.0)
    first = PretendedNode(job.port, 0, [End(DONE)])
    time.sleep(6.0)
    second = PretendedNode(job.port, 1, [End(DONE)])
    for thread in (job.head, first, second):
        thread.join(10)
    assert first.last.kind == second.last.kind == DONE


def test_a_disk_that_fails_under_the_head_is_told_to_every_node(tmp_path, monkeypatch):
    def fail(*_, **__) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(head_module, "begin_status", fail)
    monkeypatch.setattr(head_module, "end_status", fail)
    a, b = Job(tmp_path).play([], [])
    assert a.last == b.last and a.last.kind == "error" and "Input/output error" in a.last.reason


def test_a_node_that_does_not_come_is_named(tmp_path):
    job = Job(tmp_path, start_timeout_s=0.5)
    (a,) = job.play([])
    assert a.last.reason.startswith("node b has not come within")
    assert (a.last.kind, job.status["state"], job.status["node"]) == ("unreachable", "failed", "b")


def test_an_unfit_node_is_named_before_anything_is_started(tmp_path):
    job = Job(tmp_path)
    first = PretendedNode(job.port, 0, [], config_digest="1")
    second = PretendedNode(job.port, 1, [], config_digest="2")
    job.head.join(10)
    first.join(5)
    assert first.last.kind == "mistake" and first.last.node == "b" and not (first.starts or second.starts)


def test_two_launchers_of_one_number_are_told(tmp_path):
    job = Job(tmp_path)
    (a, other) = (PretendedNode(job.port, 0, []) for _ in range(2))
    job.head.join(10)
    other.join(5)
    assert other.last.reason == "two launchers say that they are node a, number 0"


def test_strangers_at_the_door_change_nothing(tmp_path):
    job = Job(tmp_path)
    strangers = [socket.create_connection(("127.0.0.1", job.port)) for _ in range(4)]
    wrong = {"kind": "hello", "node_rank": 0, "job_id": "8", "facts": {}, "clock_s": 0}
    for stranger, said in zip(
        strangers, [b"GET / HTTP/1.0\n", b"7\n", json.dumps(wrong).encode() + b"\n"], strict=False
    ):
        stranger.sendall(said)
    a, b = job.play([End(DONE)], [End(DONE)])
    assert a.last.kind == b.last.kind == DONE


def test_a_run_that_another_job_trains_is_refused_and_its_status_is_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(head_module, "SECONDS_FOR_LOCK", 3.0)  # longer than a node waits for a sign of the head
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "running", "job_id": "7"}')
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = Job(tmp_path)
        a, b = job.play([], [])
    assert a.last == b.last and a.last.kind == "mistake" and "another process is training here" in a.last.reason
    assert a.heard.count("beat") >= 2 and a.link.silent_s < 2
    assert job.status == {"state": "running", "job_id": "7"}


def test_what_a_killed_job_left_is_waited_for(tmp_path):
    (tmp_path / "run").mkdir()
    lock = open(tmp_path / "run" / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(1.0, lock.close).start()
    job = Job(tmp_path)
    a, b = job.play([End(DONE)], [End(DONE)])
    assert a.last.kind == DONE


def test_a_finished_run_is_not_started_and_every_node_is_told(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"steps": 20, "evaluations_since_best": 0}')
    job = Job(tmp_path)
    a, b = job.play([], [])
    assert a.last == b.last == End(DONE) and not a.starts
    assert job.status == {}


def test_an_output_dir_that_cannot_be_made_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    job = Job(tmp_path, f"output_dir={tmp_path}/file/run")
    a, b = job.play([], [])
    assert a.last.kind == "mistake" and "output_dir" in a.last.reason and a.last == b.last
