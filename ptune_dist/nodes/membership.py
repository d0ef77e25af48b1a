"""A member's part in the protocol: turns, and views as they change. It does no input or output of its own.

Invariants, which everything here serves:

1. A view with number n follows the one view with number n - 1. It is valid once the rendezvous holds it under n, and
   a number is claimed once. Whoever finds its claim lost to a view without itself is left behind.
2. A turn is complete for a member that holds the sums of all ranges from those that the plan names, and the reports of
   all members. So members are at most one turn apart, and no side of a cut gets ahead without a new view.
3. After it has answered a PREPARE, a member completes nothing until it has a new view. So what it answered stays true.
4. The plan of the next turn and the members that join and leave follow from the reports of a complete turn alone.
   Every member claims the view that follows; the claims are equal.
5. Every member of a view sums the same bytes: of a member what it sent, of a lost node what NEWVIEW carries.
6. All messages may be repeated. A link that is made again repeats what a member has sent in the last two turns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ptune_dist.nodes.agreement import Member, OwnReport
from ptune_dist.nodes.blocks import Range
from ptune_dist.nodes.coordination import Coordination
from ptune_dist.nodes.exchange import Exchange
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.newcomers import Newcomers
from ptune_dist.nodes.outside import Outside
from ptune_dist.nodes.settings import Limits
from ptune_dist.nodes.turns import Plan, Record, Rules, ViewRecord, follow
from ptune_dist.nodes.view_change import NewView, State
from ptune_dist.nodes.watch import Watch

HOLD_PACE_S = 0.3  # between the exchanges of nodes that wait for others
OWN_PAUSE_S = 2.0  # a longer gap between two checks: this process was stopped, and its messages have not been read yet
REPEAT_S = 1.0  # before a message that had no effect is sent again


@dataclass(frozen=True)
class Completed:
    """A complete turn with its sums, for the training loop."""

    record: Record
    view_number: int
    cover: dict[Range, bytes]
    following: Plan


class Membership:
    """One member, from when it has a state to train on until it leaves or is left behind."""

    def __init__(self, own: Member, rules: Rules, limits: Limits, outside: Outside, view: ViewRecord, plan: Plan):
        self.own = own
        self.rules = rules
        self.limits = limits
        self.outside = outside
        self.view = view
        self.plan = plan  # of the turn in progress
        self.record: Record | None = None  # of the turn before
        self.completed: Completed | None = None  # the last complete turn
        self.newest: NewView | None = None  # the last decision that this member knows
        self.is_in_force = True  # the view of `plan` is valid; else it is being claimed
        self.frozen: dict[str, float] = {}  # coordinators whose view this member waits for, and when they last asked
        self.end = ""  # why this member is one no more
        self.has_left = False  # as agreed on
        self.is_over = False  # the final turn is complete
        self.is_waiting = False  # the loop waits for the turn to begin
        self.wants_to_leave = False  # while it waits
        self.differing: set[str] = set()
        self._ahead: NewView | None = None  # what holds when the turn in progress is complete
        self.begun = 0  # the turn that the loop has begun
        self.turn_since = self._checked_at = outside.now()
        self._told: dict[str, float] = {}  # when a member was sent a view that it lacks
        self._announced: set[str] = set()
        self.newcomers = Newcomers(self)
        self.exchange = Exchange(self)
        self.watch = Watch(self)
        self.coordination = Coordination(self)
        outside.connect(view.members)

    @property
    def turn(self) -> int:
        return self.plan.turn

    @property
    def is_member(self) -> bool:
        return not (self.end or self.has_left or self.is_over)

    @property
    def done(self) -> int:
        """The last turn that is complete."""
        return self.turn if self.is_over else self.turn - 1

    def leave(self) -> None:
        """Tell all others, after what was sent to them before."""
        for node in self.others():
            self.outside.send(node, {"kind": "bye", "done": self.done}, [])

    def others(self) -> list[str]:
        return [node for node in self.view.ids if node != self.own.id]

    # What the training loop does

    def begin(self) -> bool:
        """Whether the turn in progress is one of training that the loop computes now."""
        if not self.is_in_force or self.plan.is_hold or self.newcomers.to_serve():
            return False
        self.begun = self.turn
        return True

    def deliver(self, pieces: Mapping[Range, bytes], own: OwnReport | None, is_final: bool = False) -> None:
        """Send what this node has computed of the turn in progress, and its report when it is done with its share."""
        self.exchange.deliver(pieces, own, is_final)
        self._advance()

    def has_final_report(self, node: str) -> bool:
        """Whether a node has ended, or trains on: then it must hear that this one does not."""
        report = self.exchange.now.reports.get(node)
        return report is not None and (bool(report["is_final"]) or not self.plan.is_hold)

    def deliver_final(self) -> None:
        """This node has nothing to do after the last step."""
        self.is_waiting = True
        if not self.exchange.has_reported:
            self.deliver({}, OwnReport(), is_final=True)

    def missing(self) -> list[Range]:
        """The ranges that this member owns in the turn in progress and has not delivered."""
        return self.exchange.missing()

    # What others send

    def on_message(self, node: str, message: Message, parts: Parts) -> None:
        kind = message["kind"]
        if kind == "join":
            self.newcomers.on_join(message)
        elif kind == "beat":
            self._on_beat(node, message)
        elif kind == "pieces":
            self.exchange.on_pieces(node, message, parts)
            self._advance()
        elif kind == "bye":
            self.watch.on_bye(node, message)
            self.outside.changed()
        elif kind == "out" and int(message["view"]["number"]) > self.view.number and self.is_member:
            self.leave_behind("the others continue without it")
        elif kind == "prepare":
            self._on_prepare(node, message)
        elif kind == "release":
            self.frozen.pop(node, None)
            self._advance()
        elif kind == "answering":
            self.coordination.on_answering(node, message)
        elif kind == "state":
            self.coordination.on_state(node, message, parts)
        elif kind == "suspect":
            self.coordination.on_suspect(node, message)
        elif kind == "newview":
            self.install(NewView.from_message(message, parts))

    def on_link(self, node: str) -> None:
        """A link to a node is up, perhaps again: it may lack what was on its way."""
        self.coordination.on_new_link(node)
        self.newcomers.on_link(node)
        if node in self.view.ids and not self.end:
            self.exchange.resend(node)

    def on_link_lost(self, node: str) -> None:
        self.newcomers.on_link_lost(node)

    def _on_beat(self, node: str, message: Message) -> None:
        self.watch.on_beat(node, message)
        number = int(message.get("view", self.view.number))
        is_due = self.outside.now() - self._told.get(node, -REPEAT_S) >= REPEAT_S
        has_agreed_to_leave = self.record is not None and node in self.record.leaving
        if number >= self.view.number or not is_due or not self.is_member or has_agreed_to_leave:
            return
        self._told[node] = self.outside.now()
        if node not in self.view.ids:
            self.outside.send(node, {"kind": "out", "view": self.view.to_json()}, [])
        elif self.newest and self.newest.view.number > number:
            self.outside.send(node, *self.newest.to_message())

    def _on_prepare(self, node: str, message: Message) -> None:
        if self.end:
            return
        if int(message["base"]) >= self.view.number:
            self.frozen[node] = self.outside.now()
        if not message["is_answering"]:
            self.outside.send(node, {"kind": "answering", "attempt": message["attempt"]}, [])
            self.outside.send(node, *self.state(message["proposal"]).to_message(message["attempt"]))

    def state(self, proposal: list[str]) -> State:
        """What a coordinator needs to know if the members in `proposal` remain."""
        return State(self.view, self.plan, self.record, self.exchange.of_others(proposal), tuple(self.differing))

    # What follows

    def _advance(self) -> None:
        while self._complete():
            pass
        self.outside.changed()

    def _complete(self) -> bool:
        """Complete the turn in progress if it can be. Returns whether the next might be as well."""
        arrived = self.exchange.now
        if not (self.is_member and self.is_in_force and not self.frozen):
            return False
        differing = arrived.other_ends(self.plan)
        if not (differing or arrived.has_all(self.plan)):
            return False
        if differing := differing or arrived.other_states(self.plan):
            if self.own.id in differing:
                self.leave_behind("its state differs from that of the others")
            self.differing |= differing
            return False
        if arrived.is_final(self.plan):  # newcomers may not have reported
            self.is_over = True
            return False
        record = Record(self.plan, {node: arrived.reports[node] for node in self.plan.ids})
        cover = {piece: arrived.pieces[piece, node] for piece, node in self.plan.owners}
        following = follow(record, self.rules)
        self.completed = Completed(record, self.view.number, cover, following)
        self.record = record
        self._enter_turn(following)
        return True

    def _enter_turn(self, following: Plan) -> None:
        leaving = self.own.id not in following.ids
        self.plan = following
        self.turn_since = self.outside.now()
        self.exchange.forget()
        if leaving:
            self.has_left = True
        elif self._ahead:
            self.plan = self._ahead.plan
            self._ahead = None
        elif following.ids != self.view.ids:
            self.is_in_force = False
            self.outside.claim(ViewRecord(self.view.number + 1, following.members), True)

    def on_claimed(self, asked: ViewRecord, held: ViewRecord) -> None:
        """The rendezvous holds `held` under the number that this member has claimed for `asked`."""
        if not self.is_member or held.number <= self.view.number:
            return
        if held == asked and not asked.by:
            self._change_view(held)
            self._advance()
        else:
            self.coordination.on_newer_view(held)

    def on_latest(self, held: ViewRecord) -> None:
        if not self.is_member:
            return
        if held.number > self.view.number:
            self.coordination.on_newer_view(held)
        elif held.number == self.view.number and held != self.view:  # each side of a cut from the rendezvous made one
            self.leave_behind("the others continue without it")

    def install(self, new: NewView) -> None:
        """Take over the decision of a coordinator."""
        if not self.is_member or new.view.number <= self.view.number:
            return
        is_behind = new.plan.turn == self.turn + 1 and new.record is not None
        is_leaving = is_behind and new.record is not None and self.own.id in new.record.leaving
        if not (self.own.id in new.view.ids or is_leaving) or not (is_behind or new.plan.turn == self.turn):
            return self.leave_behind("the others continue without it")
        for (turn, piece, node), data in new.pieces.items():
            self.exchange.arrived[turn].pieces[piece, node] = data
        self.newest = new
        if is_behind and new.record:
            self.plan = new.record.plan
            self.exchange.now.reports |= new.record.reports
            self._ahead = new
        else:
            self.plan = new.plan
        self.frozen.clear()
        self._change_view(new.view)
        for node in {*self.others(), *self.plan.ids} - {self.own.id}:
            self.exchange.resend(node)
        self._advance()

    def _change_view(self, view: ViewRecord) -> None:
        before = {member.id: member.name for member in self.view.members}
        after = {member.id: member.name for member in view.members}
        lines = [f"{name} joins" for node, name in after.items() if node not in before]
        lines += [f"without {name}" for node, name in before.items() if node not in after]
        count = f"{len(after)} node{'s' * (len(after) != 1)}"
        self.outside.say(f"view {view.number}: {count}{''.join(f', {line}' for line in lines)}")
        self.view = view
        self.is_in_force = True
        self.watch.start_view()
        self.differing.clear()
        self._announced.clear()
        self.coordination.reset(view)
        self.outside.connect(view.members)
        self.newcomers.start_view()

    def leave_behind(self, why: str) -> None:
        """This node is a member no more, without having agreed to that."""
        self.end = why
        self.outside.changed()

    # What time brings

    def tick(self) -> None:
        """Call several times a second."""
        now = self.outside.now()
        has_paused = now - self._checked_at > OWN_PAUSE_S
        self._checked_at = now
        if not self.is_member:
            return
        if has_paused:
            return self.watch.start_anew()
        self._hold()
        suspects = self.watch.suspects(self.differing, self.coordination.mute)
        for node in suspects.keys() - self._announced:
            self.outside.say(f"node {self._name(node)} {suspects[node]}")
        self._announced = set(suspects)
        self.coordination.tick(set(suspects), self.watch.without_state())

    def _hold(self) -> None:
        """While too few nodes are there, exchange reports now and then: they say who may join."""
        is_due = self.outside.now() - self.turn_since > HOLD_PACE_S
        is_waiting = self.is_waiting and self.plan.is_hold and self.is_in_force and not self.newcomers.to_serve()
        if is_waiting and is_due and not self.exchange.has_reported:
            self.deliver({}, OwnReport(leaving=self.wants_to_leave))

    def _name(self, node: str) -> str:
        return next((member.name for member in self.view.members if member.id == node), node)
