"""A line between two launchers: JSON, one message a line, and how long the other has been silent.

Floor 6.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ptune_dist.errors import UserError

Message = dict[str, Any]
MOST_BYTES = 1 << 20  # of a message: whoever sends more is no launcher
SECONDS_TO_SEND = 5.0
SECONDS_BETWEEN_BEATS = 1.0
OWN_GAP_S = 5.0  # between two looks of a launcher's own: more means that it was stopped, or waited for a disk


class Link:
    """Messages both ways over a socket. A link that fails is closed and stays so."""

    def __init__(self, connection: socket.socket):
        self._socket, self._received, self._messages = connection, b"", []
        self._socket.settimeout(SECONDS_TO_SEND)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_open, self.heard_at = True, time.monotonic()
        self._sending, self._poll = threading.Lock(), select.poll()
        self._poll.register(connection, select.POLLIN)

    def keep_beating(self, is_awake: Callable[[], bool] = lambda: True) -> None:
        """A sign of life every second from now on, whatever the launcher is busy with, while it is awake."""

        def beat() -> None:
            while self.is_open and is_awake():
                self.send(kind="beat", clock_s=time.time())
                time.sleep(SECONDS_BETWEEN_BEATS)

        threading.Thread(target=beat, daemon=True).start()

    @property
    def silent_s(self) -> float:
        """Seconds since the other was last heard; endless where the line is closed."""
        return time.monotonic() - self.heard_at if self.is_open else float("inf")

    @property
    def own_address(self) -> str:
        """By which the other reaches this node."""
        return self._socket.getsockname()[0]

    def send(self, **message: Any) -> None:
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.close()

    def receive(self) -> list[Message]:
        """The messages that are here, without waiting."""
        self._read()
        messages, self._messages = self._messages, []
        return messages

    def receive_one(self) -> Message | None:
        """The first message, if it is here; the others stay."""
        self._read()
        return self._messages.pop(0) if self._messages else None

    def _read(self) -> None:
        try:
            if not (self.is_open and self._poll.poll(0)):
                return
            data = self._socket.recv(65536)
            if not data or len(self._received) > MOST_BYTES:
                raise ConnectionError
            *lines, self._received = (self._received + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
            if not all(isinstance(message, dict) and "kind" in message for message in messages):
                raise ValueError
        except (OSError, ValueError, RecursionError):  # JSON that is nested thousands of times
            return self.close()
        self._messages += messages
        self.heard_at = time.monotonic()

    def close(self) -> None:
        self.is_open = False
        with contextlib.suppress(OSError):
            self._socket.close()


def listen(port: int, address: str = "") -> socket.socket:
    """The head's ear, on every interface where no address is given. Raises UserError where the port is taken."""
    ear = socket.socket()
    ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        ear.bind((address, port))
    except OSError as error:
        ear.close()
        raise UserError(f"port {port} of the head node: {error.strerror}: set PTUNE_PORT to a free one") from None
    ear.listen(1024)
    ear.setblocking(False)
    return ear


def resolve(head: str) -> str | None:
    """The IPv4 address of a name."""
    try:
        return socket.getaddrinfo(head, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None


def connect(address: str, port: int) -> Link | None:
    """One try."""
    try:
        return Link(socket.create_connection((address, port), timeout=3.0))
    except OSError:
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
