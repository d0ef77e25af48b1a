"""The line between launchers: what arrives, how long it was silent, and who is sent away."""

import socket
import threading
import time

import pytest

from ptune_dist.cluster.link import MOST_BYTES, Link, connect, free_port, listen, resolve
from ptune_dist.errors import UserError


@pytest.fixture
def pair():
    here, there = (Link(end) for end in ends())
    yield here, there
    here.close()
    there.close()


def ends() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    ear = listen(0, "127.0.0.1")
    one = socket.create_connection(ear.getsockname())
    ear.setblocking(True)
    other, _ = ear.accept()
    ear.close()
    return one, other


def received(link: Link) -> list:
    """What comes within a second."""
    found, until = [], time.monotonic() + 1
    while not found and link.is_open and time.monotonic() < until:
        found = link.receive()
        time.sleep(0.005)
    return found


def test_messages_arrive_whole_and_in_order(pair):
    here, there = pair
    assert there.receive() == []
    for number in range(3):
        here.send(kind="beat", number=number)
    time.sleep(0.05)
    assert there.receive_one()["number"] == 0
    assert [message["number"] for message in received(there)] == [1, 2]
    assert there.receive_one() is None


def test_a_message_in_two_packets_is_one(pair):
    here, there = pair
    here._socket.sendall(b'{"kind": "be')
    time.sleep(0.05)
    assert there.receive() == []
    here._socket.sendall(b'at"}\n')
    assert received(there) == [{"kind": "beat"}]


def test_silence_is_counted_from_the_last_word_and_has_no_end_on_a_closed_line(pair):
    here, there = pair
    time.sleep(0.1)
    assert 0.1 <= there.silent_s < 5
    here.send(kind="beat")
    received(there)
    assert there.silent_s < 0.1
    here.close()
    assert received(there) == [] and not there.is_open
    assert there.silent_s == float("inf")
    there.send(kind="beat")  # nothing happens


def test_the_last_words_before_a_line_closes_are_heard(pair):
    here, there = pair
    here.send(kind="ended")
    here.close()
    time.sleep(0.05)
    assert there.receive() == [{"kind": "ended"}]
    assert there.receive() == [] and not there.is_open


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\x00\n", b"[1, 2]\n", b"5\n", b'{"no": "kind"}\n', b"\n"]
)
def test_a_stranger_is_sent_away(garbage):
    mine, strangers = ends()
    link = Link(mine)
    strangers.sendall(garbage)
    assert received(link) == [] and not link.is_open
    strangers.close()


def test_a_stranger_who_never_ends_his_line_is_sent_away():
    mine, strangers = ends()
    link = Link(mine)
    sender = threading.Thread(target=lambda: send_until_closed(strangers), daemon=True)
    sender.start()
    until = time.monotonic() + 10
    while link.is_open and time.monotonic() < until:
        assert link.receive() == []
    assert not link.is_open
    assert len(link._received) <= MOST_BYTES + 65536
    sender.join(5)


def send_until_closed(stranger: socket.socket) -> None:
    try:
        while True:
            stranger.sendall(b"x" * 65536)
    except OSError:
        stranger.close()


def test_a_port_that_is_taken_is_the_users_to_change():
    with listen(0, "127.0.0.1") as ear:
        port = ear.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of the head node: Address already in use: set PTUNE_PORT"):
            listen(port, "127.0.0.1")


def test_nobody_listening_is_no_link_and_an_unknown_name_no_address():
    assert connect("127.0.0.1", free_port()) is None
    assert resolve("no-such-host.invalid") is None
    assert resolve("127.0.0.1") == "127.0.0.1"
