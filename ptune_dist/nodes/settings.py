"""What a group of nodes is started with."""

from dataclasses import dataclass, field
from pathlib import Path

from ptune_dist.nodes.run_facts import Facts

ADDRESS = "PTUNE_NODE_ADDRESS"  # host:port at which the other nodes reach this one
MAX_PORT = 65535


@dataclass(frozen=True)
class Limits:
    """After how many seconds something is taken for lost. Shorter ones find a loss sooner and take more for one."""

    beat_s: float = 0.5  # between two signs of life
    silent_s: float = 4.0  # without any byte from a node
    relink_s: float = 1.0  # for a broken link to be made again, where the process at its other end still listens
    stall_s: float = 10.0  # that a node takes longer for its blocks than twice the step before
    first_stall_s: float = 600.0  # for a node's blocks while the group has no step to compare with
    between_steps_s: float = 1800.0  # from one step to the next: evaluations and checkpoints
    answer_s: float = 3.0  # for an answer while the view changes
    minority_s: float = 3.0  # that the smaller side of a cut lets the larger one continue first
    found_s: float = 5.0  # that nobody of an earlier group answers before a node begins a new one
    mistake_s: float = 60.0  # that a node is kept out by what waiting does not mend before it ends


@dataclass(frozen=True)
class GroupSettings:
    """name: of this node, for people. secret: as of cluster/secret.py; nodes prove to each other that they know it.

    rendezvous: a folder that all nodes share, or `host:port`, which any node that can bind it serves.
    run: what must be equal on all nodes, by the key of the config.
    blocks_key: the key of the config that decides how many blocks there are.
    folder: equal on nodes that share the run's folder.
    listen: host:port to bind; port 0 takes a free one.
    advertise: host:port at which others reach this node; by default what is bound.
    """

    name: str
    rendezvous: Path | str
    secret: str
    run: Facts = field(default_factory=dict)
    blocks_key: str = "train.num_blocks"
    folder: str = ""
    listen: str = "0.0.0.0:0"
    advertise: str = ""
    min_nodes: int = 1
    max_nodes: int = 1024
    limits: Limits = field(default_factory=Limits)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[host]:port`. Raises ValueError, whose text tells what is wrong."""
    host, _, port = text.rpartition(":")
    if "/" in host or not (host and port.isascii() and port.isdecimal()):
        raise ValueError("HOST:PORT is needed")
    if not 1 <= int(port) <= MAX_PORT:
        raise ValueError(f"a port is a number from 1 to {MAX_PORT}")
    return host.removeprefix("[").removesuffix("]"), int(port)
