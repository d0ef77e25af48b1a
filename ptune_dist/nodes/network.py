"""The thread in which a node talks to the others, while its main thread trains.

One lock guards the protocol's state. The main thread takes it for moments; whatever leaves this node is handed to the
event loop, so links are used in one thread only.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ptune_dist.common import tls
from ptune_dist.errors import RunFault, UserError
from ptune_dist.nodes.agreement import Joined, Member
from ptune_dist.nodes.candidate import Candidate, Snapshot
from ptune_dist.nodes.dial import Notices
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.membership import Membership
from ptune_dist.nodes.mesh import Mesh
from ptune_dist.nodes.rendezvous import Rendezvous
from ptune_dist.nodes.settings import GroupSettings
from ptune_dist.nodes.suspicion import LinkState
from ptune_dist.nodes.turns import Rules, ViewRecord, first_plan
from ptune_dist.nodes.wire import Identity

TICK_S = 0.1
ANNOUNCE_S = 1.0  # a candidate waits several of these before it begins a group of its own
NOTICE_S = 1.0
START_S = 30.0


class Network:
    """Implements `outside.Outside` for a candidate and for the member that it becomes."""

    def __init__(self, settings: GroupSettings, say: Callable[[str], None]):
        self.settings = settings
        self.changes = threading.Condition()
        self.member: Membership | None = None
        self.candidate: Candidate | None = None
        self.fault: BaseException | None = None
        self.say = say
        self._rules = Rules(1, settings.min_nodes, settings.max_nodes)
        self._own = Member("", settings.name, "", settings.folder)
        self._address = ""
        self._is_founding = False
        self._notices = Notices(say)
        self._rendezvous: Rendezvous | None = None
        self._mesh: Mesh | None = None
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nodes", daemon=True)

    # Called by the main thread

    def start(self, make_rendezvous: Callable[["Network"], Rendezvous]) -> None:
        """Raises UserError where an address or a folder cannot be used."""
        self.contexts = tls.build_contexts(tls.read_variable())
        self._thread.start()
        starting = self.run(self._start(make_rendezvous))
        try:
            starting.result(START_S)
        except TimeoutError:
            raise RunFault(f"{self.settings.rendezvous}: no answer in {START_S:.0f} s") from None

    @property
    def mesh(self) -> Mesh:
        assert self._mesh, "start comes first"
        return self._mesh

    @property
    def rendezvous(self) -> Rendezvous:
        assert self._rendezvous, "start comes first"
        return self._rendezvous

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        if self._thread.is_alive():
            self.run(self._close()).result(START_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    async def _start(self, make_rendezvous: Callable[["Network"], Rendezvous]) -> None:
        settings = self.settings
        handlers = (self._on_up, self._on_down, self._on_message)
        mesh = self._mesh = Mesh(self.identity, self.contexts, settings.limits, *handlers)
        port = await mesh.listen(settings.listen)
        host = settings.listen.rpartition(":")[0]
        if host in ("", "0.0.0.0", "::"):
            host = socket.gethostname()
        self._address = settings.advertise or f"{host}:{port}"
        rendezvous = self._rendezvous = make_rendezvous(self)
        await rendezvous.start()
        self._spawn(self._tick())
        self._spawn(self._announce())

    async def _close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._mesh:
            self._mesh.close()
        if self._rendezvous:
            await self._rendezvous.close()
        await asyncio.sleep(0)

    def identity(self) -> Identity:
        settings = self.settings
        rules = self._rules
        own = {
            "train.min_nodes": rules.min_nodes,
            "train.max_nodes": rules.max_nodes,
            settings.blocks_key: rules.num_blocks,
        }
        return Identity(self._own.id, settings.name, settings.secret, {**settings.run, **own})

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await coroutine
            except Exception as error:
                self._fail(error)

        task = self._loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _fail(self, error: BaseException) -> None:
        """The main thread raises it."""
        with self.changes:
            self.fault = self.fault or error
            self.changes.notify_all()

    # Becoming a member

    async def enter(self, num_blocks: int, own_id: str) -> Joined:
        self.mesh.drop_all()
        with self.changes:
            was_member = self.member is not None
            self.member = None
            self._is_founding = False
            self._rules = Rules(num_blocks, self.settings.min_nodes, self.settings.max_nodes)
            self._own = Member(own_id, self.settings.name, self._address, self.settings.folder)
            candidate = self.candidate = Candidate(self._own, self, self.settings.limits, self._rules, was_member)
        polling = self._loop.create_task(self._found_if_alone(candidate))
        try:
            while not polling.done():
                with self.changes:
                    if candidate.snapshot and not self._is_founding:
                        return self._join(candidate, candidate.snapshot)
                self._check_links(candidate)
                await asyncio.sleep(TICK_S)
            return polling.result()
        finally:
            polling.cancel()

    def _check_links(self, candidate: Candidate) -> None:
        """Tell now and then what keeps this node from joining. Raises UserError where waiting does not help."""
        if self.mesh.refusal:
            raise UserError(self.mesh.refusal)
        limits = self.settings.limits
        mistakes = []
        for member, problem, seconds in self.mesh.problems():
            line = f"node {self._own.name} cannot join: node {member.name} at {member.address}: {problem}"
            if seconds > limits.found_s + NOTICE_S:  # else it may be of a group that is gone
                self._notices.tell(line)
            if problem.is_mistake and seconds > limits.mistake_s:
                mistakes.append(line)
        if mistakes and candidate.view and len(mistakes) == len(candidate.view.members):
            raise UserError(mistakes[0])

    async def _found_if_alone(self, candidate: Candidate) -> Joined:
        """Keep the candidate informed of the newest view. Returns when this node has begun a group."""
        while True:
            latest = await self.rendezvous.latest()
            sign = await self.rendezvous.sign_of_life()
            with self.changes:
                candidate.learn(latest)
                candidate.learn_sign(sign)
                candidate.ask_again()
                is_free = latest is None or not latest.members or candidate.is_group_gone()
            if is_free and (latest or await self.rendezvous.may_found()):
                self._is_founding = True
                if await self._found(0 if latest is None else latest.number):
                    return Joined()
                self._is_founding = False
            await asyncio.sleep(TICK_S)

    async def _found(self, number: int) -> bool:
        """Begin a group after view `number`, unless another node does."""
        view = ViewRecord(number + 1, (self._own,), f"{self._own.id}/founder")
        if await self.rendezvous.claim(view, False) != view:
            return False
        with self.changes:
            self.candidate = None
            plan = first_plan(self._own, self._rules)
            self.member = Membership(self._own, self._rules, self.settings.limits, self, view, plan)
        self.say(f"view {view.number}: node {self._own.name} begins")
        return True

    def _join(self, candidate: Candidate, snapshot: Snapshot) -> Joined:
        limits = self.settings.limits
        self._own = next(member for member in snapshot.view.members if member.id == self._own.id)
        member = Membership(self._own, self._rules, limits, self, snapshot.view, snapshot.plan)
        member.record = snapshot.record
        self.member = member
        self.candidate = None
        for early in candidate.early:
            member.on_message(*early)
        for node in self.mesh.linked():
            member.on_link(node)
        if self._own.name != self.settings.name:
            self.say(f"this node is called {self._own.name}: another one is {self.settings.name}")
        self.say(f"node {self._own.name} has joined in view {snapshot.view.number}, step {snapshot.step}")
        return Joined(snapshot.data, snapshot.step)

    # What comes in

    def _on_up(self, node: str) -> None:
        with self.changes:
            if part := self.member or self.candidate:
                part.on_link(node)

    def _on_down(self, node: str) -> None:
        with self.changes:
            if self.member:
                self.member.on_link_lost(node)

    def _on_message(self, node: str, message: Message, parts: Parts) -> None:
        with self.changes:
            if part := self.member or self.candidate:
                part.on_message(node, message, parts)

    async def _tick(self) -> None:
        while True:
            with self.changes:
                self.mesh.tick(self.member.watch.beat if self.member else lambda: {"kind": "beat"})
                if self.member:
                    self.member.tick()
            await asyncio.sleep(TICK_S)

    async def _announce(self) -> None:
        while True:
            with self.changes:
                member = self.member if self.member and self.member.is_member else None
            if member:
                held = await self.rendezvous.announce(member.view)
                with self.changes:
                    if self.member is member:
                        member.on_latest(held)
            await asyncio.sleep(ANNOUNCE_S)

    async def _claim(self, view: ViewRecord, is_majority: bool, member: Membership) -> None:
        held = await self.rendezvous.claim(view, is_majority)
        with self.changes:
            if self.member is member:
                member.on_claimed(view, held)

    async def claim_end(self, number: int) -> None:
        """Mark that nobody trains any more."""
        await self.rendezvous.claim(ViewRecord(number, ()), True)

    async def _look_up(self, member: Membership) -> None:
        held = await self.rendezvous.latest()
        with self.changes:
            if held and self.member is member:
                member.on_latest(held)

    # outside.Outside

    def now(self) -> float:
        return time.monotonic()

    def send(self, node: str, message: Message, parts: Parts) -> None:
        self._loop.call_soon_threadsafe(self.mesh.send, node, message, parts)

    def link_state(self, node: str) -> LinkState:
        return self.mesh.link_state(node)

    def connect(self, members: tuple[Member, ...]) -> None:
        self._loop.call_soon_threadsafe(self.mesh.connect, members, self._own.id)

    def claim(self, view: ViewRecord, is_majority: bool) -> None:
        member = self.member
        assert member
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._claim(view, is_majority, member)))

    def look_up(self) -> None:
        member = self.member
        assert member
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._look_up(member)))

    def changed(self) -> None:
        with self.changes:
            self.changes.notify_all()

    def check(self) -> None:
        """Raise what has gone wrong in the network's thread."""
        if self.fault:
            if isinstance(self.fault, (UserError, RunFault)):
                raise self.fault
            raise RunFault(f"the exchange between nodes failed: {self.fault!r}") from self.fault
