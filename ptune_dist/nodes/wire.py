"""A connection between two nodes: each side proves that it knows the secret, then messages flow both ways.

The side that listens asks with a random text, the side that connects answers with its hello, and gets a proof in
return (cluster/secret.py). A hello names whom it is meant for, so no third node can pass it on.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptune_dist.cluster.secret import (
    REMEDY,
    is_signed_hello,
    is_signed_welcome,
    random_text,
    sign_hello,
    sign_welcome,
)
from ptune_dist.nodes.frames import Decoder, Message, Parts, encode
from ptune_dist.nodes.run_facts import Facts, describe_difference, digest_facts, shorten

HANDSHAKE_S = 5.0


@dataclass(frozen=True)
class Identity:
    """What a side shows of itself. id: may change while connections are made, so each gets the present one."""

    id: str
    name: str
    secret: str
    run: Facts  # equal on all nodes


class Wire(asyncio.Protocol):
    """One side of a connection. `peer` is the other side's id once both are proved.

    expected: the id of the node that we have connected to; None on the side that listens.
    """

    def __init__(
        self,
        identity: Identity,
        expected: str | None,
        on_open: Callable[["Wire"], None],
        on_message: Callable[["Wire", Message, Parts], None],
        on_close: Callable[["Wire"], None],
    ):
        self.peer = ""
        self.peer_name = ""
        self.refusal = ""  # why the other side does not want this node: one line for its user
        self.is_stranger = False  # another node listens at the address than the one expected
        self.is_garbled = False  # what the other side has sent is not what a node sends
        self.is_silent = False  # the other side has not proved itself in time
        self.error: Exception | None = None  # that the connection ended with
        self.heard_at = asyncio.get_running_loop().time()
        self.closed = asyncio.get_running_loop().create_future()
        self.opened = asyncio.get_running_loop().create_future()
        self._identity = identity
        self._expected = expected
        self._on_open = on_open
        self._on_message = on_message
        self._on_close = on_close
        self._nonce = random_text()
        self._asked = ""
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None

    @property
    def is_open(self) -> bool:
        return bool(self.peer) and not self.closed.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._expected is None:
            self.send({"kind": "challenge", "nonce": self._nonce, "id": self._identity.id})
        asyncio.get_running_loop().call_later(HANDSHAKE_S, self._give_up)

    def _give_up(self) -> None:
        if not self.peer and not self.closed.done():
            self.is_silent = True
            self.close()

    def data_received(self, data: bytes) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        try:
            while found := self._decoder.feed(data):
                data = b""
                for message, parts in found:
                    self._receive(message, parts)
        except (ValueError, KeyError, TypeError, RecursionError):  # not a node, or not of this version
            self.is_garbled = True
            self.close()

    def _receive(self, message: Message, parts: Parts) -> None:
        if self.closed.done():
            return
        if self.peer:
            self._on_message(self, message, parts)
        elif self._expected is None:
            self._take_hello(message)
        else:
            self._take_answer(message)

    def _take_hello(self, hello: Message) -> None:
        plain = {key: value for key, value in hello.items() if key != "sizes"}
        if hello["kind"] != "hello" or hello["to"] != self._identity.id:
            return self.close()
        if not is_signed_hello(self._identity.secret, self._nonce, plain):
            return self._refuse(f"their secrets differ: {REMEDY}")
        if hello["run_key"] != digest_facts(self._identity.run):
            return self._refuse("", run=shorten(self._identity.run))
        self.send({"kind": "welcome", "proof": sign_welcome(self._identity.secret, hello["nonce"], self._nonce)})
        self._open(str(hello["id"]), str(hello["name"]))

    def _refuse(self, why: str, **more: Any) -> None:
        self.send({"kind": "refused", "by": self._identity.name, "why": why, **more})
        self.close()

    def _take_answer(self, message: Message) -> None:
        own = self._identity
        if message["kind"] == "challenge" and not self._asked:
            if message["id"] != self._expected:
                self.is_stranger = True
                return self.close()
            self._asked = str(message["nonce"])
            hello = {"kind": "hello", "to": self._expected, "id": own.id, "name": own.name}
            hello |= {"run_key": digest_facts(own.run), "nonce": self._nonce}
            self.send(sign_hello(own.secret, self._asked, hello))
        elif message["kind"] == "refused":
            by = str(message["by"])
            why = message["why"] or describe_difference(own.run, message["run"], by)
            self.refusal = f"node {own.name} is refused by node {by}: {why}"
            self.close()
        elif message["kind"] == "welcome" and is_signed_welcome(
            own.secret, self._nonce, self._asked, {"proof": message["proof"]}
        ):
            self._open(self._expected or "", "")
        else:
            self.close()

    def _open(self, peer: str, name: str) -> None:
        self.peer = peer
        self.peer_name = name
        self._decoder.is_trusted = True
        if not self.opened.done():
            self.opened.set_result(True)
        self._on_open(self)

    def send(self, message: Message, parts: Parts | None = None) -> None:
        if self._transport and not self.closed.done():
            self._transport.writelines(encode(message, parts or []))

    def close(self) -> None:
        """Close after what has been sent."""
        if self._transport:
            self._transport.close()
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self._end()

    def _end(self) -> None:
        if not self.closed.done():
            self.closed.set_result(True)
            if not self.opened.done():
                self.opened.set_result(False)
            self._on_close(self)
