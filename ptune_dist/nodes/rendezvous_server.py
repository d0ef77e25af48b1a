"""A rendezvous at `host:port`, without a shared folder: a node that can bind the address serves, in its memory.

While nobody serves, because the node that did has died, a change of view is valid if most members of the view before
take part in it; the smaller side waits ALONE_S, and continues then. Whoever binds the address next serves again, and
learns the newest view from its members. So nodes that join and the smaller part of a view need the server.

What this cannot exclude, unlike a folder: if a cut separates the server with fewer nodes from the others, both sides
continue. Both compute the same steps with the same results, so nothing is lost but machine time, until the cut ends
and the others find a newer view at the server.
"""

import asyncio
import contextlib
import secrets
import ssl
from collections.abc import Callable

from ptune_dist.errors import UserError
from ptune_dist.nodes.dial import Notices, NoWire, dial
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.settings import Limits, split_address
from ptune_dist.nodes.turns import ViewRecord
from ptune_dist.nodes.wire import Identity, Wire

SERVER_ID = "rendezvous"
ANSWER_S = 5.0
RETRY_S = 0.5
NUM_TRIES = 3  # before a claim counts without the server
ALONE_S = 30.0
GRACE_S = 4.0  # after a server has started without knowing a view: members of one announce theirs every second

Contexts = tuple[ssl.SSLContext, ssl.SSLContext] | tuple[None, None]


class Registry:
    """What a server keeps. Views are claimed once, and an announced view is one that was valid without it."""

    def __init__(self, now: float):
        self.newest: ViewRecord | None = None
        self.sign = ""
        self.started = now

    def answer(self, message: Message, now: float) -> Message:
        kind = message["kind"]
        if kind == "latest":
            is_sure = self.newest is not None or now - self.started > GRACE_S
            return {"kind": "held", "view": self._json(), "sign": self.sign, "is_sure": is_sure}
        view = ViewRecord.from_json(message["view"])
        if self.newest is None or view.number > self.newest.number:
            self.newest = view
        if kind == "announce" and view == self.newest:
            self.sign = secrets.token_hex(4)
        return {"kind": "held", "view": self._json()}

    def _json(self) -> dict | None:
        return self.newest and self.newest.to_json()


class ServerRendezvous:
    def __init__(
        self,
        address: str,
        identity: Callable[[], Identity],
        contexts: Contexts,
        say: Callable[[str], None],
        mistake_s: float = Limits.mistake_s,
    ):
        """mistake_s: as in Limits, for a node that has never reached a server."""
        try:
            self._host, self._port = split_address(address)
        except ValueError as error:
            raise UserError(f"rendezvous: {address}: {error}") from None
        self._address = address
        self._identity = identity
        self._server_context, self._client_context = contexts
        self._say = say
        self._notices = Notices(say)
        self._mistake_s = mistake_s
        self._problem = NoWire("no answer")
        self._was_served = False
        self._registry: Registry | None = None
        self._server: asyncio.Server | None = None
        self._binding: asyncio.Task | None = None
        self._is_sure = False
        self._sign = ""

    async def start(self) -> None:
        await self._try_to_serve()
        self._binding = asyncio.create_task(self._keep_serving())

    async def close(self) -> None:
        if self._binding:
            self._binding.cancel()
        if self._server:
            self._server.close()

    async def _keep_serving(self) -> None:
        while self._server is None:
            await asyncio.sleep(RETRY_S)
            await self._try_to_serve()

    async def _try_to_serve(self) -> None:
        loop = asyncio.get_running_loop()
        registry = Registry(loop.time())

        def answer(wire: Wire, message: Message, parts: Parts) -> None:
            if message["kind"] in ("latest", "claim", "announce"):
                wire.send(registry.answer(message, loop.time()))

        def make() -> Wire:
            return Wire(self._shown(SERVER_ID), None, lambda _: None, answer, lambda _: None)

        with contextlib.suppress(OSError):  # not an address of this machine, or another node serves there
            self._server = await loop.create_server(make, self._host, self._port, ssl=self._server_context)
            self._registry = registry
            self._say(f"this node serves the rendezvous at {self._address}")

    def _shown(self, id: str) -> Identity:
        """Configs are compared between members, not here."""
        own = self._identity()
        return Identity(id, own.name, own.secret, {})

    async def _ask(self, message: Message) -> Message | None:
        """The server's answer; None where nobody serves."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Message] = loop.create_future()

        def take(wire: Wire, received: Message, parts: Parts) -> None:
            if not answer.done():
                answer.set_result(received)

        def make() -> Wire:
            return Wire(
                self._shown(secrets.token_hex(8)), SERVER_ID, lambda wire: wire.send(message), take, lambda _: None
            )

        try:
            wire = await dial(make, self._address, self._client_context)
        except NoWire as problem:
            self._problem = problem
            return None
        try:
            if wire.refusal:
                raise UserError(wire.refusal)
            async with asyncio.timeout(ANSWER_S):
                found = await answer
                self._was_served = True
                return found
        except TimeoutError:
            self._problem = NoWire("it does not answer in time", "")
            return None
        finally:
            wire.close()

    async def claim(self, view: ViewRecord, is_majority: bool) -> ViewRecord:
        loop = asyncio.get_running_loop()
        started = loop.time()
        num_tries = 0
        while True:
            if answer := await self._ask({"kind": "claim", "view": view.to_json()}):
                return ViewRecord.from_json(answer["view"])
            num_tries += 1
            if num_tries >= NUM_TRIES and (is_majority or loop.time() - started > ALONE_S):
                return view
            await asyncio.sleep(RETRY_S)

    async def latest(self) -> ViewRecord | None:
        num_tries = 0
        mistaken_since: float | None = None
        while (answer := await self._ask({"kind": "latest"})) is None:
            now = asyncio.get_running_loop().time()
            num_tries += 1
            line = self._describe_problem()
            if num_tries >= NUM_TRIES:
                self._notices.tell(line)
            if self._was_served or not self._problem.is_mistake:
                mistaken_since = None
            elif mistaken_since is None:
                mistaken_since = now
            elif now - mistaken_since > self._mistake_s:
                raise UserError(line)
            await asyncio.sleep(RETRY_S)
        self._is_sure = bool(answer["is_sure"])
        self._sign = str(answer["sign"])
        return ViewRecord.from_json(answer["view"]) if answer["view"] else None

    def _describe_problem(self) -> str:
        problem = self._problem
        if problem.is_mistake:
            return f"rendezvous {self._address}: {problem}"
        return (
            f"nobody serves the rendezvous at {self._address} ({problem.why}): waits for a node that has this address; "
            f"start one there, which sets it as 0.0.0.0:{self._port} where the address is not its own"
        )

    async def may_found(self) -> bool:
        return self._is_sure

    async def announce(self, view: ViewRecord) -> ViewRecord:
        answer = await self._ask({"kind": "announce", "view": view.to_json()})
        return ViewRecord.from_json(answer["view"]) if answer else view

    async def sign_of_life(self) -> str:
        return self._sign
