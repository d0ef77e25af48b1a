"""A node that is no member yet: it finds the others, links to all of them, and gets the snapshot of one."""

from dataclasses import asdict, dataclass

from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.outside import Outside
from ptune_dist.nodes.settings import Limits
from ptune_dist.nodes.turns import Plan, Record, Rules, ViewRecord
from ptune_dist.nodes.view_change import State

REPEAT_S = 1.0  # between two requests to join


@dataclass(frozen=True)
class Snapshot:
    view: ViewRecord
    plan: Plan
    record: Record | None
    step: int
    data: bytes


class Candidate:
    """It keeps what members send for the turn that it will begin with."""

    def __init__(self, own: Member, outside: Outside, limits: Limits, rules: Rules, is_again: bool = False):
        """is_again: this node has been a member."""
        self.own = own
        self.view: ViewRecord | None = None  # the newest view that it knows
        self.snapshot: Snapshot | None = None
        self.early: list[tuple[str, Message, Parts]] = []
        self._outside = outside
        self._limits = limits
        self._rules = rules
        self._is_again = is_again
        self._sign = ""
        self._alive_at = outside.now()
        self._said = ""
        self._asked_at = 0.0

    def learn(self, view: ViewRecord | None) -> None:
        """A view that the rendezvous or a member knows of."""
        if view and view.members and (self.view is None or view.number > self.view.number):
            self.view = view
            self._alive_at = self._outside.now()
            self._outside.connect(view.members)

    def learn_sign(self, sign: str) -> None:
        """What the rendezvous has as a sign of life: a new text is one."""
        if sign != self._sign:
            self._sign = sign
            self._alive_at = self._outside.now()

    def is_group_gone(self) -> bool:
        """Whether no member has been heard of for long."""
        return self._outside.now() - self._alive_at > self._limits.found_s

    def ask_again(self) -> None:
        """Call several times a second. The node that was to send the snapshot may be lost, and the view with it."""
        now = self._outside.now()
        if self.view and now - self._asked_at >= REPEAT_S:
            self._asked_at = now
            for member in self.view.members:
                self.on_link(member.id)

    def on_link(self, node: str) -> None:
        """Ask to join."""
        self._outside.send(node, {"kind": "join", "member": asdict(self.own)}, [])

    def on_message(self, node: str, message: Message, parts: Parts) -> None:
        kind = message["kind"]
        if kind == "beat" and "turn" in message:  # of a member
            self._alive_at = self._outside.now()
        elif kind == "view":
            self.learn(ViewRecord.from_json(message["view"]))
            if message["is_full"]:
                self.say(f"waits as a spare: {self._rules.max_nodes} of max_nodes={self._rules.max_nodes} are there")
            else:
                self.say(self._describe_joining())
        elif kind == "prepare":
            self._outside.send(node, *State(ViewRecord(0, ()), None).to_message(message["attempt"]))
        elif kind == "snapshot":
            view = ViewRecord.from_json(message["view"])
            record = Record.from_json(message["record"]) if message["record"] else None
            if self.own.id in view.ids:
                plan = Plan.from_json(message["plan"])
                self.snapshot = Snapshot(view, plan, record, int(message["step"]), parts[0])
        elif kind in ("pieces", "newview", "out", "bye"):
            self.early.append((node, message, parts))

    def _describe_joining(self) -> str:
        """Whom this node joins. One of its own name without a link is what it was before it was lost."""
        members = self.view.members if self.view else ()
        links = {member: self._outside.link_state(member.id) for member in members}
        before = [member for member, link in links.items() if member.name == self.own.name and not link.is_open]
        names = ", ".join(member.name for member in members if member not in before)
        is_again = self._is_again or any(links[member].is_refused for member in before)
        return " ".join(filter(None, ("joins", names, "again" if is_again else "")))

    def say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._outside.say(f"node {self.own.name} {text}")
