"""A real head, and simulated nodes that follow a script."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptune_dist.cluster.head import Head, Limits
from ptune_dist.cluster.link import connect, listen
from ptune_dist.cluster.node_facts import NodeFacts
from ptune_dist.cluster.outcome import STOPPED_EARLY, Outcome
from ptune_dist.cluster.secret import sign_hello
from ptune_dist.cluster.topology import Topology
from ptune_dist.config.load import load_config
from ptune_dist.run.status import read_status
from tests.conftest import write_config

NAMES = ("a", "b")
SECRET = "of the test, for all its nodes"
KILLED = Outcome("killed", "rank 1 was killed", 1, "b")


class FakeNode(threading.Thread):
    """Joins the head, reacts to each start as scripted, and keeps the outcome that the head reports."""

    def __init__(self, port: int, rank: int, reactions: list[Outcome | str | Callable], **facts: object):
        super().__init__(daemon=True)
        self.rank = rank
        self.reactions = list(reactions)
        self.starts: list[tuple[str, int]] = []
        self.received: list[str] = []
        self.outcome: Outcome | None = None
        self.is_running = False
        self.is_admitted = False
        self.link = connect("127.0.0.1", port)
        own_facts = NodeFacts(NAMES[rank], **({"num_procs": 1, "free_bytes": 1 << 40} | facts))
        who = {"node_rank": rank, "job_id": "7", "facts": own_facts.message()}
        self.hello = {"kind": "hello", **who, "nonce": "asked of the head"}
        self.start()

    def run(self) -> None:
        while self.outcome is None and self.link.is_open:
            for message in self.link.receive():
                if message["kind"] not in ("challenge", "welcome"):
                    self.received.append(message["kind"])
                self.obey(message)
            if self.is_admitted:
                self.link.send(kind="beat", clock_s=time.time())
            time.sleep(0.02)

    def obey(self, message: dict[str, Any]) -> None:
        if message["kind"] == "challenge":
            self.link.send(**sign_hello(SECRET, message["nonce"], self.hello | {"clock_s": time.time()}))
        elif message["kind"] == "welcome":
            self.is_admitted = True
        elif message["kind"] == "start":
            self.starts.append((message["address"], message["port"]))
            self.is_running = True
            self.react(self.reactions.pop(0))
        elif message["kind"] == "end" and self.is_running:
            self.report(Outcome("ended", node=NAMES[self.rank]))
        elif message["kind"] == "leave":
            self.outcome = Outcome(**message["end"])

    def react(self, reaction: Outcome | str | Callable) -> None:
        if reaction == "wait":
            return
        if reaction == "disconnect":
            self.link.close()
        elif reaction == "stop":
            self.link.send(kind="stop")
            self.report(KILLED)
        elif reaction == "stop early":
            self.link.send(kind="stop")
            self.report(STOPPED_EARLY)
        elif reaction == "stacks":
            self.link.send(kind="stacks")
            self.report(Outcome("hang", "no progress", 1, "b"))
        elif callable(reaction):
            reaction(self)
        else:
            self.report(reaction)

    def report(self, outcome: Outcome) -> None:
        self.is_running = False
        self.link.send(kind="ended", end=asdict(outcome))


class Job:
    """A head, and the port on which it listens."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        num_nodes: int = 2,
        max_restarts: int = 2,
        start_timeout_s: float = 5,
        silence_s: float = 2.0,
    ):
        self.config = load_config(write_config(folder / "c.yaml"), list(overrides))
        self.run_dir = folder / "run"
        listener = listen(0, "127.0.0.1")
        self.port = listener.getsockname()[1]
        topology = Topology("variables", "7", num_nodes, 0, "x", self.port, NAMES[:num_nodes], 1, 0)
        limits = Limits(start_timeout_s=start_timeout_s, silence_s=silence_s, max_restarts=max_restarts)
        self.head = Head(listener, topology, self.config, limits, secret=SECRET, is_check=False)
        self.head.start()

    def play(self, *scripts: list, **facts: object) -> list[FakeNode]:
        """One node for each script, until the head has told all of them to leave."""
        nodes = [FakeNode(self.port, rank, script, **facts) for rank, script in enumerate(scripts)]
        self.head.join(20)
        for node in nodes:
            node.join(5)
        assert not self.head.is_alive()
        return nodes

    @property
    def status(self) -> dict[str, Any]:
        return read_status(self.run_dir)
