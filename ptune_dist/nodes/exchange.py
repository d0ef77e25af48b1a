"""The sums and reports that a member sends and receives, of the turn in progress and the one before."""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

from ptune_dist.nodes.agreement import Member, OwnReport
from ptune_dist.nodes.blocks import Range
from ptune_dist.nodes.frames import Message, Parts
from ptune_dist.nodes.newcomers import Newcomers
from ptune_dist.nodes.outside import Outside
from ptune_dist.nodes.turns import Arrived, Plan, Report
from ptune_dist.nodes.view_change import Piece


class Exchanging(Protocol):
    """What this needs of the member that it belongs to."""

    own: Member
    outside: Outside
    plan: Plan
    newcomers: Newcomers

    @property
    def turn(self) -> int: ...

    def others(self) -> list[str]: ...


class Exchange:
    def __init__(self, member: Exchanging):
        self.arrived: defaultdict[int, Arrived] = defaultdict(Arrived)  # by the turn
        self._member = member

    @property
    def now(self) -> Arrived:
        """Of the turn in progress."""
        return self.arrived[self._member.turn]

    @property
    def has_reported(self) -> bool:
        return self._member.own.id in self.now.reports

    def missing(self) -> list[Range]:
        """The ranges that this member owns in the turn in progress and has not delivered."""
        own = self._member.own.id
        return [
            piece for piece, node in self._member.plan.owners if node == own and (piece, node) not in self.now.pieces
        ]

    def deliver(self, pieces: Mapping[Range, bytes], own: OwnReport | None, is_final: bool) -> None:
        """Send what this member has computed of the turn in progress, and its report when it is done."""
        member = self._member
        self.now.pieces |= {(piece, member.own.id): data for piece, data in pieces.items()}
        report: Report | None = None
        if own is not None and not self.has_reported:
            report = {
                "seconds": own.seconds,
                "num_blocks": sum(piece.num_blocks for piece, node in self.now.pieces if node == member.own.id),
                "leaving": own.leaving,
                "digest": own.digest,
                "kind": own.kind,
                "decisions": own.decisions,
                "marks": [list(marks) for marks in own.marks],
                "extra": json.loads(json.dumps(dict(own.extra))),  # as others read it
                "joiners": member.newcomers.to_json(),
                "is_final": is_final,
            }
            self.now.reports[member.own.id] = report
        for node in member.others():
            self._send(node, member.turn, dict(pieces), report)

    def resend(self, node: str) -> None:
        """All that this member has sent: messages to a node may be lost while its link is made again."""
        member = self._member
        for turn in (member.turn - 1, member.turn):
            arrived = self.arrived[turn]
            pieces = {piece: data for (piece, owner), data in arrived.pieces.items() if owner == member.own.id}
            self._send(node, turn, pieces, arrived.reports.get(member.own.id))

    def _send(self, node: str, turn: int, pieces: dict[Range, bytes], report: Report | None) -> None:
        if pieces or report:
            ranges = [[piece.lo, piece.hi] for piece in pieces]
            message = {"kind": "pieces", "turn": turn, "ranges": ranges, "report": report}
            self._member.outside.send(node, message, list(pieces.values()))

    def on_pieces(self, node: str, message: Message, parts: Parts) -> None:
        turn = int(message["turn"])
        if turn < self._member.turn - 1:
            return
        arrived = self.arrived[turn]
        for (lo, hi), data in zip(message["ranges"], parts, strict=True):
            arrived.pieces.setdefault((Range(int(lo), int(hi)), node), data)
        if message["report"] is not None:
            arrived.reports.setdefault(node, message["report"])

    def of_others(self, proposal: list[str]) -> dict[Piece, bytes]:
        """The sums that this member holds of nodes that are not in `proposal`."""
        return {
            (turn, piece, node): data
            for turn in (self._member.turn - 1, self._member.turn)
            for (piece, node), data in self.arrived[turn].pieces.items()
            if node not in proposal
        }

    def forget(self) -> None:
        """A turn is complete."""
        for turn in [turn for turn in self.arrived if turn < self._member.turn - 1]:
            del self.arrived[turn]
