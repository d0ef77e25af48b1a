"""The change of a view after a loss: who leads it, and what the leader does until all have a new view.

It can be led by any member, at any time, and by several at once: the rendezvous lets one of them succeed. The others
learn of it from the NEWVIEW, or from the claim that they lose.
"""

from dataclasses import dataclass, field
from typing import Protocol

from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.outside import Outside
from ptune_dist.nodes.settings import Limits
from ptune_dist.nodes.suspicion import ReportedSuspicions
from ptune_dist.nodes.turns import ViewRecord
from ptune_dist.nodes.view_change import NewView, State, decide

REPEAT_S = 1.0
LONGEST_ANSWER = 20.0  # of answer_s: for a large state over a slow link
LOOK_S = 0.5  # between two looks at the rendezvous, while the larger side of a cut has its turn


@dataclass
class Change:
    """An attempt to make a view of `proposal` after `base`."""

    attempt: str
    base: ViewRecord
    proposal: list[str]
    started: float
    asked_at: float
    states: dict[str, State] = field(default_factory=dict)
    answering: set[str] = field(default_factory=set)  # members whose state is on its way: a large one takes long
    decision: NewView | None = None  # that is being claimed
    looked_at: float = 0.0


class Led(Protocol):
    """What the coordination needs of the member that it belongs to."""

    own: Member
    view: ViewRecord
    limits: Limits
    outside: Outside
    frozen: dict[str, float]

    def state(self, proposal: list[str]) -> State: ...

    def install(self, new: NewView) -> None: ...

    def leave_behind(self, why: str) -> None: ...


