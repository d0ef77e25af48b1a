"""What one node's launcher does without ranks: it finds the head, loses it, and handles signals."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptune_dist.cluster.head import Limits
from ptune_dist.cluster.link import Link, listen
from ptune_dist.cluster.node import Node, NodeJob
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.outcome import DONE, STOPPED, Outcome
from ptune_dist.cluster.secret import is_signed_hello, sign_welcome
from ptune_dist.cluster.stop_requests import StopRequests
from ptune_dist.cluster.topology import Topology
from ptune_dist.run.status import begin_status, end_status, read_status

SECRET = "of the test, for all its nodes"
LIMITS = Limits(start_timeout_s=5.0, silence_s=1.0, max_restarts=0)


class FakeHeads(threading.Thread):
    """Accepts one node after another; each script is a function of a link that has sent its hello."""

    def __init__(self, *scripts: Callable[[Link], Any], admits: Sequence[bool] | None = None):
        """admits: for each script whether the head proves that it knows the secret; by default it does."""
        super().__init__(daemon=True)
        self.listener = listen(0, "127.0.0.1")
        self.listener.settimeout(5.0)
        self.port = self.listener.getsockname()[1]
        self.scripts = scripts
        self.admits = admits or [script is not Link.close for script in scripts]
        self.hellos: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        for script, admits in zip(self.scripts, self.admits, strict=True):
            link = Link(self.listener.accept()[0])
            link.send(kind="challenge", nonce="asked of the node")
            hello = link.receive_one()
            while hello is None:
                time.sleep(0.01)
                hello = link.receive_one()
            assert is_signed_hello(SECRET, "asked of the node", hello)
            self.hellos.append(hello)
            if admits:
                link.send(kind="welcome", proof=sign_welcome(SECRET, hello["nonce"], "asked of the node"))
            script(link)


def make_node(
    port: int, run_dir: Path, requests: StopRequests | None = None, limits: Limits = LIMITS, **settings: Any
) -> Node:
    """Node b, whose head is node a. `settings`: other fields of NodeJob."""
    job = NodeJob(
        topology=Topology("variables", "7", 2, 1, "127.0.0.1", port, ("a", "b"), 1, 0),
        facts=NodeFacts("b", num_procs=1, free_bytes=1 << 40),
        command=["train", "c"],
        run_dir=run_dir,
        limits=limits,
        port=port,
        find_secret=lambda: SECRET,
        ends_with_parent=False,
    )
    job = replace(job, **settings)
    return Node(job, requests or StopRequests())


def leave(link: Link) -> None:
    link.send(kind="leave", end={"kind": DONE})


def start(link: Link, received: list[dict[str, Any]]) -> None:
    """Make one attempt, and collect what the node reports until its end."""
    link.send(kind="start", address="127.0.0.1", port=1)
    while not any(message["kind"] == "ended" for message in received):
        received.extend(link.receive())
        time.sleep(0.01)
    leave(link)


def fall_silent(link: Link) -> None:
    """After one message."""
    link.send(kind="beat", clock_s=0)
    time.sleep(5.0)
    link.close()


def hang_up(link: Link) -> None:
    """After one message."""
    link.send(kind="beat", clock_s=0)
    time.sleep(0.3)
    link.close()


def test_a_node_ends_as_the_head_says(tmp_path: Path):
    heads = FakeHeads(leave)
    assert make_node(heads.port, tmp_path).run() == Outcome(DONE)
    (hello,) = heads.hellos
    assert (hello["node_rank"], hello["job_id"], hello["facts"]["node"]) == (1, "7", "b")


def test_the_head_of_an_earlier_start_is_ignored(tmp_path: Path):
    """A requeued job may start before its previous head has closed its port."""
    heads = FakeHeads(Link.close, Link.close, leave)
    assert make_node(heads.port, tmp_path).run() == Outcome(DONE)
    assert len(heads.hellos) == 3


@pytest.mark.parametrize("lose", [fall_silent, hang_up])
def test_losing_the_head_ends_the_node_and_is_recorded(tmp_path: Path, lose: Callable[[Link], None]):
    begin_status(tmp_path, "7", in_place=False)
    outcome = make_node(FakeHeads(lose).port, tmp_path).run()
    assert (outcome.kind, outcome.node) == ("unreachable", "a") and "according to node b" in outcome.reason
    assert read_status(tmp_path)["reason"] == outcome.reason


def test_losing_the_head_after_the_end_does_not_change_the_status(tmp_path: Path):
    begin_status(tmp_path, "7", in_place=False)
    end_status(tmp_path, Outcome(STOPPED, "by request"))
    assert make_node(FakeHeads(fall_silent).port, tmp_path).run().kind == "unreachable"
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["reason"]) == ("stopped", "by request")


def test_a_request_to_stop_ends_the_search_for_the_head(tmp_path: Path):
    with socket.socket() as taken:  # bound but not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        requests = StopRequests()
        threading.Timer(0.3, requests.handle, (signal.SIGTERM, None)).start()
        outcome = make_node(taken.getsockname()[1], tmp_path, requests).run()
    assert outcome == Outcome(STOPPED, "asked to stop before the first step")


def test_a_head_that_never_answers_is_named(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        outcome = make_node(port, tmp_path, limits=Limits(1.0, 1.0, 0)).run()
    assert (outcome.kind, outcome.node) == ("unreachable", "a")
    expected = f"node b cannot reach the head node 127.0.0.1 (127.0.0.1, port {port}) within 1 s"
    assert outcome.reason.startswith(expected)


def test_ranks_that_cannot_be_started_are_a_fault_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ptune_dist.cluster.ranks.sys.executable", str(tmp_path / "no-python"))
    received: list[dict[str, Any]] = []
    assert make_node(FakeHeads(lambda link: start(link, received)).port, tmp_path).run() == Outcome(DONE)
    (end,) = [message["end"] for message in received if message["kind"] == "ended"]
    assert (end["kind"], end["node"]) == ("fault", "b") and "no-python" in end["reason"]


def test_a_stop_that_coincides_with_the_start_is_reported_and_starts_no_rank(tmp_path: Path):
    received: list[dict[str, Any]] = []
    requests = StopRequests()

    def stop_and_start(link: Link) -> None:
        requests.handle(signal.SIGUSR2, None)
        start(link, received)

    assert make_node(FakeHeads(stop_and_start).port, tmp_path, requests).run() == Outcome(DONE)
    assert {"kind": "stop"} in received
    assert [message["end"]["kind"] for message in received if message["kind"] == "ended"] == [STOPPED]


@pytest.mark.parametrize(("before", "is_stopped"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_stops_the_job_except_under_nohup(before: signal.Handlers, is_stopped: bool):
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    kept = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, before)
        requests = StopRequests()
        requests.listen()
        signal.raise_signal(signal.SIGHUP)
        assert requests.to_stop == is_stopped
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
