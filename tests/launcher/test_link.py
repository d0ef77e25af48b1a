"""The connection between launchers: what arrives, how long it was silent, and who is disconnected."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ptune_dist.cluster.link import MAX_MESSAGE_BYTES, Link, connect, free_port, listen, resolve
from ptune_dist.errors import UserError


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    here, there = (Link(end) for end in connected_sockets())
    yield here, there
    here.close()
    there.close()


def connected_sockets() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    listener = listen(0, "127.0.0.1")
    one = socket.create_connection(listener.getsockname())
    listener.setblocking(True)
    other, _ = listener.accept()
    listener.close()
    return one, other


def receive_soon(link: Link) -> list[dict[str, Any]]:
    """What arrives within a second."""
    found: list[dict[str, Any]] = []
    give_up_at = time.monotonic() + 1
    while not found and link.is_open and time.monotonic() < give_up_at:
        found = link.receive()
        time.sleep(0.005)
    return found


def test_messages_arrive_whole_and_in_order(pair: tuple[Link, Link]):
    here, there = pair
    assert there.receive() == []
    for number in range(3):
        here.send(kind="beat", number=number)
    time.sleep(0.05)
    assert there.receive_one()["number"] == 0
    assert [message["number"] for message in receive_soon(there)] == [1, 2]
    assert there.receive_one() is None


def test_a_message_in_two_packets_is_one_message(pair: tuple[Link, Link]):
    here, there = pair
    here._socket.sendall(b'{"kind": "be')
    time.sleep(0.05)
    assert there.receive() == []
    here._socket.sendall(b'at"}\n')
    assert receive_soon(there) == [{"kind": "beat"}]


def test_silence_counts_from_the_last_message_and_is_infinite_on_a_closed_link(pair: tuple[Link, Link]):
    here, there = pair
    time.sleep(0.1)
    assert 0.1 <= there.silent_s < 5
    here.send(kind="beat")
    receive_soon(there)
    assert there.silent_s < 0.1
    here.close()
    assert receive_soon(there) == [] and not there.is_open
    assert there.silent_s == float("inf")
    there.send(kind="beat")  # has no effect


def test_messages_sent_right_before_closing_arrive(pair: tuple[Link, Link]):
    here, there = pair
    here.send(kind="ended")
    here.close()
    time.sleep(0.05)
    assert there.receive() == [{"kind": "ended"}]
    assert there.receive() == [] and not there.is_open


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\x00\n", b"[1, 2]\n", b"5\n", b'{"no": "kind"}\n', b"\n"]
)
def test_a_stranger_is_disconnected(garbage: bytes):
    own, strangers = connected_sockets()
    link = Link(own)
    strangers.sendall(garbage)
    assert receive_soon(link) == [] and not link.is_open
    strangers.close()


def test_a_stranger_that_never_ends_its_line_is_disconnected():
    own, strangers = connected_sockets()
    link = Link(own)
    sender = threading.Thread(target=send_until_closed, args=(strangers,), daemon=True)
    sender.start()
    give_up_at = time.monotonic() + 10
    while link.is_open and time.monotonic() < give_up_at:
        assert link.receive() == []
    assert not link.is_open
    assert len(link._received) <= MAX_MESSAGE_BYTES + 65536
    sender.join(5)


def send_until_closed(stranger: socket.socket) -> None:
    try:
        while True:
            stranger.sendall(b"x" * 65536)
    except OSError:
        stranger.close()


def test_a_port_in_use_is_the_users_to_change():
    with listen(0, "127.0.0.1") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of the head node: Address already in use: set PTUNE_PORT"):
            listen(port, "127.0.0.1")


def test_a_link_needs_a_listener_and_an_address_needs_a_known_name():
    assert connect("127.0.0.1", free_port()) is None
    assert resolve("no-such-host.invalid") is None
    assert resolve("127.0.0.1") == "127.0.0.1"
