"""Whose state is another than that of the others, from the reports of all members. A pure function, equal on all nodes.

All nodes apply the same sums. Nodes of one kind come to the same bytes; nodes of different kinds round differently in
the update, so their states are equal but for that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

WITHIN = 1e-3  # relative: rounding stays far below it, and an update that a node has missed does not for long


def find_differing(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> set[str]:
    """reports: of all members in order, with `digest`, `kind`, `decisions` and `marks` as in OwnReport.

    Where all are of one kind: those with another digest than most, or on a tie than the first. Else those that have
    decided otherwise than the first, or whose marks are far from its own.
    """
    told = [(node, report) for node, report in reports if report.get("digest")]
    if not told:
        return set()
    if len({report["kind"] for _, report in told}) == 1:
        digests = [report["digest"] for _, report in told]
        usual = max(digests, key=lambda value: (digests.count(value), -digests.index(value)))
        return {node for node, report in told if report["digest"] != usual}
    first = told[0][1]
    return {node for node, report in told if not is_near(report, first)}


def is_near(report: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    if report["decisions"] != first["decisions"]:
        return False
    if not (report["marks"] and first["marks"]):  # in the step in which the kinds become known
        return True
    return all(
        abs(own - other) <= WITHIN * abs(others[0])
        for marks, others in zip(report["marks"], first["marks"], strict=True)
        for own, other in zip(marks, others, strict=True)
    )
