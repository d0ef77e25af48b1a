"""The head's links to the launchers of all nodes, and what they have reported."""

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

from ptune_dist.cluster.link import OWN_PAUSE_S, Link, Message
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.outcome import Outcome, find_cause
from ptune_dist.cluster.secret import REMEDY, is_signed_hello, random_text, sign_welcome
from ptune_dist.cluster.topology import Topology

MAX_STALL_S = 600.0  # for a disk that the head waits for; after that the nodes may consider the head lost
MAX_STRANGERS = 1024  # connections that have not introduced themselves; the oldest are closed


class NodeLinks:
    """Accepts the nodes of one job, and keeps the facts and the outcome of each by its rank."""

    def __init__(self, listener: socket.socket, topology: Topology, secret: str, is_awake: Callable[[], bool]):
        self.outcomes: dict[int, Outcome] = {}
        self.is_stop_requested = False
        self._listener = listener
        self._topology = topology
        self._is_head_awake = is_awake
        self._secret = secret
        self._strangers: dict[Link, str] = {}  # and what each is asked to prove with
        self._refused: set[int] = set()  # nodes that somebody claimed to be without knowing the secret
        self._links: dict[int, Link] = {}
        self._facts: dict[int, NodeFacts] = {}
        self._skews_s: dict[int, float] = {}
        self._received_at = time.monotonic()

    @property
    def head_address(self) -> str:
        """The head's address that the other nodes can reach."""
        others = [link for rank, link in self._links.items() if rank != 0]
        return others[0].own_address if others else "127.0.0.1"

    def facts_by_rank(self) -> tuple[list[NodeFacts], list[float]]:
        """The facts about all nodes, and each clock minus the head's in seconds."""
        ranks = range(self._topology.num_nodes)
        return [self._facts[rank] for rank in ranks], [self._skews_s[rank] for rank in ranks]

    def missing_names(self) -> list[str]:
        """The nodes that have not joined."""
        return [name for rank, name in enumerate(self._topology.node_names) if rank not in self._links]

    def explain_missing(self) -> str:
        """What is known about why a node has not joined. A stranger may have said it, so no more than a hint."""
        names = [self._topology.node_names[rank] for rank in sorted(self._refused) if rank not in self._links]
        return f" (node {', '.join(names)} does not know this job's secret: {REMEDY})" if names else ""

    def find_cause(self) -> Outcome:
        return find_cause(list(self.outcomes.values()))

    def have_all_ended(self) -> bool:
        """Whether every node has reported the end of its ranks and is still connected."""
        have_reported = len(self.outcomes) == self._topology.num_nodes
        return have_reported and all(link.is_open for link in self._links.values())

    def accept_all(self) -> None:
        """Accept whoever has connected; those that prove to be nodes of this job become links."""
        with contextlib.suppress(OSError):  # raised once nobody is left in the queue
            while True:
                link = Link(self._listener.accept()[0])
                self._strangers[link] = random_text()
                link.send(kind="challenge", nonce=self._strangers[link])
        for link in list(self._strangers)[:-MAX_STRANGERS]:
            link.close()
        for link, asked in list(self._strangers.items()):
            message = link.receive_one()
            if message or not link.is_open:
                del self._strangers[link]
            if message:
                self._admit(link, asked, message)

    def _admit(self, link: Link, asked: str, hello: Message) -> None:
        """Make a link of a stranger that is a node of this job; close the connection to any other."""
        rank = hello.get("node_rank")
        is_ours = hello.get("job_id") == self._topology.job_id
        if not (is_ours and isinstance(rank, int) and rank in range(self._topology.num_nodes)):
            link.close()
            return
        if not (hello["kind"] == "hello" and is_signed_hello(self._secret, asked, hello)):
            self._refused.add(rank)
            link.close()
            return
        try:
            facts = NodeFacts(**hello["facts"])
            skew_s = hello["clock_s"] - time.time()
        except (KeyError, TypeError):  # another version of this package
            link.close()
            return
        if rank in self._links:
            text = f"two launchers claim to be node {self._name_node(rank)}, number {rank}"
            self.outcomes[rank] = Outcome("mistake", text)
        self._links[rank] = link
        self._facts[rank] = facts
        self._skews_s[rank] = skew_s
        link.send(kind="welcome", proof=sign_welcome(self._secret, str(hello.get("nonce")), asked))
        link.start_heartbeat(self._is_awake)

    def _name_node(self, rank: int) -> str:
        """The node's own name for itself, once it has joined."""
        return self._facts[rank].node if rank in self._facts else self._topology.node_names[rank]

    def _is_awake(self) -> bool:
        """Whether the head deserves its heartbeat: it may wait for a stalled disk, but not indefinitely."""
        return self._is_head_awake() and time.monotonic() - self._received_at < MAX_STALL_S

    def receive_all(self) -> None:
        """Take in what the nodes have sent, without waiting."""
        now = time.monotonic()
        if now - self._received_at > OWN_PAUSE_S:  # the nodes were not silent: the head did not listen
            for link in self._links.values():
                link.heard_at = now
        self._received_at = now
        for rank, link in self._links.items():
            for message in link.receive():
                self._handle(rank, message)

    def _handle(self, rank: int, message: Message) -> None:
        if message["kind"] == "ended":
            self.outcomes[rank] = Outcome(**message["end"])
        elif message["kind"] == "stacks":  # from a node that has found a hang and is about to end its ranks
            self.send_all(kind="stacks")
        elif message["kind"] == "beat" and "clock_s" in message:
            skew_s = message["clock_s"] - time.time()
            # A message that lay unread makes a clock look late, never early, so the largest value is the true one.
            self._skews_s[rank] = max(self._skews_s[rank], skew_s)
        elif message["kind"] == "stop":
            self.is_stop_requested = True

    def note_closed_links(self) -> None:
        """Record nodes that have disconnected as lost."""
        for rank, link in self._links.items():
            if not link.is_open:
                self.outcomes.setdefault(rank, self._describe_silence(rank, link))

    def give_up_silent_links(self, silence_s: float) -> None:
        """Record nodes that have been silent for longer, and whose ranks have not ended, as lost."""
        for rank, link in self._links.items():
            if rank not in self.outcomes and link.silent_s > silence_s:
                self.outcomes[rank] = self._describe_silence(rank, link)
                link.close()

    def _describe_silence(self, rank: int, link: Link) -> Outcome:
        name = self._name_node(rank)
        return Outcome("unreachable", f"node {name} {describe_silence(link)}", node=name)

    def send_all(self, **message: Any) -> None:
        for link in self._links.values():
            link.send(**message)

    def stop_listening(self) -> None:
        self._listener.close()


def describe_silence(link: Link) -> str:
    """Why the other end of a link is considered lost."""
    return f"has not been heard from for {link.silent_s:.0f} s" if link.is_open else "has closed its connection"
