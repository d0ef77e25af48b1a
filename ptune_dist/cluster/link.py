"""A connection between two launchers: one JSON message a line, and how long the other side has been silent."""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from ptune_dist.errors import UserError

Message = dict[str, Any]
MAX_MESSAGE_BYTES = 1 << 20  # whoever sends more is not a launcher
SEND_TIMEOUT_S = 5.0
HEARTBEAT_INTERVAL_S = 1.0
OWN_PAUSE_S = 5.0  # a longer gap between two checks means that this launcher was suspended or waited for a disk


def is_always_awake() -> bool:
    return True


class Link:
    """Messages in both directions over a socket. A link that fails is closed and stays closed."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(SEND_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_open = True
        self.heard_at = time.monotonic()
        self._socket = connection
        self._received = b""
        self._messages: list[Message] = []
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def start_heartbeat(self, is_awake: Callable[[], bool] = is_always_awake) -> None:
        """Send a heartbeat every second from a thread, however busy the launcher is, as long as it is awake."""

        def send_heartbeats() -> None:
            while self.is_open and is_awake():
                self.send(kind="beat", clock_s=time.time())
                time.sleep(HEARTBEAT_INTERVAL_S)

        threading.Thread(target=send_heartbeats, daemon=True).start()

    @property
    def silent_s(self) -> float:
        """Seconds since the last message; infinite on a closed link."""
        return time.monotonic() - self.heard_at if self.is_open else float("inf")

    @property
    def own_address(self) -> str:
        """The address of this node that the other side can reach."""
        return self._socket.getsockname()[0]

    def send(self, **message: Any) -> None:
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.close()

    def receive(self) -> list[Message]:
        """The messages that have arrived, without waiting."""
        self._read()
        messages = self._messages
        self._messages = []
        return messages

    def receive_one(self) -> Message | None:
        """The first message, if one has arrived; later ones stay queued."""
        self._read()
        return self._messages.pop(0) if self._messages else None

    def _read(self) -> None:
        try:
            if not (self.is_open and self._poll.poll(0)):
                return
            data = self._socket.recv(65536)
            if not data or len(self._received) > MAX_MESSAGE_BYTES:
                raise ConnectionError
            *lines, self._received = (self._received + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
            if not all(isinstance(message, dict) and "kind" in message for message in messages):
                raise ValueError
        except (OSError, ValueError, RecursionError):  # JSON nested thousands of levels deep
            return self.close()
        self._messages += messages
        self.heard_at = time.monotonic()

    def close(self) -> None:
        self.is_open = False
        with contextlib.suppress(OSError):
            self._socket.close()


def listen(port: int, address: str = "") -> socket.socket:
    """The head's listening socket, by default on every interface. Raises UserError if the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise UserError(f"port {port} of the head node: {error.strerror}: set PTUNE_PORT to a free port") from None
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def resolve(head: str) -> str | None:
    """The IPv4 address of a host name; None if it does not resolve."""
    try:
        return str(socket.getaddrinfo(head, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def connect(address: str, port: int) -> Link | None:
    """A link to a listening launcher, after a single attempt; None if nobody answers."""
    try:
        return Link(socket.create_connection((address, port), timeout=3.0))
    except OSError:
        return None


def find_interface(address: str) -> str:
    """The network interface with this address, "" if there is none. gloo would resolve the host's own name instead."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
