"""Links to the other nodes, one to each. They are made again when they break, and carry signs of life."""

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from ptune_dist.errors import UserError
from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.dial import CONNECT_S, NoWire, dial, is_refusal
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.settings import MAX_PORT, Limits, split_address
from ptune_dist.nodes.suspicion import LinkState
from ptune_dist.nodes.wire import Identity, Wire

REDIAL_S = 0.3
OWN_PAUSE_S = 2.0  # a longer gap between two ticks: what others sent meanwhile has not been read yet
FORGET_S = 30.0  # a link to nobody's interest that has been silent for so long is closed


@dataclass
class Peer:
    """A node that this one is linked to, or wants to be."""

    down_since: float
    member: Member | None = None
    is_dialed: bool = False  # by this node; else the other side connects, and this one looks whether it still listens
    wire: Wire | None = None
    was_open: bool = False
    is_refused: bool = False
    problem: NoWire | None = None  # why the last try to connect has failed
    problem_since: float = 0.0
    tried_at: float = 0.0
    attempt: asyncio.Task | None = None

    @property
    def is_open(self) -> bool:
        return self.wire is not None and self.wire.is_open


class Mesh:
    """Used in the thread of its event loop only, but for `link_state`."""

    def __init__(
        self,
        identity: Callable[[], Identity],
        contexts: tuple[ssl.SSLContext, ssl.SSLContext] | tuple[None, None],
        limits: Limits,
        on_up: Callable[[str], None],
        on_down: Callable[[str], None],
        on_message: Callable[[str, Message, Parts], None],
    ):
        self.refusal = ""  # why a node has refused this one
        self._identity = identity
        self._server_context, self._client_context = contexts
        self._limits = limits
        self._on_up = on_up
        self._on_down = on_down
        self._on_message = on_message
        self._peers: dict[str, Peer] = {}
        self._server: asyncio.Server | None = None
        self._beat_at = self._ticked_at = 0.0

    async def listen(self, address: str) -> int:
        """The port that is bound. Raises UserError."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: self._wire(None), host or None, int(port), ssl=self._server_context
            )
        except socket.gaierror:
            raise UserError(f"the nodes' address to listen at, {address}: the name does not resolve") from None
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise UserError(f"the nodes' address to listen at, {address}: {reason}") from None
        except (ValueError, OverflowError):
            needed = f"HOST:PORT is needed, with a port of at most {MAX_PORT}"
            raise UserError(f"the nodes' address to listen at, {address}: {needed}") from None
        return self._server.sockets[0].getsockname()[1]

    def _wire(self, expected: str | None) -> Wire:
        return Wire(self._identity(), expected, self._opened, self._received, self._closed)

    def connect(self, members: tuple[Member, ...], own_id: str) -> None:
        """Keep links to all of these. Of two members the later connects; who is not among them connects to all."""
        now = asyncio.get_running_loop().time()
        ids = [member.id for member in members]
        own_index = ids.index(own_id) if own_id in ids else len(ids)
        for peer in self._peers.values():
            peer.member = None
        for index, member in enumerate(members):
            if index != own_index:
                peer = self._peers.setdefault(member.id, Peer(now))
                peer.member = member
                peer.is_dialed = index < own_index

    def drop_all(self) -> None:
        peers = list(self._peers.values())
        self._peers.clear()
        for peer in peers:
            if peer.attempt:
                peer.attempt.cancel()
            if peer.wire:
                peer.wire.close()

    def close(self) -> None:
        self.drop_all()
        if self._server:
            self._server.close()

    def send(self, node: str, message: Message, parts: Parts) -> None:
        peer = self._peers.get(node)
        if peer and peer.wire and peer.is_open:
            peer.wire.send(message, parts)

    def link_state(self, node: str) -> LinkState:
        """May be called in any thread."""
        now = time.monotonic()  # the clock of event loops
        peer = self._peers.get(node)
        if peer is None:
            return LinkState(False)
        if peer.wire and peer.is_open:
            return LinkState(True, silent_s=now - peer.wire.heard_at)
        return LinkState(False, down_s=now - peer.down_since, was_open=peer.was_open, is_refused=peer.is_refused)

    def linked(self) -> list[str]:
        return [node for node, peer in self._peers.items() if peer.is_open]

    def tick(self, beat: Callable[[], Message]) -> None:
        """Call several times a second."""
        now = asyncio.get_running_loop().time()
        if now - self._ticked_at > OWN_PAUSE_S:
            for peer in self._peers.values():
                peer.down_since = now
                peer.problem = None
                if peer.wire:
                    peer.wire.heard_at = now
        self._ticked_at = now
        for node, peer in list(self._peers.items()):
            self._mend(node, peer, now)
        if now - self._beat_at >= self._limits.beat_s:
            self._beat_at = now
            message = beat()
            for peer in self._peers.values():
                if peer.wire and peer.is_open:
                    peer.wire.send(message)

    def _mend(self, node: str, peer: Peer, now: float) -> None:
        is_trying = peer.attempt is not None and not peer.attempt.done()
        if peer.wire and peer.is_open:
            if peer.member is None and now - peer.wire.heard_at > FORGET_S:
                peer.wire.close()
        elif peer.member is None:
            if not is_trying:
                self._peers.pop(node)
        elif not is_trying and now - peer.tried_at >= REDIAL_S:
            peer.tried_at = now
            attempt = self._dial(peer, peer.member) if peer.is_dialed else self._probe(peer, peer.member)
            peer.attempt = asyncio.create_task(attempt)

    async def _dial(self, peer: Peer, member: Member) -> None:
        try:
            wire = await dial(lambda: self._wire(member.id), member.address, self._client_context)
        except NoWire as failure:
            if peer.problem is None or peer.problem.is_mistake != failure.is_mistake:
                peer.problem_since = asyncio.get_running_loop().time()
            peer.problem = failure
            peer.is_refused = failure.is_refused
        else:
            self.refusal = wire.refusal or self.refusal

    def problems(self) -> list[tuple[Member, NoWire, float]]:
        """The nodes that this one cannot connect to, why, and for how many seconds."""
        now = asyncio.get_running_loop().time()
        wanted = [peer for peer in self._peers.values() if peer.member and not peer.is_open]
        return [
            (peer.member, peer.problem, now - peer.problem_since) for peer in wanted if peer.member and peer.problem
        ]

    async def _probe(self, peer: Peer, member: Member) -> None:
        """Look whether the process of a node, which connects to us, still listens."""
        try:
            host, port = split_address(member.address)
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), CONNECT_S)
        except (OSError, TimeoutError, ValueError) as error:
            peer.is_refused = peer.is_refused or (isinstance(error, OSError) and is_refusal(error))
        else:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _opened(self, wire: Wire) -> None:
        peer = self._peers.setdefault(wire.peer, Peer(asyncio.get_running_loop().time()))
        before = peer.wire
        peer.wire = wire
        peer.was_open = True
        peer.is_refused = False
        peer.problem = None
        if before:
            before.close()
        self._on_up(wire.peer)

    def _received(self, wire: Wire, message: Message, parts: Parts) -> None:
        self._on_message(wire.peer, message, parts)

    def _closed(self, wire: Wire) -> None:
        peer = self._peers.get(wire.peer)
        if peer and peer.wire is wire:
            peer.wire = None
            peer.down_since = asyncio.get_running_loop().time()
            peer.tried_at = 0.0
            self._on_down(wire.peer)
