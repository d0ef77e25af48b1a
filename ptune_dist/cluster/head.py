"""The head node's decisions for all nodes: who is there, when to start, when to end, what to do next.

Floor 6. One thread of the head's launcher; the head's own node is a node like any other.
"""

import contextlib
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ptune_dist.cluster.link import OWN_GAP_S, Link, Message, free_port
from ptune_dist.cluster.node_facts import NodeFacts, judge_facts
from ptune_dist.cluster.signs import DONE, STOPPED, STOPPED_EARLY, WORTH_A_RESTART, End, first_cause
from ptune_dist.cluster.topology import Topology
from ptune_dist.config.schema import Config
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.folder import check_run_dir, is_finished, is_locked
from ptune_dist.run.status import begin_status, end_status

SECONDS_TO_END = 30.0  # for a node to end its ranks
SECONDS_FOR_OTHERS = 60.0  # between the first node that is done and the last
SECONDS_IN_SILENCE = 15.0  # before it is said who is waited for
SECONDS_TO_STALL = 600.0
SECONDS_FOR_LOCK = 180.0  # until what is gone has let go: a file system may notice a dead node after 90 s


@dataclass(frozen=True)
class Limits:
    """What a job may take."""

    start_timeout_s: float
    silence_s: float  # a node that is not heard from for so long is gone
    max_restarts: int


