"""What a member tells the others of itself, and what it makes of their signs of life."""

from typing import Protocol

from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.exchange import Exchange
from ptune_dist.nodes.frames import Message
from ptune_dist.nodes.outside import Outside
from ptune_dist.nodes.settings import Limits
from ptune_dist.nodes.shares import num_blocks_of
from ptune_dist.nodes.suspicion import LinkState, why_late, why_unreachable
from ptune_dist.nodes.turns import Plan, ViewRecord


class Watched(Protocol):
    """What this needs of the member that it belongs to."""

    own: Member
    view: ViewRecord
    plan: Plan
    limits: Limits
    outside: Outside
    begun: int
    is_waiting: bool
    turn_since: float
    exchange: Exchange

    @property
    def turn(self) -> int: ...

    @property
    def done(self) -> int: ...

    def others(self) -> list[str]: ...


class Watch:
    def __init__(self, member: Watched):
        self._member = member
        self._phase = (0, "", 0.0)
        self._view_since = member.outside.now()
        self._beats: dict[str, tuple[Message, float]] = {}
        self._gone: set[str] = set()  # members that said that they leave

    def start_view(self) -> None:
        self._view_since = self._member.outside.now()

    def start_anew(self) -> None:
        """This process was stopped: what it knows of others is old."""
        self._view_since = self._member.outside.now()
        self._beats.clear()

    def on_beat(self, node: str, message: Message) -> None:
        self._beats[node] = (message, self._member.outside.now())

    def on_bye(self, node: str, message: Message) -> None:
        self.on_beat(node, message)
        self._gone.add(node)

    def beat(self) -> Message:
        """A sign of life, with what this member is doing and since when."""
        member = self._member
        name = self._phase_name()
        if (member.turn, name) != self._phase[:2]:
            self._phase = (member.turn, name, member.outside.now())
        message = {"kind": "beat", "turn": member.turn, "phase": name, "phase_s": member.outside.now() - self._phase[2]}
        return message | {"view": member.view.number, "done": member.done}

    def _phase_name(self) -> str:
        member = self._member
        if member.begun != member.turn:
            return "wait" if member.is_waiting else "between"
        is_done = member.exchange.has_reported and not member.exchange.missing()
        return "wait" if is_done else "compute"

    def is_needed(self) -> bool:
        """Whether a member that can be reached may need what this one holds of the last complete turn."""
        member = self._member
        for node in member.others():
            done = int(self._beats.get(node, ({}, 0.0))[0].get("done", 0))
            if done < member.done and member.outside.link_state(node).is_open:
                return True
        return False

    def without_state(self) -> set[str]:
        """The newcomers that have not shown yet that they have a snapshot."""
        newcomers = set(self._member.plan.newcomers) - {self._member.own.id}
        return {node for node in newcomers if "turn" not in self._beats.get(node, ({}, 0.0))[0]}

    def suspects(self, differing: set[str], mute: set[str]) -> dict[str, str]:
        """The members that this one takes for lost now, and why.

        differing: those with another state. mute: those that did not answer a coordinator.
        """
        found = {}
        others = self._member.others()
        for node in others:
            if node in self._gone and not self._lacks(node):
                continue
            why = self._why_lost(node)
            if not why and node in differing:
                why = "has another state"
            if not why and node in mute:
                why = "does not answer"
            if why:
                found[node] = why
        return found | dict.fromkeys(self._gone & set(others), "has left") if found else found

    def _why_lost(self, node: str) -> str:
        if node in self._gone:
            return "has left"
        member = self._member
        link = member.outside.link_state(node)
        down_s = min(link.down_s, member.outside.now() - self._view_since)
        link = LinkState(link.is_open, link.silent_s, down_s, link.was_open, link.is_refused)
        return why_unreachable(link, member.limits) or self._why_late(node)

    def _lacks(self, node: str) -> bool:
        """Whether the turn in progress lacks anything of a node."""
        member = self._member
        arrived = member.exchange.now
        return node not in arrived.reports or any(
            owner == node and (piece, owner) not in arrived.pieces for piece, owner in member.plan.owners
        )

    def _why_late(self, node: str) -> str:
        """Why a member is too slow, where this one has done its part and waits for it."""
        member = self._member
        if self._phase_name() != "wait" or node not in self._beats or not self._lacks(node):
            return ""
        now = member.outside.now()
        beat, at = self._beats[node]
        if int(beat.get("turn", member.turn)) < member.turn:  # its exchange hangs, whatever its loop does
            return "does not get ahead" if now - member.turn_since > 2 * member.limits.stall_s else ""
        count = num_blocks_of(member.plan.owners).get(node, 0)
        seconds = member.plan.seconds.get(node)
        expected_s = None if count and seconds is None else count * (seconds or 0.0)
        return why_late(beat, now - at, expected_s, node in member.plan.newcomers, member.limits)
