"""What one node's launcher does without ranks: how it finds the head, loses it, and hears signals."""

import signal
import socket
import threading
import time

import pytest

from ptune_dist.cluster.head import Limits
from ptune_dist.cluster.link import Link, listen
from ptune_dist.cluster.node import Node, Requests
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.signs import DONE, STOPPED, End
from ptune_dist.cluster.topology import Topology
from ptune_dist.run.status import begin_status, end_status, read_status

LIMITS = Limits(start_timeout_s=5.0, silence_s=1.0, max_restarts=0)


class Heads(threading.Thread):
    """Takes one line after another: `scripts` are functions of a link that has said hello."""

    def __init__(self, *scripts):
        super().__init__(daemon=True)
        self.ear, self.scripts, self.hellos = listen(0, "127.0.0.1"), scripts, []
        self.ear.settimeout(5.0)
        self.port = self.ear.getsockname()[1]
        self.start()

    def run(self) -> None:
        for script in self.scripts:
            link = Link(self.ear.accept()[0])
            while not (hello := link.receive_one()):
                time.sleep(0.01)
            self.hellos.append(hello)
            script(link)


def node(port: int, run_dir, requests: Requests | None = None, limits: Limits = LIMITS) -> Node:
    topology = Topology("variables", "7", 2, 1, "127.0.0.1", port, ("a", "b"), 1, 0)
    facts, requests = NodeFacts("b", num_procs=1), requests or Requests()
    return Node(topology, facts, ["train", "c"], run_dir, limits, requests, port=port, ends_with_parent=False)


def leave(link: Link) -> None:
    link.send(kind="leave", end={"kind": DONE})


def start(link: Link, heard: list) -> None:
    """One attempt, and what the node says until its end."""
    link.send(kind="start", address="127.0.0.1", port=1)
    while not any(message["kind"] == "ended" for message in heard):
        heard.extend(link.receive())
        time.sleep(0.01)
    leave(link)


def keep(link: Link, seconds: float = 5.0) -> None:
    """Open, and silent after a word."""
    link.send(kind="beat", clock_s=0)
    time.sleep(seconds)
    link.close()


def test_a_node_ends_as_the_head_says(tmp_path):
    heads = Heads(leave)
    assert node(heads.port, tmp_path).run() == End(DONE)
    (hello,) = heads.hellos
    assert (hello["node_rank"], hello["job_id"], hello["facts"]["node"]) == (1, "7", "b")


def test_the_head_of_an_earlier_start_that_is_leaving_is_not_the_jobs(tmp_path):
    """A requeued job may come back before its first head has closed its port."""
    heads = Heads(Link.close, Link.close, leave)
    assert node(heads.port, tmp_path).run() == End(DONE)
    assert len(heads.hellos) == 3


@pytest.mark.parametrize(
    "lose", [keep, lambda link: (link.send(kind="beat", clock_s=0), time.sleep(0.3), link.close())]
)
def test_a_head_that_is_gone_ends_the_node_and_stands_in_the_status(tmp_path, lose):
    begin_status(tmp_path, "7", in_place=False)
    end = node(Heads(lose).port, tmp_path).run()
    assert (end.kind, end.node) == ("unreachable", "a") and "says node b" in end.reason
    assert read_status(tmp_path)["reason"] == end.reason


def test_a_head_that_is_gone_after_the_end_does_not_change_how_the_run_ended(tmp_path):
    begin_status(tmp_path, "7", in_place=False)
    end_status(tmp_path, End(STOPPED, "by request"))
    assert node(Heads(keep).port, tmp_path).run().kind == "unreachable"
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["reason"]) == ("stopped", "by request")


def test_a_request_to_stop_ends_the_search_for_a_head(tmp_path):
    with socket.socket() as taken:  # bound and not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        requests = Requests()
        threading.Timer(0.3, requests._handle, (signal.SIGTERM, None)).start()
        end = node(taken.getsockname()[1], tmp_path, requests).run()
    assert end == End(STOPPED, "asked to stop before the start")


def test_a_head_that_never_answers_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        end = node(port, tmp_path, limits=Limits(1.0, 1.0, 0)).run()
    assert (end.kind, end.node) == ("unreachable", "a")
    assert end.reason.startswith(f"node b cannot reach the head node 127.0.0.1 (127.0.0.1, port {port}) within 1 s")


def test_ranks_that_cannot_be_started_are_a_fault_of_the_node(tmp_path, monkeypatch):
    monkeypatch.setattr("ptune_dist.cluster.ranks.sys.executable", str(tmp_path / "no-python"))
    heard = []
    assert node(Heads(lambda link: start(link, heard)).port, tmp_path).run() == End(DONE)
    (end,) = [message["end"] for message in heard if message["kind"] == "ended"]
    assert (end["kind"], end["node"]) == ("fault", "b") and "no-python" in end["reason"]


def test_a_stop_that_comes_with_the_start_is_told_and_no_rank_is_started(tmp_path):
    heard, requests = [], Requests()

    def stop_and_start(link: Link) -> None:
        requests._handle(signal.SIGUSR2, None)
        start(link, heard)

    assert node(Heads(stop_and_start).port, tmp_path, requests).run() == End(DONE)
    assert {"kind": "stop"} in heard
    assert [m["end"]["kind"] for m in heard if m["kind"] == "ended"] == [STOPPED]


@pytest.mark.parametrize(("before", "is_heard"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_stops_the_job_unless_nohup_says_otherwise(before, is_heard):
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    kept = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, before)
        requests = Requests()
        requests.listen()
        signal.raise_signal(signal.SIGHUP)
        assert requests.to_stop == is_heard
    finally:
        for number, handler in zip(numbers, kept, strict=True):
            signal.signal(number, handler)
