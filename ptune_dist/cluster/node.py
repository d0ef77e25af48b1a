"""One node's launcher: starts its ranks and ends them as the head says, and where the head is silent, by itself.

Floor 6.
"""

import contextlib
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ptune_dist.cluster.head import SECONDS_IN_SILENCE, Limits, say
from ptune_dist.cluster.link import OWN_GAP_S, Link, Message, connect, resolve
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.ranks import Ranks, Start
from ptune_dist.cluster.signs import DONE, STOPPED, STOPPED_EARLY, End, first_cause
from ptune_dist.cluster.topology import Topology
from ptune_dist.errors import RunFault
from ptune_dist.run.status import end_status, read_status

SECONDS_TO_SAVE_ALONE = 20.0
SECONDS_BETWEEN_INTERRUPTS = 3.0
SECONDS_FOR_STACKS_OF_OTHERS = 1.0


@dataclass
class Requests:
    """What signals asked of this launcher."""

    to_stop: bool = False
    to_end: bool = False  # a second Ctrl-C
    stopped_at: float = 0.0

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                signal.signal(number, self._handle)
        if os.environ.get("PTUNE_STOP_WITH_INPUT"):  # ssh passes no signal on; nor does a client that is gone
            threading.Thread(target=self._wait_for_end_of_input, daemon=True).start()

    def _wait_for_end_of_input(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        self._handle(signal.SIGTERM, None)

    def _handle(self, number: int, _frame: object) -> None:
        if self.to_stop and number == signal.SIGINT and time.monotonic() - self.stopped_at > SECONDS_BETWEEN_INTERRUPTS:
            self.to_end = True
        if not self.to_stop:
            self.to_stop, self.stopped_at = True, time.monotonic()


class Node:
    """This node through all attempts of one job."""

    def __init__(
        self, topology: Topology, facts: NodeFacts, command: list[str], run_dir: Path, limits: Limits,
        requests: Requests, *, port: int, ends_with_parent: bool,
    ):  # fmt: skip
        self._topology, self._facts, self._command, self._run_dir = topology, facts, command, run_dir
        self._limits, self._requests, self._port = limits, requests, port
        self._parent = os.getppid() if ends_with_parent else None
        self._link: Link | None = None
        self._ranks: Ranks | None = None
        self._left: Ranks | None = None  # whose torchrun has the store that ranks of other nodes still use
        self._has_told, self._has_heard, self._looked_at, self._orphaned_at = False, False, 0.0, 0.0

    @property
    def name(self) -> str:
        return self._topology.node_name

    def run(self) -> End:
        """Until the head says how it ended, or is gone or not found."""
        give_up_at = time.monotonic() + self._limits.start_timeout_s
        try:
            while True:
                end = None if self._is_led() else self._meet_head(give_up_at)
                if end:
                    return end
                for message in self._link.receive():
                    self._has_heard = True
                    end = self._obey(message)
                    if end:
                        return end
                end = self._look_around() if self._is_led() else None
                if end:
                    return end
                time.sleep(0.05)
        finally:
            self._end_ranks(with_stacks=False)
            if self._link:
                self._link.close()

    def _is_led(self) -> bool:
        """Not where the line was closed without a word: that was the head of an earlier start, which was leaving."""
        return self._link is not None and (self._link.is_open or self._has_heard)

    def _meet_head(self, deadline: float) -> End | None:
        """Say who we are; an end where the head is not found, or we are asked to stop meanwhile."""
        found = self._find_head(deadline)
        if isinstance(found, End):
            return found
        self._link = found
        self._link.send(
            kind="hello", node_rank=self._topology.node_rank, job_id=self._topology.job_id, facts=self._facts.message(),
            clock_s=time.time(),
        )  # fmt: skip
        self._link.keep_beating()
        self._looked_at = time.monotonic()
        return None

    def _find_head(self, deadline: float) -> Link | End:
        """Names come late in some clusters, so all of it is tried again until the start's time is over.

        The head's own node always meets it, and tells it of a request to stop then.
        """
        head, address, is_head = self._topology.head, "", self._topology.node_rank == 0
        say_at = time.monotonic() + SECONDS_IN_SILENCE
        while time.monotonic() < deadline and (is_head or not self._requests.to_stop):
            address = "127.0.0.1" if is_head else resolve(head)
            link = connect(address, self._port) if address else None
            if link:
                return link
            if time.monotonic() > say_at:
                unknown = "" if address else ", a name that it cannot resolve"
                say(f"node {self.name} waits for the head node {head}{unknown}")
                say_at = deadline
            time.sleep(0.2)
        if self._requests.to_stop:
            return STOPPED_EARLY
        waited = f"within {self._limits.start_timeout_s:.0f} s"
        text = (
            f"node {self.name} cannot reach the head node {head} ({address}, port {self._port}) {waited}: "
            "is it started, is the port open between the nodes?"
        )
        if not address:
            text = (
                f"the head node's name {head!r} does not resolve on node {self.name} {waited}: set PTUNE_HEAD_ADDRESS"
            )
        say(text)
        return End("unreachable", text, node=self._topology.node_names[0])  # it may yet come: no mistake

    def _obey(self, message: Message) -> End | None:
        if message["kind"] == "start" and self._requests.to_stop:
            self._say_ended(STOPPED_EARLY)
        elif message["kind"] == "start":
            try:
                self._start_ranks(message["address"], message["port"])
            except (RunFault, OSError) as error:  # no memory, no room in /dev/shm
                self._say_ended(End("fault", f"node {self.name} cannot start its ranks: {error}", node=self.name))
        elif message["kind"] == "end" and self._ranks:
            end = self._ranks.observe()
            stuck = self._end_ranks(with_stacks=message["with_stacks"])
            self._say_ended(first_cause([stuck or end, end]))
        elif message["kind"] == "stacks" and self._ranks:
            self._ranks.show_stacks()
        elif message["kind"] == "leave":
            return End(**message["end"])
        return None

    def _start_ranks(self, address: str, port: int) -> None:
        self._end_ranks(with_stacks=False)  # of the attempt before
        topology = self._topology
        own = address if topology.node_rank == 0 else self._link.own_address
        self._ranks = Ranks(Start(
            command=self._command, run_dir=self._run_dir, job_id=topology.job_id or "ptune", node=self.name,
            node_rank=topology.node_rank, num_nodes=topology.num_nodes, num_procs=self._facts.num_procs,
            address=address, port=port, interface=interface_of(own) if topology.num_nodes > 1 else "",
            start_timeout_s=self._limits.start_timeout_s,
        ))  # fmt: skip

    def _look_around(self) -> End | None:
        """Our signals, our parent, the head and the ranks; an end where this launcher has to leave by itself."""
        now = time.monotonic()
        if now - self._looked_at > OWN_GAP_S:  # it is we who were away
            self._link.heard_at = now
        self._looked_at = now
        if self._is_orphan_too_long():
            return self._say_ended(
                End("killed", f"what started the launcher on node {self.name} is gone", node=self.name)
            )
        if self._requests.to_stop and not self._has_told:
            self._has_told = True
            self._link.send(kind="stop")
        if self._requests.to_end:
            return self._say_ended(End("ended", "interrupted", node=self.name))
        if self._requests.to_stop and self._ranks:
            self._ranks.ask_to_stop()
        # before its first word the head may wait for a disk
        if self._link.silent_s > (self._limits.silence_s if self._has_heard else self._limits.start_timeout_s):
            return self._lose_head()
        end = self._ranks.look() if self._ranks else None
        if end and end.kind in (DONE, STOPPED) and self._topology.node_rank == 0:
            self._left, self._ranks = self._ranks, None
            self._say_ended(end)
        elif end:
            stuck = self._end_ranks(with_stacks=self._show_stacks_of_all(end))
            self._say_ended(first_cause([stuck or end, end]))
        return None

    def _show_stacks_of_all(self, end: End) -> bool:
        """Where ranks hang, before any is ended: what waits for others would fail when it loses them."""
        is_hang = end.kind in ("hang", "frozen")
        if is_hang:
            self._link.send(kind="stacks")
            self._ranks.show_stacks()
            time.sleep(SECONDS_FOR_STACKS_OF_OTHERS)
        return is_hang

    def _is_orphan_too_long(self) -> bool:
        """Where our parent, Slurm's stepd say, is gone the ranks may save, but not for long."""
        if self._parent is None or os.getppid() == self._parent:
            return False
        self._orphaned_at = self._orphaned_at or time.monotonic()
        self._requests.to_stop = True
        return time.monotonic() - self._orphaned_at > SECONDS_TO_SAVE_ALONE

    def _lose_head(self) -> End:
        """The head writes the run's status, unless it is dead."""
        head = self._topology.node_names[0]
        what = (
            f"has not been heard from for {self._link.silent_s:.0f} s" if self._link.is_open else "has closed its line"
        )
        end = End("unreachable", f"the head node {head} {what}, says node {self.name}", node=head)
        say(end.reason)
        self._end_ranks(with_stacks=True)
        status = read_status(self._run_dir)
        if status.get("job_id") == self._topology.job_id and status.get("state") in ("starting", "running"):
            end_status(self._run_dir, end)
        return end

    def _say_ended(self, end: End) -> End:
        self._link.send(kind="ended", end=asdict(end))
        return end

    def _end_ranks(self, *, with_stacks: bool) -> End | None:
        """What their stacks say, where they are asked for."""
        stuck = None
        for ranks in filter(None, (self._ranks, self._left)):  # one of them at most
            stuck = ranks.end(with_stacks=with_stacks)
            ranks.forget()
        self._ranks = self._left = None
        return stuck


def interface_of(address: str) -> str:
    """The network interface that has this address, "" where none has. gloo would ask the host's name for it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return ""
