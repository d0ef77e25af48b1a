"""Whoever knows the port and the id of a job, but not its secret, can neither join nor stop it."""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from ptune_dist.cluster import introduction, node_links
from ptune_dist.cluster.head import Limits
from ptune_dist.cluster.link import Link, connect
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.outcome import DONE, Outcome
from ptune_dist.cluster.secret import (
    FILE,
    create_secret,
    find_secret,
    is_signed_hello,
    prove,
    remove_secret,
    sign_hello,
    sign_welcome,
)
from ptune_dist.errors import UserError
from tests.conftest import write_config
from tests.launcher.fake_nodes import SECRET, FakeNode, Job
from tests.launcher.nodes import Nodes, only_line
from tests.launcher.test_node import FakeHeads, leave, make_node

FACTS = NodeFacts("b", num_procs=1, free_bytes=1 << 40).message()


def make_hello(**changes: Any) -> dict[str, Any]:
    """What node b of job 7 says."""
    own = {"kind": "hello", "node_rank": 1, "job_id": "7", "facts": FACTS, "clock_s": time.time(), "nonce": "n"}
    return own | changes


def wait_for(link: Link, kind: str) -> dict[str, Any] | None:
    """The next message of a kind; None if the link is closed before."""
    give_up_at = time.monotonic() + 5
    while time.monotonic() < give_up_at:
        message = link.receive_one()
        if message and message["kind"] == kind:
            return message
        if message is None and not link.is_open:
            return None
        time.sleep(0.01)
    raise TimeoutError(kind)


# The head


def test_those_who_do_not_speak_the_protocol_are_ignored(tmp_path: Path):
    job = Job(tmp_path)
    strangers = [socket.create_connection(("127.0.0.1", job.port)) for _ in range(4)]
    strangers[0].sendall(b"GET / HTTP/1.0\n")
    strangers[1].sendall(b"7\n")
    strangers[2].sendall(json.dumps({**make_hello(job_id="8"), "facts": {}}).encode() + b"\n")
    a, b = job.play([Outcome(DONE)], [Outcome(DONE)])
    assert a.outcome.kind == b.outcome.kind == DONE


def test_a_stranger_who_knows_the_job_cannot_join_or_stop_it(tmp_path: Path):
    job = Job(tmp_path)
    a = FakeNode(job.port, 0, [Outcome(DONE)])
    stranger = connect("127.0.0.1", job.port)
    asked = wait_for(stranger, "challenge")["nonce"]
    stranger.send(**sign_hello("another secret, a guess", asked, make_hello()))
    stranger.send(kind="stop")
    stranger.send(kind="ended", end={"kind": "mistake", "reason": "of a stranger"})
    assert wait_for(stranger, "welcome") is None and not stranger.is_open
    for unproved in (
        make_hello(),
        make_hello(proof=7),
        {"kind": "stop"},
        {"kind": "stop", "node_rank": 1, "job_id": "7"},
    ):
        stranger = connect("127.0.0.1", job.port)
        stranger.send(**unproved)
        assert wait_for(stranger, "welcome") is None
    assert job.head.is_alive() and not a.starts
    b = FakeNode(job.port, 1, [Outcome(DONE)])
    b.join(10)
    a.join(10)
    assert a.outcome == b.outcome == Outcome(DONE) and job.status["state"] == "done"


def test_an_answer_that_was_overheard_is_of_no_use(tmp_path: Path):
    """Not for another connection, and not with other contents."""
    job = Job(tmp_path)
    first = connect("127.0.0.1", job.port)
    overheard = sign_hello(SECRET, wait_for(first, "challenge")["nonce"], make_hello())
    second = connect("127.0.0.1", job.port)
    wait_for(second, "challenge")
    second.send(**overheard)
    assert wait_for(second, "welcome") is None
    first.send(**(overheard | {"node_rank": 0}))
    assert wait_for(first, "welcome") is None
    (a, b) = job.play([Outcome(DONE)], [Outcome(DONE)])
    assert a.outcome.kind == DONE


def test_a_welcome_proves_that_the_head_knows_the_secret(tmp_path: Path):
    job = Job(tmp_path)
    link = connect("127.0.0.1", job.port)
    asked = wait_for(link, "challenge")["nonce"]
    link.send(**sign_hello(SECRET, asked, make_hello()))
    assert wait_for(link, "welcome")["proof"] == sign_welcome(SECRET, "n", asked) != prove(SECRET, "node", "n", asked)
    link.close()


def test_the_oldest_of_too_many_strangers_are_disconnected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_links, "MAX_STRANGERS", 3)
    job = Job(tmp_path)
    links = []
    for _ in range(5):
        links.append(connect("127.0.0.1", job.port))
        wait_for(links[-1], "challenge")
    assert wait_for(links[0], "welcome") is None and wait_for(links[1], "welcome") is None
    (a, b) = job.play([Outcome(DONE)], [Outcome(DONE)])
    assert a.outcome.kind == DONE


def test_a_node_that_does_not_join_because_of_its_secret_is_explained(tmp_path: Path):
    job = Job(tmp_path, start_timeout_s=1.0)
    a = FakeNode(job.port, 0, [])
    other = connect("127.0.0.1", job.port)
    wait_for(other, "challenge")
    other.send(kind="no secret", node_rank=1, job_id="7")
    a.join(10)
    expected = "node b did not join within 1 s (node b does not know this job's secret: let all nodes share output_dir"
    assert a.outcome.kind == "unreachable" and a.outcome.reason.startswith(expected)


