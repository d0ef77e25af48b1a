"""How a view is made without the nodes that were lost: what the coordinator gathers, and what it decides.

The coordinator is the first member that nobody suspects. It asks the members that remain for their states (PREPARE,
STATE); each of them completes no turn from then on, until it has a new view. The coordinator decides, claims the next
number at the rendezvous, and tells all of them (NEWVIEW). Nothing but the claim makes a view valid, and a number is
claimed once, so two coordinators cannot both succeed. Whoever dies in between, the next coordinator does it again: all
steps but the claim can be repeated, and any member forwards a NEWVIEW to one that lacks it.

What the decision keeps:
- A turn that any remaining member has completed is completed by all with the same bytes. Members are at most one turn
  apart, because a turn needs the report of each.
- In the turn in progress, a sum of a lost node counts if any remaining member holds it; then all get it. What nobody
  holds is computed again by others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ptune_dist.nodes.blocks import Range
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.shares import take_over
from ptune_dist.nodes.turns import Plan, Record, ViewRecord

Piece = tuple[int, Range, str]  # the turn, the range, the node that computed it


@dataclass(frozen=True)
class State:
    """What a member answers. plan: of the turn in progress; None for a newcomer without a snapshot.

    pieces: what it holds of the last two turns from nodes that the coordinator takes for lost.
    differing: nodes whose sums of the turn in progress do not count, because they had another state.
    """

    view: ViewRecord
    plan: Plan | None
    record: Record | None = None
    pieces: dict[Piece, bytes] = field(default_factory=dict)
    differing: tuple[str, ...] = ()

    def to_message(self, attempt: str) -> tuple[Message, Parts]:
        message = {
            "kind": "state",
            "attempt": attempt,
            "view": self.view.to_json(),
            "plan": self.plan and self.plan.to_json(),
            "record": self.record and self.record.to_json(),
            "pieces": pieces_to_json(self.pieces),
            "differing": list(self.differing),
        }
        return message, list(self.pieces.values())

    @staticmethod
    def from_message(message: Message, parts: Parts) -> "State":
        return State(
            ViewRecord.from_json(message["view"]),
            Plan.from_json(message["plan"]) if message["plan"] else None,
            Record.from_json(message["record"]) if message["record"] else None,
            pieces_from_json(message["pieces"], parts),
            tuple(message["differing"]),
        )


@dataclass(frozen=True)
class NewView:
    """A decision. It has all that a member needs, be it in the turn of `plan` or in the one before.

    record: of the turn before, where somebody has not completed it.
    pieces: sums of lost nodes that count.
    """

    view: ViewRecord
    plan: Plan
    record: Record | None
    pieces: dict[Piece, bytes]

    def to_message(self) -> tuple[Message, Parts]:
        message = {
            "kind": "newview",
            "view": self.view.to_json(),
            "plan": self.plan.to_json(),
            "record": self.record and self.record.to_json(),
            "pieces": pieces_to_json(self.pieces),
        }
        return message, list(self.pieces.values())

    @staticmethod
    def from_message(message: Message, parts: Parts) -> "NewView":
        return NewView(
            ViewRecord.from_json(message["view"]),
            Plan.from_json(message["plan"]),
            Record.from_json(message["record"]) if message["record"] else None,
            pieces_from_json(message["pieces"], parts),
        )


def pieces_to_json(pieces: dict[Piece, bytes]) -> list[list[int | str]]:
    return [[turn, piece.lo, piece.hi, node] for turn, piece, node in pieces]


def pieces_from_json(data: Sequence[Sequence], parts: Parts) -> dict[Piece, bytes]:
    keys = [(int(turn), Range(int(lo), int(hi)), str(node)) for turn, lo, hi, node in data]
    return dict(zip(keys, parts, strict=True))


def decide(base: ViewRecord, by: str, states: dict[str, State]) -> NewView:
    """The next view after `base` from the states of the members that remain, all of which have a plan.

    Members that cannot complete the turn that others have completed are not in it.
    """
    pieces = {key: data for state in states.values() for key, data in state.pieces.items()}
    plans = {node: state.plan for node, state in states.items() if state.plan}
    turn = max(plan.turn for plan in plans.values())
    differing = {node for state in states.values() for node in state.differing}
    pieces = {key: data for key, data in pieces.items() if key[0] < turn or key[2] not in differing}
    ahead = [node for node, plan in plans.items() if plan.turn == turn]
    record = next((states[node].record for node in ahead if states[node].record), None)
    remaining = set(plans)
    if len(ahead) == len(plans):
        record = None
    elif record is None or not all(
        node in remaining or (turn - 1, r, node) in pieces for r, node in record.plan.owners
    ):
        remaining = set(ahead)
        record = None
    plan = without_lost(plans[ahead[0]], remaining & set(base.ids), pieces)
    needed = {(turn, piece, node) for piece, node in plan.owners}
    if record:
        needed |= {(turn - 1, piece, node) for piece, node in record.plan.owners}
    counted = {key: data for key, data in pieces.items() if key in needed and key[2] not in plan.ids}
    return NewView(ViewRecord(base.number + 1, plan.members, by), plan, record, counted)


def without_lost(plan: Plan, remaining: set[str], pieces: dict[Piece, bytes]) -> Plan:
    """The plan among the members that remain: what lost ones have not delivered is divided over the others."""
    members = tuple(member for member in plan.members if member.id in remaining)
    nodes = [member.id for member in members]
    kept = [(r, node) for r, node in plan.owners if node in nodes or (plan.turn, r, node) in pieces]
    lost = [r for r, node in plan.owners if (r, node) not in kept]
    newcomers = tuple(node for node in plan.newcomers if node in nodes)
    workers = [node for node in nodes if node not in newcomers] or nodes
    owners = tuple(sorted([*kept, *take_over(lost, workers, plan.seconds)]))
    seconds = {node: value for node, value in plan.seconds.items() if node in nodes}
    return Plan(plan.turn, members, owners, seconds, newcomers)
