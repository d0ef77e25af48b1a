"""One node's launcher: it starts and ends its ranks as the head says, and acts alone if the head is lost."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ptune_dist.cluster.head import SECONDS_BEFORE_NOTICE, Limits, announce
from ptune_dist.cluster.introduction import Introduction
from ptune_dist.cluster.link import OWN_PAUSE_S, Link, Message, connect, find_interface, resolve
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.node_links import describe_silence
from ptune_dist.cluster.outcome import DONE, STOPPED, STOPPED_EARLY, Outcome, find_cause
from ptune_dist.cluster.ranks import RankLaunch, Ranks
from ptune_dist.cluster.stop_requests import StopRequests
from ptune_dist.cluster.topology import Topology
from ptune_dist.errors import RunFault
from ptune_dist.run.status import end_status, read_status

SECONDS_TO_SAVE_ALONE = 20.0  # for the ranks of a node whose scheduler's daemon has died
SECONDS_FOR_STACKS_OF_OTHERS = 1.0


@dataclass(frozen=True)
class NodeJob:
    """One node's part of a job."""

    topology: Topology
    facts: NodeFacts
    command: list[str]  # of the package, for every rank: ["train", CONFIG, ...]
    run_dir: Path
    limits: Limits
    port: int  # of the head
    find_secret: Callable[[], str]  # "" while this node does not have it
    ends_with_parent: bool  # whether the launcher must not outlive the process that started it
    num_replicas: int = 0  # nodes that were started together and train as replicas; 0: they are one world


