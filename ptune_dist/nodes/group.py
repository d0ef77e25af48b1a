"""What the training loop uses: enter the group, then for each step begin, deliver, wait, cover, end.

    with NodeGroup(settings, say) as group:
        joined = group.enter(num_blocks)
        step = first_step(joined)                    # take over joined.snapshot, or the newest checkpoint
        while True:
            todo = Todo(tuple(group.begin_step(step, snapshot)))
            group.deliver(step, compute(todo.redo), own_report)
            while not (todo := group.wait(step)).is_complete:
                group.deliver(step, compute(todo.redo))
            update(tree_sum(group.cover(step)))
            agreed = group.end_step(step)

`begin_step` and `wait` raise LeftBehind where the others continue without this node; it then enters again. Only the
leader of a node (its rank 0) has a group, and only its main thread calls it.
"""

import os
from collections.abc import Callable, Mapping

from ptune_dist.nodes.agreement import Agreed, Joined, LeftBehind, Member, OwnReport, Todo, View
from ptune_dist.nodes.blocks import Range, is_power_of_two, subtrees
from ptune_dist.nodes.settings import GroupSettings, Limits

__all__ = [
    "Agreed",
    "GroupSettings",
    "Joined",
    "LeftBehind",
    "Limits",
    "Member",
    "NodeGroup",
    "OwnReport",
    "Range",
    "Todo",
    "View",
]


class NodeGroup:
    """This node's place among the nodes. A context manager; leaving it closes all links at once."""

    def __init__(self, settings: GroupSettings, say: Callable[[str], None]):
        """say: takes a line for the log, from any thread."""
        self._settings = settings
        self._say = say
        self._num_blocks = 0
        self._pieces: dict[Range, bytes] = {}
        self._own_report = OwnReport()

    def __enter__(self) -> "NodeGroup":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def enter(self, num_blocks: int) -> Joined:
        """Become a member, after the base is loaded; num_blocks is a power of two and equal on all nodes.

        Waits until this node is in the view. Raises UserError where the others refuse it: another secret, another
        run_key, other num_blocks.
        """
        assert is_power_of_two(num_blocks)
        self._num_blocks = num_blocks
        own = Member(os.urandom(8).hex(), self._settings.name, "", self._settings.folder)
        self._view = View(1, (own,), own.id)
        return Joined()

    @property
    def view(self) -> View:
        """The nodes that train together now."""
        return self._view

    def begin_step(self, step: int, snapshot: Callable[[], bytes]) -> list[Range]:
        """The ranges that this node computes, perhaps none. Waits while fewer than min_nodes are there.

        snapshot: called in this thread where this node sends its state, as of before `step`, to nodes that join.
        """
        self._pieces = {}
        return subtrees(0, self._num_blocks)

    def deliver(self, step: int, pieces: Mapping[Range, bytes], own: OwnReport | None = None) -> None:
        """Send sums of ranges to all nodes, without waiting. May be called as they are made.

        own: with the last of the ranges that `begin_step` returned, and only then.
        """
        self._pieces |= pieces
        self._own_report = own or self._own_report

    def wait(self, step: int) -> Todo:
        """Wait until the step is complete, or until this node has more to compute because others were lost."""
        missing = self._num_blocks - sum(r.num_blocks for r in self._pieces)
        assert not missing, "not all ranges are delivered"
        return Todo()

    def cover(self, step: int) -> dict[Range, bytes]:
        """The sums that cover all blocks of a complete step, in order; the same bytes on every node."""
        return dict(sorted(self._pieces.items()))

    def end_step(self, step: int) -> Agreed:
        """What follows from the reports of a complete step. Does not wait."""
        own = self._view.own
        leaving = (own,) if self._own_report.leaving else ()
        return Agreed(
            step,
            self._view.number,
            self._view.members,
            {own.id: self._own_report},
            {own.id: tuple(sorted(self._pieces))},
            leaving=leaving,
            is_leaving=bool(leaving),
            is_last=bool(leaving),
        )

    def leave(self) -> None:
        """Leave after a complete step, such as the last one: waits a moment until the others have what they need."""
