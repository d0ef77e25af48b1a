"""Turns: the exchanges of a group. Who does what in one, what has arrived of it, and what follows from it.

A turn is a step of training, or an empty exchange while fewer than min_nodes are there (a hold). It is complete for a
node that holds the sums of all ranges from the nodes that own them and the reports of all members. What follows,
`follow`, is a pure function of these reports, so all nodes come to the same without asking each other.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any

from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.blocks import Range
from ptune_dist.nodes.guard import find_differing
from ptune_dist.nodes.shares import Owners, next_shares

# Of one node: seconds, leaving, digest, kind, decisions, marks and extra as in OwnReport; num_blocks that the seconds
# are of; joiners: members to be that it is linked to; is_final.
Report = dict[str, Any]
SMOOTHING = 0.5  # of the measured speeds: the weight of the newest


@dataclass(frozen=True)
class Rules:
    """What is equal on all nodes."""

    num_blocks: int
    min_nodes: int
    max_nodes: int


@dataclass(frozen=True)
class ViewRecord:
    """A view as the rendezvous keeps it. by: the change that it comes from; "" where it follows from reports."""

    number: int
    members: tuple[Member, ...]
    by: str = ""

    @property
    def ids(self) -> list[str]:
        return [member.id for member in self.members]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"members": [asdict(member) for member in self.members]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ViewRecord":
        return ViewRecord(int(data["number"]), members_from_json(data["members"]), str(data["by"]))


def members_from_json(data: Any) -> tuple[Member, ...]:
    return tuple(Member(**{key: str(item[key]) for key in ("id", "name", "address", "folder")}) for item in data)


@dataclass(frozen=True)
class Plan:
    """Who does what in a turn.

    newcomers: members that have no blocks yet; the first of the others sends them its state.
    """

    turn: int
    members: tuple[Member, ...]
    owners: Owners
    seconds: Mapping[str, float]  # per block, of the members that have been measured
    newcomers: tuple[str, ...] = ()

    @property
    def is_hold(self) -> bool:
        return not self.owners

    @property
    def ids(self) -> list[str]:
        return [member.id for member in self.members]

    @property
    def donor(self) -> str:
        """Who sends newcomers its state."""
        return next((node for node in self.ids if node not in self.newcomers), "")

    def to_json(self) -> dict[str, Any]:
        return {
            "turn": self.turn,
            "members": [asdict(member) for member in self.members],
            "owners": [[piece.lo, piece.hi, node] for piece, node in self.owners],
            "seconds": dict(self.seconds),
            "newcomers": list(self.newcomers),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Plan":
        owners = tuple((Range(int(lo), int(hi)), str(node)) for lo, hi, node in data["owners"])
        seconds = {str(node): float(value) for node, value in data["seconds"].items()}
        newcomers = tuple(map(str, data["newcomers"]))
        return Plan(int(data["turn"]), members_from_json(data["members"]), owners, seconds, newcomers)


Key = tuple[Range, str]  # a range and the node that computed it


@dataclass
class Arrived:
    """What a node holds of a turn. The first of two with the same key is kept; they are equal."""

    pieces: dict[Key, bytes] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)

    def has_all(self, plan: Plan) -> bool:
        if self.is_final(plan):
            return True
        return all(node in self.reports for node in plan.ids) and all(key in self.pieces for key in plan.owners)

    def is_final(self, plan: Plan) -> bool:
        """Whether it is the turn after the last step: nobody computes, and newcomers have nothing to join.

        Newcomers that are left alone decide it themselves.
        """
        nodes = [node for node in plan.ids if node not in plan.newcomers] or plan.ids
        return all(self.reports.get(node, {}).get("is_final") for node in nodes)

    def other_ends(self, plan: Plan) -> set[str]:
        """The members for which the last step is over and for the first it is not, or the other way round.

        Nodes of different kinds may judge an evaluation differently. Newcomers are not asked.
        """
        told = {node: self.reports[node] for node in plan.ids if node in self.reports and node not in plan.newcomers}
        if plan.is_hold or plan.donor not in told:
            return set()
        is_final = told[plan.donor]["is_final"]
        return {node for node, report in told.items() if report["is_final"] != is_final}

    def other_states(self, plan: Plan) -> set[str]:
        """The members whose state before the turn was another."""
        return find_differing([(node, self.reports.get(node, {})) for node in plan.ids])


@dataclass(frozen=True)
class Record:
    """A complete turn: its plan and the reports of all members in it."""

    plan: Plan
    reports: Mapping[str, Report]

    @property
    def leaving(self) -> list[str]:
        return [node for node in self.plan.ids if self.reports[node]["leaving"]]

    def to_json(self) -> dict[str, Any]:
        return {"plan": self.plan.to_json(), "reports": {node: self.reports[node] for node in self.plan.ids}}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Record":
        return Record(Plan.from_json(data["plan"]), dict(data["reports"]))


def follow(record: Record, rules: Rules) -> Plan:
    """The plan of the next turn if nobody is lost. Its members are those of this turn where all of them leave."""
    plan = record.plan
    staying = [member for member in plan.members if member.id not in record.leaving]
    joining = agreed_joiners(record, [member.id for member in staying])[: max(rules.max_nodes - len(staying), 0)]
    if not staying:
        staying, joining = list(plan.members), []
    joining = with_own_names(joining, {member.name for member in staying})
    members = (*staying, *joining)
    seconds = measured(record, {member.id for member in members})
    owners: Owners = ()
    if len(members) >= rules.min_nodes:
        owners = next_shares(rules.num_blocks, [member.id for member in staying], seconds, plan.owners)
    return Plan(plan.turn + 1, members, owners, seconds, tuple(member.id for member in joining))


def agreed_joiners(record: Record, staying: list[str]) -> list[Member]:
    """Who may join: those that every member that stays is linked to, by name."""
    if not staying:
        return []
    listed = [{member.id: member for member in members_from_json(record.reports[node]["joiners"])} for node in staying]
    common = [listed[0][node] for node in listed[0] if all(node in others for others in listed)]
    return sorted(common, key=lambda member: (member.name, member.id))


def with_own_names(joining: list[Member], taken: set[str]) -> list[Member]:
    """A node that joins with a name that another one has gets a number: its machine has the same host name."""
    named = []
    for member in joining:
        names = (f"{member.name}-{number}" if number > 1 else member.name for number in count(1))
        name = next(name for name in names if name not in taken)
        taken = taken | {name}
        named.append(replace(member, name=name))
    return named


def measured(record: Record, nodes: set[str]) -> dict[str, float]:
    """Seconds per block of those of `nodes` that have been measured."""
    seconds = {node: value for node, value in record.plan.seconds.items() if node in nodes}
    for node, report in record.reports.items():
        if node in nodes and report["num_blocks"] and report["seconds"] > 0:
            new = float(report["seconds"]) / int(report["num_blocks"])
            seconds[node] = (1 - SMOOTHING) * seconds.get(node, new) + SMOOTHING * new
    return seconds


def first_plan(own: Member, rules: Rules) -> Plan:
    """Of the node that begins a group: it computes all blocks, or waits for others."""
    whole = Range(0, rules.num_blocks)
    return Plan(1, (own,), ((whole, own.id),) if rules.min_nodes <= 1 else (), {})