class Coordination:
    def __init__(self, member: Led):
        self.member = member
        self.base = member.view  # the newest valid view that is known, to which the next one is added
        self.change: Change | None = None
        self.mute: set[str] = set()  # members that have not answered, or had nothing to answer
        self.reported = ReportedSuspicions()
        self._num_attempts = 0
        self._reported_at = 0.0

    def reset(self, view: ViewRecord) -> None:
        """A new view is valid and known to this member."""
        self.base = view
        self.change = None
        self.mute.clear()
        self.reported.clear()

    def on_suspect(self, node: str, message: Message) -> None:
        if int(message["view"]) == self.member.view.number:
            self.reported.add(node, str(message["node"]), self.member.outside.now())

    def on_newer_view(self, held: ViewRecord) -> None:
        """The rendezvous holds a newer view than this member has: the one that it has claimed, or another."""
        decision = self.change and self.change.decision
        if decision and held == decision.view:
            return self._succeed(decision)
        is_unknown_end = not held.members and held.number > self.base.number + 1  # of a view without this member
        if is_unknown_end or (held.members and self.member.own.id not in held.ids):
            return self.member.leave_behind("the others continue without it")
        if held.number > self.base.number:
            members = held.members or self.base.members  # an empty view: those who were in it have left
            self.base = ViewRecord(held.number, members, held.by)
            self.give_up()
            if held.by:  # who made that view tells us of it, or is taken for lost
                leader = held.by.partition("/")[0]
                self.member.frozen[leader if leader in held.ids else self.member.own.id] = self.member.outside.now()

    def give_up(self) -> None:
        """Stop an attempt for which nothing is being claimed."""
        for node in self.change.proposal if self.change else ():
            if node != self.member.own.id:
                self.member.outside.send(node, {"kind": "release"}, [])
        self.change = None
        self.member.frozen.pop(self.member.own.id, None)

    def tick(self, suspects: set[str], without_state: set[str]) -> None:
        """Lead a change, or tell who should. without_state: members that wait for a snapshot, which cannot lead."""
        member = self.member
        if self.change and self.change.decision:
            return  # its claim is on its way
        now = member.outside.now()
        own = member.own.id
        self.mute |= {node for node, at in member.frozen.items() if now - at > 2 * member.limits.answer_s} - {own}
        suspects = suspects | self.mute
        leader = next((node for node in self.base.ids if node not in suspects | without_state), own)
        if leader != own:
            if self.change:
                self.give_up()
            return self._report(leader, suspects, now)
        removed = self.reported.to_remove(self.base.ids, own, suspects, now)
        if removed or self.change or own in member.frozen:
            self._lead(removed, now)

    def _report(self, leader: str, suspects: set[str], now: float) -> None:
        if now - self._reported_at >= REPEAT_S:
            self._reported_at = now
            for node in suspects:
                message = {"kind": "suspect", "view": self.member.view.number, "node": node}
                self.member.outside.send(leader, message, [])

    def _lead(self, removed: set[str], now: float) -> None:
        proposal = [node for node in self.base.ids if node not in removed]
        if self.change is None or self.change.proposal != proposal or self.change.base != self.base:
            self._start(proposal, now)
        change = self.change
        assert change
        if now - change.asked_at >= REPEAT_S:
            self._ask(now)
        silent = [node for node in proposal if node not in change.states]
        if not silent:
            self._finish(now)
        elif now - change.started > self.member.limits.answer_s:
            is_too_late = now - change.started > LONGEST_ANSWER * self.member.limits.answer_s
            self.mute |= set(silent) if is_too_late else set(silent) - change.answering

    def _start(self, proposal: list[str], now: float) -> None:
        self._num_attempts += 1
        own = self.member.own.id
        self.member.frozen[own] = now
        self.change = Change(f"{own}/{self._num_attempts}", self.base, proposal, now, now)
        self.change.states[own] = self.member.state(proposal)
        self._ask(now)

    def _ask(self, now: float) -> None:
        change = self.change
        assert change
        change.asked_at = now
        message = {"kind": "prepare", "attempt": change.attempt, "base": change.base.number}
        message["proposal"] = change.proposal
        for node in change.proposal:
            if node != self.member.own.id:
                is_answering = node in change.answering or node in change.states
                self.member.outside.send(node, message | {"is_answering": is_answering}, [])

    def on_answering(self, node: str, message: Message) -> None:
        """A member's state comes next on its link, so from here on the link tells whether it gets ahead."""
        if self.change and message["attempt"] == self.change.attempt:
            self.change.answering.add(node)

    def on_new_link(self, node: str) -> None:
        """What was on its way is lost: ask again."""
        if self.change:
            self.change.answering.discard(node)

    def on_state(self, node: str, message: Message, parts: Parts) -> None:
        change = self.change
        if change is None or message["attempt"] != change.attempt or change.decision:
            return
        state = State.from_message(message, parts)
        if state.view.number > self.base.number:
            return self.on_newer_view(state.view)
        if state.plan is None:
            self.mute.add(node)
        else:
            change.states[node] = state
        if len(change.states) == len(change.proposal):
            self._finish(self.member.outside.now())

    def _finish(self, now: float) -> None:
        """Decide and claim, once all have answered; the smaller side of a cut waits before it does."""
        change = self.change
        if change is None or change.decision:
            return
        decision = decide(change.base, change.attempt, change.states)
        if self.member.own.id not in decision.view.ids:
            return self.member.leave_behind("it lacks sums of the last step that no node holds any more")
        is_majority = has_majority(decision.view, change.base)
        if not is_majority and now - change.started < self.member.limits.minority_s:
            if now - change.looked_at >= LOOK_S:
                change.looked_at = now
                self.member.outside.look_up()
            return
        change.decision = decision
        self.member.outside.claim(decision.view, is_majority)

    def _succeed(self, decision: NewView) -> None:
        change = self.change
        assert change
        message, parts = decision.to_message()
        for node in {*change.proposal, *decision.view.ids} - {self.member.own.id}:
            self.member.outside.send(node, message, parts)
        self.member.install(decision)


def has_majority(view: ViewRecord, before: ViewRecord) -> bool:
    """Whether a view has most members of the one before, or half of them with the first: no other view can."""
    kept = len(set(view.ids) & set(before.ids))
    return 2 * kept > len(before.members) or (2 * kept == len(before.members) and before.ids[0] in view.ids)
