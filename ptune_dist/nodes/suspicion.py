"""Which members a node takes for lost, and why; whom the coordinator removes where members cannot reach each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptune_dist.nodes.frames import Message
from ptune_dist.nodes.settings import Limits

NEWCOMER_FACTOR = 3.0  # of stall_s: a node that joins loads the snapshot before its first turn
EDGE_AGE_S = 1.0  # a report about a node that the coordinator itself can reach waits for those of others
EDGE_LIFE_S = 3.0  # a report that is not repeated does not count


@dataclass(frozen=True)
class LinkState:
    """Of the link to a member. down_s: since it broke, or since it was first wanted."""

    is_open: bool
    silent_s: float = 0.0
    down_s: float = 0.0
    was_open: bool = False
    is_refused: bool = False  # nothing listens at the member's address any more


def why_unreachable(link: LinkState, limits: Limits) -> str:
    """Why a member counts as lost by its link; "" if it does not."""
    if link.is_open:
        return f"has been silent for {link.silent_s:.1f} s" if link.silent_s > limits.silent_s else ""
    if link.was_open and link.is_refused:
        return "has ended"
    if link.down_s > (limits.relink_s if link.was_open else limits.silent_s):
        return "cannot be reached"
    return ""


def why_late(beat: Message, age_s: float, expected_s: float | None, is_newcomer: bool, limits: Limits) -> str:
    """Why a member that shows signs of life counts as lost: its training does not get ahead.

    beat: its last one, which came age_s ago. expected_s: for its blocks; None if unknown.
    """
    seconds = float(beat.get("phase_s", 0.0)) + age_s
    if beat.get("phase") == "compute":
        limit = limits.first_stall_s if expected_s is None else limits.stall_s + 2 * expected_s
        return f"has computed for {seconds:.1f} s" if seconds > limit else ""
    if beat.get("phase") == "between":
        limit = NEWCOMER_FACTOR * limits.stall_s if is_newcomer else limits.between_steps_s
        return f"has not begun the step for {seconds:.1f} s" if seconds > limit else ""
    return ""


class ReportedSuspicions:
    """What other members have told the coordinator: (who suspects, whom)."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], float] = {}
        self._last: dict[tuple[str, str], float] = {}

    def add(self, reporter: str, suspect: str, now: float) -> None:
        edge = (reporter, suspect)
        self._first.setdefault(edge, now)
        self._last[edge] = now

    def clear(self) -> None:
        self._first.clear()
        self._last.clear()

    def to_remove(self, members: Sequence[str], own: str, already: Iterable[str], now: float) -> set[str]:
        """The fewest members, roughly, without which all that remain can reach each other.

        Whoever is in most reports, as the one or the other side, goes first; the latest to come on a tie. `own` is
        the coordinator; `already` are removed anyway.
        """
        for edge in [edge for edge, at in self._last.items() if now - at > EDGE_LIFE_S]:
            del self._last[edge], self._first[edge]
        removed = set(already)
        edges = [edge for edge, at in self._first.items() if now - at > EDGE_AGE_S and set(edge) <= set(members)]
        while edges := [edge for edge in edges if not removed & set(edge)]:
            candidates = [node for node in members if node != own and any(node in edge for edge in edges)]
            removed.add(max(candidates, key=lambda node: (sum(node in edge for edge in edges), members.index(node))))
        return removed