class Head(threading.Thread):
    """Leads all nodes through the attempts of one job, and tells each at the end how it went."""

    def __init__(
        self, ear: socket.socket, topology: Topology, config: Config | None, limits: Limits, *, is_check: bool
    ):
        super().__init__(name="head", daemon=True)
        self._ear, self._topology, self._config, self._limits = ear, topology, config, limits
        self._is_check, self._run_dir = is_check, Path(config.output_dir if config else ".")
        self._strangers: list[Link] = []
        self._links: dict[int, Link] = {}
        self._facts: dict[int, NodeFacts] = {}
        self._skews_s: dict[int, float] = {}
        self._ends: dict[int, End] = {}
        self._heard_all_at, self._is_asked_to_stop = time.monotonic(), False

    def run(self) -> None:
        try:
            end = self._lead()
        except Exception as error:  # a mistake of ours must not leave the nodes waiting
            is_known = isinstance(error, RunFault)
            what = str(error) if is_known else f"the head's launcher: {type(error).__name__}: {error}"
            end = End("fault" if is_known else "error", what)
            with contextlib.suppress(Exception):  # the disk may be what failed
                if not self._is_check:
                    end_status(self._run_dir, end)
            with contextlib.suppress(Exception):
                self._gather_nodes()  # it may have come before they did; whoever comes is told
        for link in self._links.values():
            link.send(kind="leave", end=asdict(end))
        self._ear.close()

    def _lead(self) -> End:
        if self._config is None:  # our own node's mistake: the others must not wait for us
            return self._find_unfit()
        if not self._is_check:
            unneeded = self._find_unneeded()
            if unneeded:
                return self._gather_nodes() or unneeded
        for attempt in range(self._limits.max_restarts + 1):
            if not self._is_check:
                begin_status(self._run_dir, self._topology.job_id, in_place=attempt > 0)
            end = self._find_unfit() if attempt == 0 else None
            end = end or self._make_attempt()
            if not self._is_check:
                end_status(self._run_dir, end)
            if not self._may_restart(end, attempt):
                return end
            say(f"{end.reason}; restart {attempt + 1} of {self._limits.max_restarts} in place")
            self._ends.clear()
            is_free = self._wait_for_lock()
            self._hear_all()
            if self._is_asked_to_stop:
                return self._stop_between_attempts()
            if not is_free:
                return end
        raise AssertionError("the last attempt returns")

    def _stop_between_attempts(self) -> End:
        end = End(STOPPED, "asked to stop while the ranks were to be started again")
        end_status(self._run_dir, end)
        return end

    def _find_unneeded(self) -> End | None:
        """Whether there is nothing to do here, or someone else does it."""
        try:
            check_run_dir(self._config)
        except UserError as mistake:
            return End("mistake", str(mistake))
        if not self._wait_for_lock():
            if self._is_asked_to_stop:
                return STOPPED_EARLY
            return End(
                "mistake", f"output_dir: {self._run_dir}: another process is training here: wait for it or end it"
            )
        if is_finished(self._config):
            say(f"{self._run_dir} is finished: nothing is left to do")
            return End(DONE)
        return None

    def _wait_for_lock(self) -> bool:
        """Until nobody trains in the run's folder, with an ear for the nodes; False where someone still does."""
        until = time.monotonic() + SECONDS_FOR_LOCK
        while is_locked(self._run_dir):
            self._welcome_nodes()
            self._hear_all()
            if self._ends or self._is_asked_to_stop or time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def _find_unfit(self) -> End | None:
        """What is wrong with the nodes before anything is started."""
        absent = self._gather_nodes()
        if absent:
            return absent
        ranks = range(self._topology.num_nodes)
        return judge_facts([self._facts[i] for i in ranks], [self._skews_s[i] for i in ranks], str(self._run_dir))

    def _make_attempt(self) -> End:
        others = [link for number, link in self._links.items() if number]
        address = others[0].own_address if others else "127.0.0.1"
        self._ends.clear()
        self._tell_all(kind="start", address=address, port=free_port())
        return self._follow_attempt()

    def _may_restart(self, end: End, attempt: int) -> bool:
        all_here = len(self._ends) == self._topology.num_nodes and all(link.is_open for link in self._links.values())
        is_wanted = not (self._is_check or self._is_asked_to_stop)
        return end.kind in WORTH_A_RESTART and all_here and is_wanted and attempt < self._limits.max_restarts

    def _gather_nodes(self) -> End | None:
        """Every node's first word; what is wrong where one does not come."""
        deadline = time.monotonic() + self._limits.start_timeout_s
        say_at = time.monotonic() + SECONDS_IN_SILENCE
        while len(self._links) < self._topology.num_nodes:
            self._welcome_nodes()
            if time.monotonic() > deadline:
                return self._name_absent()
            if time.monotonic() > say_at:
                say(f"waiting for node {', '.join(self._absent())}, {self._limits.start_timeout_s:.0f} s at most")
                say_at = deadline
            self._hear_all()
            if self._is_asked_to_stop:
                return STOPPED_EARLY
            for number, link in self._links.items():
                if not link.is_open:
                    self._ends.setdefault(number, self._describe_silence(number, link))
            if self._ends:
                return first_cause(list(self._ends.values()))
            time.sleep(0.02)
        return None

    def _name_absent(self) -> End:
        absent, waited = self._absent(), f"{self._limits.start_timeout_s:.0f} s"
        return End("unreachable", f"node {', '.join(absent)} has not come within {waited}", node=absent[0])

    def _absent(self) -> list[str]:
        return [name for i, name in enumerate(self._topology.node_names) if i not in self._links]

    def _name_node(self, number: int) -> str:
        """As the node itself says, where it has come."""
        return self._facts[number].node if number in self._facts else self._topology.node_names[number]

    def _welcome_nodes(self) -> None:
        with contextlib.suppress(OSError):  # until nobody is at the door
            while True:
                self._strangers.append(Link(self._ear.accept()[0]))
        for link in list(self._strangers):
            if (message := link.receive_one()) or not link.is_open:
                self._strangers.remove(link)
            if message:
                self._welcome(link, message)

    def _welcome(self, link: Link, message: Message) -> None:
        """A node of this job that says who it is; whoever does not is sent away."""
        number = message.get("node_rank")
        is_ours = message["kind"] == "hello" and message.get("job_id") == self._topology.job_id
        try:
            facts, skew_s = NodeFacts(**message["facts"]), message["clock_s"] - time.time()
        except (KeyError, TypeError):
            is_ours = False
        if not is_ours or number not in range(self._topology.num_nodes):
            link.close()
            return
        if number in self._links:
            name = self._name_node(number)
            self._ends[number] = End("mistake", f"two launchers say that they are node {name}, number {number}")
        self._links[number] = link
        self._facts[number], self._skews_s[number] = facts, skew_s
        link.keep_beating(self._is_awake)

    def _follow_attempt(self) -> End:
        """Until every node's ranks have ended, or all that can be ended; then the first cause."""
        asked_at = first_done_at = None
        while True:
            self._hear_all()
            now = time.monotonic()
            for number, link in self._links.items():
                if number not in self._ends and link.silent_s > self._limits.silence_s:
                    self._ends[number] = self._describe_silence(number, link)
                    link.close()
            bad = [end for end in self._ends.values() if end.kind not in (DONE, STOPPED)]
            if len(self._ends) == self._topology.num_nodes:
                return self._conclude()
            if self._ends and first_done_at is None:
                first_done_at = now
            is_late = first_done_at is not None and now - first_done_at > SECONDS_FOR_OTHERS
            is_late = is_late or STOPPED_EARLY in self._ends.values()  # the others' ranks wait for that node's
            if (bad or is_late) and asked_at is None:
                asked_at = now
                with_stacks = any(end.kind in ("stuck", "hang", "frozen", "unreachable") for end in bad)
                self._tell_all(kind="end", with_stacks=with_stacks)
            if asked_at is not None and now - asked_at > SECONDS_TO_END:
                return self._conclude()
            time.sleep(0.05)

    def _conclude(self) -> End:
        """How the attempt ended. A stop that one node heard before its start is a stop, though we ended the others."""
        end = first_cause(list(self._ends.values()))
        if end.kind == "ended" and self._is_asked_to_stop and any(e.kind == STOPPED for e in self._ends.values()):
            return STOPPED_EARLY
        return end

    def _describe_silence(self, number: int, link: Link) -> End:
        name = self._name_node(number)
        what = f"has not been heard from for {link.silent_s:.0f} s" if link.is_open else "has closed its line"
        return End("unreachable", f"node {name} {what}", node=name)

    def _is_awake(self) -> bool:
        """A disk that stalls is waited for, but not for ever."""
        return self.is_alive() and time.monotonic() - self._heard_all_at < SECONDS_TO_STALL

    def _hear_all(self) -> None:
        now = time.monotonic()
        if now - self._heard_all_at > OWN_GAP_S:  # it is we who were away: stopped, or waiting for a disk
            for link in self._links.values():
                link.heard_at = now
        self._heard_all_at = now
        for number, link in self._links.items():
            for message in link.receive():
                if message["kind"] == "ended":
                    self._ends[number] = End(**message["end"])
                elif message["kind"] == "stacks":  # before the node that found a hang ends its ranks
                    self._tell_all(kind="stacks")
                elif message["kind"] == "beat" and "clock_s" in message:
                    skew_s = message["clock_s"] - time.time()  # what lay unread looks late, never early
                    self._skews_s[number] = max(self._skews_s[number], skew_s)
                elif message["kind"] == "stop":
                    self._is_asked_to_stop = True

    def _tell_all(self, **message) -> None:
        for link in self._links.values():
            link.send(**message)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be left to read it
        print(f"launcher: {text}", flush=True)