# The node


def pose_as_head(link: Link) -> None:
    """Tell a node that the job is over, with a proof of another secret."""
    link.send(kind="welcome", proof=sign_welcome("another secret, a guess", "n", "asked of the node"))
    leave(link)


def test_a_node_obeys_no_stranger_at_the_heads_address(tmp_path: Path):
    heads = FakeHeads(pose_as_head, leave, leave, admits=(False, False, True))
    assert make_node(heads.port, tmp_path).run() == Outcome(DONE)
    assert len(heads.hellos) == 3  # it tried again until the head could prove itself


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("", "node b does not have {run}/.launcher-secret, which the head node a "),
        ("x" * 20, "node b is refused by the head node a: their secrets differ: "),
    ],
)
def test_a_node_without_the_secret_ends_in_one_line_that_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, secret: str, reason: str
):
    monkeypatch.setattr(introduction, "SECONDS_FOR_SECRET", 0.6)
    job = Job(tmp_path)
    outcome = make_node(job.port, tmp_path, find_secret=lambda: secret).run()
    assert (outcome.kind, outcome.node, outcome.exit_status) == ("mistake", "b", 2)
    assert outcome.reason.startswith(reason.format(run=tmp_path))
    assert outcome.reason.endswith("let all nodes share output_dir, or set PTUNE_SECRET to the same text on every node")
    assert capsys.readouterr().out == f"launcher: {outcome.reason}\n"


def test_a_secret_that_shows_up_late_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system may hide a new file for a while."""
    monkeypatch.setattr(introduction, "SECONDS_BETWEEN_TRIES", 0.05)
    found = iter(["", "", SECRET])
    job = Job(tmp_path)
    a = FakeNode(job.port, 0, [Outcome("mistake", "the test is over")])
    patient = Limits(start_timeout_s=20.0, silence_s=10.0, max_restarts=0)
    node = make_node(job.port, tmp_path, limits=patient, find_secret=lambda: next(found))
    monkeypatch.setattr(node, "_start_ranks", lambda address, port: node._report(Outcome(DONE)))
    assert node.run().reason == "the test is over" and a.starts


# The secret


def test_the_secret_is_a_file_for_its_owner_alone_that_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PTUNE_SECRET", raising=False)
    run = tmp_path / "runs" / "a"
    assert find_secret(run) == ""
    secret = create_secret(run)
    assert re.fullmatch("[0-9a-f]{64}", secret) and find_secret(run) == create_secret(run) == secret
    assert os.listdir(run) == [FILE] and (run / FILE).stat().st_mode & 0o777 == 0o600
    (run / FILE).chmod(0o644)  # by a copy
    assert find_secret(run) == secret and (run / FILE).stat().st_mode & 0o777 == 0o600
    (run / FILE).write_text(secret[:10])  # half written
    assert find_secret(run) == "" and create_secret(run) not in ("", secret)
    remove_secret(run)
    assert not run.exists()
    with pytest.raises(UserError, match="output_dir: /proc/none"):
        create_secret(Path("/proc/none"))


def test_ptune_secret_wins_and_must_not_be_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PTUNE_SECRET", "sixteen letters.")
    assert create_secret(tmp_path) == find_secret(tmp_path) == "sixteen letters." and not list(tmp_path.iterdir())
    monkeypatch.setenv("PTUNE_SECRET", "short")
    with pytest.raises(UserError, match="PTUNE_SECRET needs at least 16 characters"):
        find_secret(tmp_path)


def test_proofs_depend_on_everything():
    hello = make_hello(proof="")
    signed = sign_hello(SECRET, "asked", make_hello(clock_s=1.5))
    assert is_signed_hello(SECRET, "asked", json.loads(json.dumps(signed)))
    for changed in (signed | {"clock_s": 1.6}, signed | {"proof": None}, signed | {"extra": 1}, hello):
        assert not is_signed_hello(SECRET, "asked", changed)
    assert not is_signed_hello(SECRET, "asked another time", signed) and not is_signed_hello("other", "asked", signed)


# launch/run.sh


@pytest.mark.long
def test_nodes_that_do_not_share_the_runs_folder_need_ptune_secret(tmp_path: Path):
    config = write_config(tmp_path / "c.yaml")
    apart = {"only_b": [f"output_dir={tmp_path}/elsewhere"]}
    nodes = Nodes(tmp_path, config, PTUNE_START_TIMEOUT_S=3, **apart)
    assert nodes.wait(20) == [1, 2], nodes.output
    assert (
        f"node b does not have {tmp_path}/elsewhere/.launcher-secret, which the head node a has written: "
        in nodes.output
    )
    nodes = Nodes(tmp_path, config, PTUNE_SECRET="of both nodes, long enough", **apart)
    assert nodes.wait(20) == [2, 2]
    assert only_line(nodes).startswith("error: node b differs from the other nodes in its config: ")


def test_a_mistake_or_a_check_leaves_no_folder(tmp_path: Path):
    nodes = Nodes(tmp_path, write_config(tmp_path / "c.yaml"), "train.max_stepz=3")
    assert nodes.wait(20) == [2, 2] and "max_stepz" in only_line(nodes)
    assert not nodes.run.exists()
