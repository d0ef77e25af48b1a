"""Nodes in one process with a clock and a network of their own, so that thousands of histories can be tried.

The protocol (membership, candidate) is the real one. Links, the rendezvous and the training loop are simulated.
Messages take random times, in order on each link; nodes are killed, stopped for a while and cut from each other at any
moment.
"""

import hashlib
import heapq
import json
import random
from collections.abc import Callable

from ptune_dist.nodes.agreement import Member, OwnReport
from ptune_dist.nodes.blocks import Range, sum_along_tree
from ptune_dist.nodes.candidate import Candidate
from ptune_dist.nodes.membership import Membership
from ptune_dist.nodes.settings import Limits
from ptune_dist.nodes.suspicion import LinkState
from ptune_dist.nodes.turns import Rules, ViewRecord, first_plan

TICK_S = 0.1
BEAT_S = 0.5
NUM_BLOCKS = 8
LONGEST_JOIN_S = 60.0  # of a node among events that stop or cut it for up to 10 s each


def hashed(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()[:8]


def add(left: bytes, right: bytes) -> bytes:
    """As sensitive to the order as a sum of floats."""
    return hashed(left, right)


class Link:
    """Between two nodes. While it is cut, what is sent waits; it breaks when one of them dies."""

    def __init__(self) -> None:
        self.is_open = True
        self.heard: dict[str, float] = {}
        self.queues: dict[str, list[tuple[float, str, list[bytes]]]] = {}  # by the sender


class World:
    def __init__(self, seed: int, num_steps: int, has_rounding: bool = False, min_nodes: int = 1, max_nodes: int = 8):
        self.random = random.Random(seed)
        self.now = 0.0
        self.num_steps = num_steps
        self.has_rounding = has_rounding  # nodes compute slightly different sums, as unlike GPUs do
        self.rules = Rules(NUM_BLOCKS, min_nodes, max_nodes)
        self.limits = Limits()
        self.nodes: dict[str, Node] = {}
        self.links: dict[frozenset[str], Link] = {}
        self.cuts: set[frozenset[str]] = set()
        self.register: dict[int, ViewRecord] = {}
        self.states: dict[int, set[bytes]] = {}  # after each step, of all nodes
        self.announced = 0
        self.lines: list[str] = []
        self.saved = (1, b"")
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, event))

    def run_until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = self.now + seconds
        while not condition():
            self.now, _, event = heapq.heappop(self._events)
            assert self.now < end, "\n".join(["stuck", *self.lines[-80:]])
            event()

    def latency(self) -> float:
        return self.random.choice((0.001, 0.005, 0.05)) * self.random.uniform(0.5, 1.5)

    def is_cut(self, one: str, other: str) -> bool:
        return frozenset((one, other)) in self.cuts

    def start(self) -> "Node":
        node = Node(self, f"n{self._count}")
        node.enter()
        return node

    def living(self) -> list["Node"]:
        return [node for node in self.nodes.values() if node.is_alive and node.phase != "end"]


