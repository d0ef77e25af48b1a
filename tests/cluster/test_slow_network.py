"""The network on which the exchange between replicas is measured is as slow as it claims to be."""

import os
import sys

import pytest

from tests.cluster.slow_network import SlowNetwork, find_obstacle, wait_until

DELAY_S = 0.1
RATE = "1mbit"
NUM_BYTES = 25_000
SERVE = """
import socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    while connection.recv(65536):
        pass
    connection.sendall(b"x")
"""
SEND = f"""
import socket, time
began = time.monotonic()
connection = socket.create_connection(("b", 5000))
print(time.monotonic() - began)
began = time.monotonic()
connection.sendall(bytes({NUM_BYTES}))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print(time.monotonic() - began)
"""

pytestmark = pytest.mark.skipif(bool(find_obstacle()), reason=find_obstacle())


def test_what_is_sent_comes_late_and_slowly(tmp_path):
    env = dict(os.environ)
    with SlowNetwork(["a", "b"], RATE, DELAY_S) as network:
        network.start("b", [sys.executable, "-c", SERVE], env, tmp_path / "b")
        wait_until(lambda: "ready" in (tmp_path / "b").read_text(), 20, "the server")
        before = network.bytes_sent("a")
        assert network.start("a", [sys.executable, "-c", SEND], env, tmp_path / "a").wait(20) == 0
        sent = network.bytes_sent("a") - before
    connect_s, send_s = map(float, (tmp_path / "a").read_text().split())
    assert connect_s >= 2 * DELAY_S
    assert send_s >= 2 * DELAY_S + 0.9 * NUM_BYTES / (1e6 / 8)  # a burst of it may go at once
    assert sent >= NUM_BYTES
