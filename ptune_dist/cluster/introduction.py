"""How a node's launcher introduces itself to the head's, over one connection after another until it is admitted."""

import time
from collections.abc import Callable
from pathlib import Path

from ptune_dist.cluster.link import Link, Message
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.secret import FILE, REMEDY, is_signed_welcome, random_text, sign_hello
from ptune_dist.cluster.topology import Topology

SECONDS_FOR_SECRET = 90.0  # until a file that another node has written shows up: NFS may hide it for 60 s
SECONDS_BETWEEN_TRIES = 0.5


class Introduction:
    """Proves to the head that this node knows the job's secret, and has the head prove the same."""

    def __init__(self, topology: Topology, facts: NodeFacts, run_dir: Path, find_secret: Callable[[], str]):
        """find_secret: returns "" while this node does not have the secret."""
        self.is_admitted = False
        self._topology = topology
        self._facts = facts
        self._run_dir = run_dir
        self._find_secret = find_secret
        self._secret = ""
        self._nonce = ""  # what we ask the head to prove with
        self._asked = ""  # what the head asks us to prove with
        self._refusal = ""
        self._refused_at = 0.0

    @property
    def refusal(self) -> str:
        """Why the head has not admitted this node, and what to do about it; "" if it has not been asked."""
        return f"node {self._topology.node_name} {self._refusal}: {REMEDY}" if self._refusal else ""

    def wait_for_next_try(self) -> bool:
        """Call before each connection. Returns whether another try is worthwhile.

        The head may be that of an earlier start, and the file with the secret may take a while to show up.
        """
        if self._asked:  # the head has hung up on our proof
            self._note_refusal(f"is refused by the head node {self._topology.node_names[0]}: their secrets differ")
        self._nonce = random_text()
        self._asked = ""
        if not self._refusal:
            return True
        time.sleep(SECONDS_BETWEEN_TRIES)
        return time.monotonic() < self._refused_at + SECONDS_FOR_SECRET

    def handle(self, link: Link, message: Message) -> None:
        """Take in a message of the head before it has admitted us. Whoever says anything else is a stranger."""
        if message["kind"] == "challenge" and not self._asked:
            self._answer(link, str(message.get("nonce")))
        elif self._asked and message["kind"] == "welcome" and self._is_from_head(message):
            self.is_admitted = True
        else:
            link.close()

    def _is_from_head(self, welcome: Message) -> bool:
        return is_signed_welcome(self._secret, self._nonce, self._asked, welcome)

    def _answer(self, link: Link, asked: str) -> None:
        who = {"node_rank": self._topology.node_rank, "job_id": self._topology.job_id}
        self._secret = self._find_secret()
        if not self._secret:
            link.send(kind="no secret", **who)
            link.close()
            head = self._topology.node_names[0]
            self._note_refusal(f"does not have {self._run_dir / FILE}, which the head node {head} has written")
            return
        self._asked = asked
        facts = self._facts.message()
        hello = {"kind": "hello", **who, "facts": facts, "clock_s": time.time(), "nonce": self._nonce}
        link.send(**sign_hello(self._secret, asked, hello))
        link.start_heartbeat()

    def _note_refusal(self, text: str) -> None:
        self._refusal = text
        self._refused_at = self._refused_at or time.monotonic()
