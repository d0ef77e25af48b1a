"""Who has computed what, and what an exchange took, for metrics.jsonl."""

from dataclasses import dataclass, field
from typing import Any

from ptune_dist.nodes.agreement import Agreed


@dataclass
class History:
    """Who has computed what, for metrics.jsonl."""

    seconds: float = 0.0  # of the last step, from this node's last sums until the step was complete
    blocks_s: float = 0.0  # that this node's blocks took in it
    slowest_s: float = 0.0  # that the slowest node's blocks took
    num_bytes: int = 0  # sent in it
    num_nodes: int = 1
    names: dict[str, str] = field(default_factory=dict)  # of all nodes so far, by their ids
    now: dict[str, Any] = field(default_factory=dict)
    is_new: bool = False

    def begin(self) -> None:
        self.seconds = 0.0
        self.num_bytes = 0

    def count(self, agreed: Agreed) -> None:
        """A step is complete."""
        self.names |= {member.id: member.name for member in (*agreed.members, *agreed.joining)}
        blocks: dict[str, list[list[int]]] = {}
        for member, owned in agreed.owners.items():
            own = blocks.setdefault(self.names.get(member, member), [])
            for one in sorted(owned):
                if own and own[-1][1] == one.lo:
                    own[-1][1] = one.hi
                else:
                    own.append([one.lo, one.hi])
        found = {"view": agreed.view_number, "blocks": {name: own for name, own in blocks.items() if own}}
        self.is_new = found != self.now
        self.now = found
        self.num_nodes = len(agreed.members)
        self.slowest_s = max(report.seconds for report in agreed.reports.values())

    def facts(self) -> dict[str, Any]:
        """Of the last step. `nodes` is there where it is not what it was in the step before."""
        found = {
            "num_nodes": self.num_nodes,
            "exchange_s": self.seconds,
            "slower_nodes_s": self.slowest_s - self.blocks_s,
            "exchange_bytes": self.num_bytes,
        }
        return found | ({"nodes": self.now} if self.is_new else {})
