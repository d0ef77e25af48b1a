"""Machines for nodes that train one run: each has a network of its own that can be cut, and a limit on its CPU."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from tests.cluster.network import Network
from tests.replicas.nodes import Cluster, Node

PERIOD_US = 100_000  # of a limit on CPU time
GROUPS = Path("/sys/fs/cgroup")


PORT = 29400  # of every node on its own address


class Host:
    """A network namespace in which nodes are started, one after another."""

    def __init__(self, name: str, network: Network, num_ranks: int):
        self.name = name
        self.num_ranks = num_ranks
        self.node: Node | None = None
        self.num_started = 0
        self._network = network
        self._limit = CpuLimit(f"{network.name}-{name}")

    def start(self, cluster: Cluster, max_s: float) -> Node:
        """A new node, under a name that no other one had."""
        self.num_started += 1
        self.node = cluster.start(
            f"{self.name}.{self.num_started}",
            num_ranks=self.num_ranks,
            env={"PTUNE_NODE_ADDRESS": f"{self._network.addresses[self.name]}:{PORT}", "GLOO_SOCKET_IFNAME": "lo"},
            max_s=max_s,
            network=self._network.namespace(self.name),
        )
        return self.node

    def slow_down(self, share: float) -> None:
        """Let the node have this share of one core."""
        assert self.node
        self._limit.set(share, [rank.pid for rank in self.node.ranks])

    def speed_up(self) -> None:
        self._limit.remove()

    def end(self) -> None:
        for rank in self.node.ranks if self.node else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        self._limit.remove()


class Hosts:
    """The machines of a run on one network. A context manager. Needs root."""

    def __init__(self, num_ranks: dict[str, int]):
        """num_ranks: of the nodes on each host, by its name."""
        self._num_ranks = num_ranks
        self.network = Network(list(num_ranks))
        self.all: dict[str, Host] = {}

    def __enter__(self) -> "Hosts":
        self.network.build()
        self.all = {name: Host(name, self.network, number) for name, number in self._num_ranks.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.all.values():
            host.end()
        self.network.remove()


class CpuLimit:
    """A control group of version 1 or 2."""

    def __init__(self, name: str):
        self._is_old = (GROUPS / "cpu").is_dir()
        self._parent = GROUPS / "cpu" if self._is_old else GROUPS
        self._group = self._parent / name

    def set(self, share: float, pids: list[int]) -> None:
        if not self._is_old:
            (self._parent / "cgroup.subtree_control").write_text("+cpu")
        self._group.mkdir()
        quota = int(share * PERIOD_US)
        file, content = ("cpu.cfs_quota_us", f"{quota}") if self._is_old else ("cpu.max", f"{quota} {PERIOD_US}")
        (self._group / file).write_text(content)
        move(pids, self._group)

    def remove(self) -> None:
        if self._group.exists():
            move(map(int, (self._group / "cgroup.procs").read_text().split()), self._parent)
            self._group.rmdir()


def move(pids: Iterable[int], group: Path) -> None:
    """Processes with all their threads, those that have ended since apart."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(pid))