class Node:
    """This node, through all attempts of one job."""

    def __init__(self, job: NodeJob, requests: StopRequests):
        self._job = job
        self._requests = requests
        self._parent = os.getppid() if job.ends_with_parent else None
        self._link: Link | None = None
        self._head_address: str | None = None
        self._ranks: Ranks | None = None
        self._finished_ranks: Ranks | None = None  # their torchrun serves the store that ranks of other nodes still use
        self._has_forwarded_stop = False
        self._introduction = Introduction(job.topology, job.facts, job.run_dir, job.find_secret)
        self._checked_at = 0.0
        self._orphaned_at = 0.0

    @property
    def _head_link(self) -> Link:
        """The connection to the head node's launcher, once there is one."""
        assert self._link is not None, "the node has joined the job"
        return self._link

    @property
    def name(self) -> str:
        return self._job.topology.node_name

    def run(self) -> Outcome:
        """Follow the head until it reports the job's outcome, is lost or cannot be found."""
        give_up_at = time.monotonic() + self._job.limits.start_timeout_s
        try:
            while True:
                outcome = self._step(give_up_at)
                if outcome:
                    return outcome
                time.sleep(0.05)
        finally:
            self._end_ranks(with_stacks=False)
            if self._link:
                self._link.close()

    def _step(self, give_up_at: float) -> Outcome | None:
        """One round of the loop; an outcome means that this launcher has to exit."""
        if not self._is_connected():
            outcome = self._join_head(give_up_at)
            if outcome:
                return outcome
        for message in self._head_link.receive():
            if not self._introduction.is_admitted:
                self._introduction.handle(self._head_link, message)
                continue
            outcome = self._obey(message)
            if outcome:
                return outcome
        return self._check_surroundings() if self._is_connected() else None

    def _is_connected(self) -> bool:
        """Whether the head has been found. One that hung up before it admitted us may be that of an earlier start."""
        return self._link is not None and (self._link.is_open or self._introduction.is_admitted)

    def _join_head(self, deadline: float) -> Outcome | None:
        """Connect; an outcome if the head is not found or refuses us, or we are asked to stop meanwhile."""
        link = self._find_head(deadline) if self._introduction.wait_for_next_try() else None
        if link is None:
            return STOPPED_EARLY if self._requests.to_stop else self._describe_missing_head()
        self._link = link
        self._checked_at = time.monotonic()
        return None

    def _find_head(self, deadline: float) -> Link | None:
        """A link to the head; None after the deadline or a request to stop.

        Name resolution is retried as well: in some clusters names appear late. The head's own node always joins it, and
        passes on a request to stop afterwards.
        """
        head = self._job.topology.head
        is_head = self._job.topology.node_rank == 0
        notice_at = time.monotonic() + SECONDS_BEFORE_NOTICE
        while time.monotonic() < deadline and (is_head or not self._requests.to_stop):
            self._head_address = "127.0.0.1" if is_head else resolve(head)
            link = connect(self._head_address, self._job.port) if self._head_address else None
            if link:
                return link
            if time.monotonic() > notice_at:
                problem = "" if self._head_address else ", a name that does not resolve"
                announce(f"node {self.name} waits for the head node {head}{problem}")
                notice_at = deadline
            time.sleep(0.2)
        return None

    def _describe_missing_head(self) -> Outcome:
        """Why the head was not found, or does not admit us. The first is not a user's mistake: it may join later."""
        refusal = self._introduction.refusal
        if refusal:
            announce(refusal)
            return Outcome("mistake", refusal, node=self.name)
        topology = self._job.topology
        within = f"within {self._job.limits.start_timeout_s:.0f} s"
        if self._head_address:
            where = f"{topology.head} ({self._head_address}, port {self._job.port})"
            text = (
                f"node {self.name} cannot reach the head node {where} {within}: "
                "has it started, and is the port open between the nodes?"
            )
        else:
            text = (
                f"the head node's name {topology.head!r} does not resolve on node {self.name} {within}: "
                "set PTUNE_HEAD_ADDRESS"
            )
        announce(text)
        return Outcome("unreachable", text, node=topology.node_names[0])

    def _obey(self, message: Message) -> Outcome | None:
        """Do what the head says; an outcome is that of the whole job."""
        if message["kind"] == "start" and self._requests.to_stop:
            self._report(STOPPED_EARLY)
        elif message["kind"] == "start":
            try:
                self._start_ranks(message["address"], message["port"])
            except (RunFault, OSError) as error:  # out of memory, or /dev/shm is full
                self._report(Outcome("fault", f"node {self.name} cannot start its ranks: {error}", node=self.name))
        elif message["kind"] == "end" and self._ranks:
            self._end_and_report(self._ranks.summarize(), with_stacks=message["with_stacks"])
        elif message["kind"] == "stacks" and self._ranks:
            self._ranks.show_stacks()
        elif message["kind"] == "leave":
            return Outcome(**message["end"])
        return None

    def _start_ranks(self, address: str, port: int) -> None:
        """Raises RunFault or OSError."""
        self._end_ranks(with_stacks=False)  # of the previous attempt
        topology = self._job.topology
        own_address = address if topology.node_rank == 0 else self._head_link.own_address
        launch = RankLaunch(
            command=self._job.command,
            run_dir=self._job.run_dir,
            job_id=topology.job_id or "ptune",
            node=self.name,
            node_rank=topology.node_rank,
            num_nodes=topology.num_nodes,
            num_procs=self._job.facts.num_procs,
            num_gpus=self._job.facts.num_gpus,
            address=address,
            port=port,
            interface=find_interface(own_address) if topology.num_nodes > 1 else "",
            start_timeout_s=self._job.limits.start_timeout_s,
            num_replicas=self._job.num_replicas,
        )
        self._ranks = Ranks(launch)

    def _check_surroundings(self) -> Outcome | None:
        """Check our signals, our parent, the head and the ranks; an outcome means that this launcher has to exit."""
        now = time.monotonic()
        if now - self._checked_at > OWN_PAUSE_S:  # this launcher was suspended; the head was not silent
            self._head_link.heard_at = now
        self._checked_at = now
        if self._has_been_orphan_too_long():
            text = f"the process that started the launcher on node {self.name} has died"
            return self._report(Outcome("killed", text, node=self.name))
        if self._requests.to_stop:
            self._forward_stop()
        if self._requests.to_end:
            return self._report(Outcome("ended", "interrupted", node=self.name))
        if self._head_link.silent_s > self._patience_with_head():
            return self._lose_head()
        self._check_ranks()
        return None

    def _forward_stop(self) -> None:
        """Tell the head, once, and our own ranks: those that still start are ended, the others save and stop."""
        if self._introduction.is_admitted and not self._has_forwarded_stop:
            self._has_forwarded_stop = True
            self._head_link.send(kind="stop")
        if self._ranks and self._ranks.are_starting():
            self._end_and_report(STOPPED_EARLY, with_stacks=False)
        elif self._ranks:
            self._ranks.request_stop()

    def _patience_with_head(self) -> float:
        """Seconds. Before it admits us the head may be waiting for a disk."""
        limits = self._job.limits
        return limits.silence_s if self._introduction.is_admitted else limits.start_timeout_s

    def _check_ranks(self) -> None:
        """Report how the ranks have ended, and end them if something is wrong with one."""
        outcome = self._ranks.check() if self._ranks else None
        if outcome is None:
            return
        if outcome.kind in (DONE, STOPPED) and self._job.topology.node_rank == 0:
            self._finished_ranks = self._ranks
            self._ranks = None
            self._report(outcome)
        else:
            is_hang = outcome.kind in ("hang", "frozen")
            if is_hang:
                self._show_stacks_everywhere()
            self._end_and_report(outcome, with_stacks=is_hang)

    def _show_stacks_everywhere(self) -> None:
        """Before any rank is ended: those that wait for it would fail as soon as they lose it."""
        self._head_link.send(kind="stacks")
        if self._ranks:
            self._ranks.show_stacks()
        time.sleep(SECONDS_FOR_STACKS_OF_OTHERS)

    def _has_been_orphan_too_long(self) -> bool:
        """If our parent has died, such as Slurm's slurmstepd, the ranks get some time to save."""
        if self._parent is None or os.getppid() == self._parent:
            return False
        self._orphaned_at = self._orphaned_at or time.monotonic()
        self._requests.to_stop = True
        return time.monotonic() - self._orphaned_at > SECONDS_TO_SAVE_ALONE

    def _lose_head(self) -> Outcome:
        """End without the head, and record that in the run's status, as the head itself may be dead."""
        topology = self._job.topology
        head = topology.node_names[0]
        text = f"the head node {head} {describe_silence(self._head_link)}, according to node {self.name}"
        outcome = Outcome("unreachable", text, node=head)
        announce(text)
        self._end_ranks(with_stacks=True)
        status = read_status(self._job.run_dir)
        if status.get("job_id") == topology.job_id and status.get("state") in ("starting", "running"):
            end_status(self._job.run_dir, outcome)
        return outcome

    def _report(self, outcome: Outcome) -> Outcome:
        """Tell the head how this node's ranks have ended."""
        self._head_link.send(kind="ended", end=asdict(outcome))
        return outcome

    def _end_and_report(self, outcome: Outcome, *, with_stacks: bool) -> None:
        """End the ranks, and report the outcome or, if the stacks show a rank that is stuck, that."""
        stuck = self._end_ranks(with_stacks=with_stacks)
        self._report(find_cause([stuck or outcome, outcome]))

    def _end_ranks(self, *, with_stacks: bool) -> Outcome | None:
        """End all processes of this node; returns what the stacks show, if they are requested."""
        stuck = None
        for ranks in (self._ranks, self._finished_ranks):  # at most one of them exists
            if ranks:
                stuck = ranks.end(with_stacks=with_stacks)
                ranks.remove_folder()
        self._ranks = None
        self._finished_ranks = None
        return stuck