class Node:
    """A process: its part in the protocol, and its training loop as events."""

    def __init__(self, world: World, name: str):
        self.world = world
        self.name = name
        self.is_alive = True
        self.stopped_until = 0.0
        self.num_entered = 0
        self.entered_at = 0.0
        self.own = Member("", name, "", "")
        self.member: Membership | None = None
        self.candidate: Candidate | None = None
        self.phase = ""
        self.step = 0
        self.turn = 0
        self.state = b""
        self.is_leaving = False
        self.num_left_behind = 0
        self.longest_wait = 0.0
        self.waits_since = 0.0
        self.seconds_per_block = world.random.choice((0.01, 0.02, 0.05))
        world.at(0, self.tick)

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        """Run an event of this process, unless it has died; after the end of a pause if it is stopped."""
        identity = self.own.id

        def run() -> None:
            if not self.is_alive or self.own.id != identity:
                return
            if self.world.now < self.stopped_until:
                self.world.at(self.stopped_until - self.world.now, run)
            else:
                event()

        self.world.at(seconds, run)

    # Entering

    def enter(self) -> None:
        world = self.world
        for pair in [pair for pair in world.links if self.own.id in pair]:
            self.close_link(pair)
        world.nodes.pop(self.own.id, None)
        self.num_entered += 1
        self.own = Member(f"{self.name}.{self.num_entered}", self.name, "", "")
        world.nodes[self.own.id] = self
        self.member = None
        self.phase = "enter"
        self.entered_at = world.now
        self.candidate = Candidate(self.own, self, world.limits, world.rules)
        self.later(0.1, self.poll)
        self.later(0.1, self.tick)

    def poll(self) -> None:
        candidate = self.candidate
        if candidate is None:
            return
        if snapshot := candidate.snapshot:
            return self.join(snapshot)
        world = self.world
        assert world.now - self.entered_at < LONGEST_JOIN_S, "\n".join([f"{self.own.id} waits", *world.lines[-80:]])
        latest = world.register.get(len(world.register))
        candidate.learn(latest)
        candidate.learn_sign(str(world.announced))
        candidate.ask_again()
        if latest is None or not latest.members or candidate.is_group_gone():
            view = ViewRecord(len(world.register) + 1, (self.own,), f"{self.own.id}/founder")
            world.register[view.number] = view
            self.candidate = None
            self.member = Membership(self.own, world.rules, world.limits, self, view, first_plan(self.own, world.rules))
            self.step, self.state = world.saved
            return self.begin()
        self.later(0.1, self.poll)

    def join(self, snapshot) -> None:
        member = Membership(self.own, self.world.rules, self.world.limits, self, snapshot.view, snapshot.plan)
        member.record = snapshot.record
        candidate = self.candidate
        self.member = member
        self.candidate = None
        self.step, self.state = snapshot.step, snapshot.data
        for early in candidate.early:
            member.on_message(*early)
        for pair, link in self.world.links.items():
            if self.own.id in pair and link.is_open:
                member.on_link(next(iter(pair - {self.own.id})))
        self.later(self.world.random.uniform(0, 0.2), self.begin)

    # Training

    def begin(self) -> None:
        member = self.member
        if member.end:
            self.num_left_behind += 1
            return self.enter()
        member.is_waiting = True
        if member.newcomers.to_serve():
            member.newcomers.serve(self.step, self.state)
        if member.begin():
            member.is_waiting = False
            self.turn = member.turn
            self.phase = "compute"
            ranges = member.missing()
            seconds = self.seconds_per_block * sum(r.num_blocks for r in ranges)
            return self.later(
                seconds, lambda: self.deliver(ranges, OwnReport(seconds, self.is_leaving, self.state.hex()))
            )
        self.phase = "begin"
        self.later(0.02, self.begin)

    def compute(self, piece: Range) -> bytes:
        marks = (self.own.id,) if self.world.has_rounding else ()
        if piece.num_blocks == 1:
            return hashed(self.step, piece.lo, self.state, *marks)
        middle = (piece.lo + piece.hi) // 2
        return add(self.compute(Range(piece.lo, middle)), self.compute(Range(middle, piece.hi)))

    def deliver(self, ranges: list[Range], report: OwnReport | None) -> None:
        if self.member.turn == self.turn:
            self.member.deliver({piece: self.compute(piece) for piece in ranges}, report)
        self.phase = "wait"
        self.waits_since = self.world.now
        self.wait()

    def wait(self) -> None:
        member = self.member
        if member.completed and member.completed.record.plan.turn == self.turn:
            return self.update()
        if member.end:
            self.num_left_behind += 1
            return self.enter()
        if redo := member.missing():
            self.phase = "compute"
            seconds = self.seconds_per_block * sum(r.num_blocks for r in redo)
            return self.later(seconds, lambda: self.deliver(redo, None))
        self.later(0.01, self.wait)

    def update(self) -> None:
        completed = self.member.completed
        world = self.world
        self.longest_wait = max(self.longest_wait, world.now - self.waits_since)
        self.state = hashed(self.state, sum_along_tree(completed.cover, add, NUM_BLOCKS))
        world.states.setdefault(self.step, set()).add(self.state)
        self.step += 1
        if self.step > world.saved[0]:
            world.saved = (self.step, self.state)
        leaving = completed.record.leaving
        if self.step > world.num_steps or len(leaving) == len(completed.record.plan.members):
            self.phase = "final"
            return self.finish()
        if self.own.id in leaving:
            return self.end()
        self.phase = "between"
        self.later(world.random.choice((0.0, 0.0, 0.01, 0.5)), self.begin)

    def finish(self) -> None:
        member = self.member
        if member.end:
            self.num_left_behind += 1
            return self.enter()
        if member.is_over:
            return self.end()
        if member.is_in_force:
            member.deliver_final()
        self.later(0.05, self.finish)

    def end(self) -> None:
        self.member.leave()
        self.phase = "end"

        def close() -> None:
            if self.member.is_over and len(self.world.register) == self.member.view.number:
                self.world.register[self.member.view.number + 1] = ViewRecord(self.member.view.number + 1, ())
            self.kill()

        self.later(4.0, close)

    def kill(self) -> None:
        self.is_alive = False
        for pair in [pair for pair in self.world.links if self.own.id in pair]:
            self.close_link(pair)

    # The network

    def tick(self) -> None:
        if self.member or self.candidate:
            if self.member:
                self.member.tick()
                if self.member.is_member:
                    self.world.announced += 1
                    if self.world.random.random() < TICK_S:  # as every second
                        self.look_up()
            if self.world.random.random() < TICK_S / BEAT_S:
                for pair, link in list(self.world.links.items()):
                    if self.own.id in pair and link.is_open:
                        self.send(
                            next(iter(pair - {self.own.id})),
                            self.member.watch.beat() if self.member else {"kind": "beat"},
                            [],
                        )
            self.later(TICK_S, self.tick)

    def close_link(self, pair: frozenset[str]) -> None:
        link = self.world.links[pair]
        link.is_open = False
        link.heard[""] = self.world.now
        for node in pair - {self.own.id}:
            other = self.world.nodes.get(node)
            if other and other.member:
                other.later(0.001, lambda other=other: other.member and other.member.on_link_lost(self.own.id))

    def send(self, node: str, message: dict, parts: list[bytes]) -> None:
        world = self.world
        link = world.links.get(frozenset((self.own.id, node)))
        if link is None or not link.is_open:
            return
        text = json.dumps(message)
        own_id = self.own.id
        queue = link.queues.setdefault(own_id, [])
        queue.append((world.now + world.latency(), text, parts))

        def deliver() -> None:
            other = world.nodes.get(node)
            if not link.is_open or other is None or not other.is_alive:
                return
            if world.is_cut(self.name, other.name) or world.now < other.stopped_until:
                return world.at(0.05, deliver)
            while queue and queue[0][0] <= world.now + 1e-9 and link.is_open:
                _, received, blobs = queue[0]
                link.heard[node] = world.now
                if part := other.member or other.candidate:
                    part.on_message(own_id, json.loads(received), blobs)
                queue.pop(0)
            if queue:
                world.at(max(queue[0][0] - world.now, 0.0), deliver)

        if len(queue) == 1:  # else an event is waiting already
            world.at(queue[0][0] - world.now, deliver)

    def connect(self, members: tuple[Member, ...]) -> None:
        for member in members:
            if member.id != self.own.id:
                self.later(self.world.latency(), lambda id=member.id: self.try_to_connect(id))

    def try_to_connect(self, node: str) -> None:
        world = self.world
        pair = frozenset((self.own.id, node))
        other = world.nodes.get(node)
        if pair in world.links and world.links[pair].is_open or other is None or not other.is_alive:
            return
        if world.is_cut(self.name, other.name) or world.now < other.stopped_until:
            return self.later(0.3, lambda: self.try_to_connect(node))
        world.links[pair] = Link()
        world.links[pair].heard = {self.own.id: world.now, node: world.now}
        for one, peer in ((self, node), (other, self.own.id)):
            if part := one.member or one.candidate:
                part.on_link(peer)

    def link_state(self, node: str) -> LinkState:
        link = self.world.links.get(frozenset((self.own.id, node)))
        if link is None:
            return LinkState(False, down_s=1e9)
        if link.is_open:
            return LinkState(True, silent_s=self.world.now - max(link.heard[self.own.id], self.stopped_until))
        return LinkState(False, down_s=self.world.now - link.heard[""], was_open=True, is_refused=True)

    # The rest of `outside.Outside`

    def now(self) -> float:
        return self.world.now

    def claim(self, view: ViewRecord, is_majority: bool) -> None:
        world = self.world
        member = self.member

        def register() -> None:
            held = world.register.get(view.number)
            if held is None:
                assert view.number == len(world.register) + 1, "a hole in the chain of views"
                held = world.register[view.number] = view
            newest = world.register[len(world.register)]
            held = held if held == newest else newest
            self.later(self.disk_seconds(), lambda: self.member is member and member.on_claimed(view, held))

        self.later(self.disk_seconds(), register)

    def disk_seconds(self) -> float:
        return self.world.latency() * self.world.random.choice((1, 1, 20))

    def look_up(self) -> None:
        newest = self.world.register[len(self.world.register)]
        member = self.member
        self.later(self.world.latency(), lambda: self.member is member and member.on_latest(newest))

    def say(self, text: str, /) -> None:
        self.world.lines.append(f"{self.world.now:.2f} {self.own.id}: {text}")

    def changed(self) -> None:
        pass
