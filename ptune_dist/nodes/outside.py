"""What the protocol needs of the world around it: a clock, links to other nodes, and a rendezvous."""

from typing import Protocol

from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.suspicion import LinkState
from ptune_dist.nodes.turns import ViewRecord


class Outside(Protocol):
    """What a member needs of the world around it."""

    def now(self) -> float: ...

    def send(self, node: str, message: Message, parts: Parts) -> None:
        """Send to a node, or nothing where there is no link to it."""

    def link_state(self, node: str) -> LinkState: ...

    def connect(self, members: tuple[Member, ...]) -> None:
        """Keep links to these members from now on."""

    def claim(self, view: ViewRecord, is_majority: bool) -> None:
        """Claim a view at the rendezvous; `Membership.on_claimed` hears of the outcome."""

    def look_up(self) -> None:
        """Read the newest view at the rendezvous; `Membership.on_latest` hears of it."""

    def say(self, text: str, /) -> None: ...

    def changed(self) -> None:
        """Something that the training loop may wait for has happened."""
