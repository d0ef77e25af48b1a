"""A node that waits to join: what it tells of the reason, and how it ends."""

import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from ptune_dist.errors import UserError
from ptune_dist.nodes import wire
from ptune_dist.nodes.group import GroupSettings, Limits, NodeGroup, StoppedWaiting
from tests.processes import free_port

SECRET = "a secret of the tests"
LIMITS = Limits(found_s=1.3, mistake_s=2.5)


@contextmanager
def node(name: str, where: Path | str, **settings):
    """A node in this process, and what it has told."""
    lines: list[str] = []
    settings = {"secret": SECRET, "listen": "127.0.0.1:0", "limits": LIMITS} | settings
    with NodeGroup(GroupSettings(name, where, **settings), lines.append) as group:
        yield group, lines


@contextmanager
def server(greeting: bytes):
    """Another program, by its address, that greets who connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def serve() -> None:
            while True:
                try:
                    kept.append(listener.accept()[0])
                    kept[-1].sendall(greeting)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_spare_that_is_asked_to_stop_leaves_without_having_joined(tmp_path):
    with node("a", tmp_path, max_nodes=1) as (first, _), node("b", tmp_path, max_nodes=1) as (spare, lines):
        first.enter(1)
        with pytest.raises(StoppedWaiting):
            spare.enter(1, lambda: any("waits as a spare" in line for line in lines))
        spare.leave()
        assert lines[-1] == "node b stopped while waiting to join"
        assert len(first.view.members) == 1


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:{port}", "connection refused"),
        pytest.param("no-host.invalid:1", "the name does not resolve", marks=pytest.mark.extended),
    ],
)
def test_a_member_that_cannot_be_reached_is_named_once(tmp_path, address, why):
    address = address.format(port=free_port())
    with node("a", tmp_path, advertise=address) as (first, _), node("b", tmp_path) as (other, lines):
        first.enter(1)
        asked = []  # several times after the line

        def is_told() -> bool:
            asked.extend(line for line in lines if why in line)
            return len(asked) > 3

        with pytest.raises(StoppedWaiting):
            other.enter(1, is_told)
        remedy = "open the port or set PTUNE_NODE_ADDRESS there"
        expected = f"node b cannot join: node a at {address}: {why}: {remedy}"
        assert [line for line in lines if "cannot join" in line] == [expected]


@pytest.mark.long
@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "what answers there is no node of this version: another program has the port"),
        (b"", "it takes the connection and tells nothing: it expects TLS (set PTUNE_TLS on all nodes or on none"),
    ],
)
def test_another_program_is_told_from_a_node_and_waiting_for_it_ends(tmp_path, monkeypatch, greeting, why):
    monkeypatch.setattr(wire, "HANDSHAKE_S", 0.3)
    with server(greeting) as address:
        with node("a", tmp_path, advertise=address) as (first, _), node("b", tmp_path) as (other, lines):
            first.enter(1)
            with pytest.raises(UserError) as error:
                other.enter(1)
        assert str(error.value).startswith(f"node b cannot join: node a at {address}: {why}")
        assert lines == [str(error.value)]
        with node("c", address, limits=Limits(mistake_s=1.0)) as (alone, lines):
            with pytest.raises(UserError) as error:
                alone.enter(1)
            assert str(error.value).startswith(f"rendezvous {address}: {why}") and lines == [str(error.value)]


def test_certificates_of_another_authority_end_a_node_after_one_line(tmp_path, certificates, monkeypatch):
    monkeypatch.setenv("PTUNE_TLS", str(certificates / "good"))
    with node("a", tmp_path) as (first, _):
        first.enter(1)
        monkeypatch.setenv("PTUNE_TLS", str(certificates / "other"))
        with node("b", tmp_path) as (other, lines), pytest.raises(UserError, match="node a at .*: TLS: .*PTUNE_TLS"):
            other.enter(1)
        assert len(lines) == 1


def test_a_rendezvous_that_nobody_serves_is_told_once():
    where = f"192.0.2.1:{free_port()}"  # of no machine
    with node("a", where) as (group, lines):
        with pytest.raises(StoppedWaiting):
            group.enter(1, lambda: bool(lines))
        assert lines[0].startswith(f"nobody serves the rendezvous at {where} (")
        assert "waits for a node that has this address" in lines[0]


def test_an_address_that_cannot_be_bound_is_named(tmp_path):
    with server(b"") as address, pytest.raises(UserError, match=f"{address}: Address already in use"):
        node("a", tmp_path, listen=address).__enter__()
    with pytest.raises(UserError, match="127.0.0.1:70000: HOST:PORT is needed, with a port of at most 65535"):
        node("a", tmp_path, listen="127.0.0.1:70000").__enter__()
    with pytest.raises(UserError, match="rendezvous: host:0: a port is a number from 1 to 65535"):
        node("a", "host:0").__enter__()
