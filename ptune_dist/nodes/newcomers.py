"""Nodes that want to join, and those that have just joined and lack the state to train on."""

from dataclasses import asdict
from typing import Protocol

from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.frames import Message
from ptune_dist.nodes.outside import Outside
from ptune_dist.nodes.turns import Plan, Record, Rules, ViewRecord, members_from_json


class Joined(Protocol):
    """What this needs of the member that it belongs to."""

    own: Member
    rules: Rules
    outside: Outside
    view: ViewRecord
    plan: Plan
    record: Record | None
    is_in_force: bool

    @property
    def is_member(self) -> bool: ...


class Newcomers:
    def __init__(self, member: Joined):
        self.waiting: dict[str, Member] = {}  # that this member is linked to
        self._member = member
        self._served: set[str] = set()  # that this member has sent its state
        self._sent: tuple[Message, bytes] | None = None

    def start_view(self) -> None:
        self.waiting = {node: each for node, each in self.waiting.items() if node not in self._member.view.ids}
        self._served &= set(self._member.view.ids)
        for node in self.waiting:
            self._tell_view(node)

    def on_join(self, message: Message) -> None:
        newcomer = members_from_json([message["member"]])[0]
        if self._member.is_member and newcomer.id not in self._member.view.ids:
            self.waiting[newcomer.id] = newcomer
            self._tell_view(newcomer.id)

    def on_link_lost(self, node: str) -> None:
        self.waiting.pop(node, None)

    def _tell_view(self, node: str) -> None:
        """Tell one that waits whom to link to."""
        member = self._member
        is_full = len(member.view.members) >= member.rules.max_nodes
        member.outside.send(node, {"kind": "view", "view": member.view.to_json(), "is_full": is_full}, [])

    def to_serve(self) -> list[str]:
        """Those that wait for this member's state of before the turn in progress."""
        member = self._member
        if member.plan.donor != member.own.id or not member.is_in_force:
            return []
        return [node for node in member.plan.newcomers if node in member.view.ids and node not in self._served]

    def serve(self, step: int, snapshot: bytes) -> None:
        member = self._member
        message = {
            "kind": "snapshot",
            "step": step,
            "view": member.view.to_json(),
            "plan": member.plan.to_json(),
            "record": member.record and member.record.to_json(),
        }
        for node in self.to_serve():
            member.outside.send(node, message, [snapshot])
            self._served.add(node)
        self._sent = (message, snapshot)

    def on_link(self, node: str) -> None:
        """A link is made again: a state that was on its way is lost, and this member may have begun the turn."""
        if self._sent and node in self._served and node in self._member.plan.newcomers:
            message, snapshot = self._sent
            self._member.outside.send(node, message, [snapshot])

    def to_json(self) -> list[dict[str, str]]:
        """Those that wait, for this member's report."""
        return [asdict(each) for each in self.waiting.values()]
