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

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ptune_dist.nodes.agreement import Agreed, Joined, LeftBehind, Member, OwnReport, StoppedWaiting, Todo, View
from ptune_dist.nodes.blocks import Range, is_power_of_two
from ptune_dist.nodes.membership import Completed, Membership
from ptune_dist.nodes.network import Network
from ptune_dist.nodes.rendezvous import FolderRendezvous, Rendezvous
from ptune_dist.nodes.rendezvous_server import ServerRendezvous
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
    "StoppedWaiting",
    "Todo",
    "View",
]


POLL_S = 0.2


def never() -> bool:
    return False


class NodeGroup:
    """This node's place among the nodes. A context manager; leaving it closes all links at once."""

    def __init__(self, settings: GroupSettings, say: Callable[[str], None]):
        """say: takes a line for the log, from any thread."""
        self._settings = settings
        self._network = Network(settings, say)
        self._turn = 0  # that the step in progress is
        self._completed: Completed | None = None

    def __enter__(self) -> "NodeGroup":
        """Raises UserError where an address, a folder or a certificate cannot be used."""
        try:
            self._network.start(build_rendezvous)
        except BaseException:
            self._network.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._network.close()

    def enter(self, num_blocks: int, is_stopping: Callable[[], bool] = never) -> Joined:
        """Become a member, after the base is loaded; num_blocks is a power of two and equal on all nodes.

        Waits until this node is in the view. Raises UserError where the others refuse it: another secret, another
        config, other num_blocks; StoppedWaiting where is_stopping() turns true meanwhile.
        """
        assert is_power_of_two(num_blocks)
        entering = self._network.run(self._network.enter(num_blocks, secrets.token_hex(8)))
        while not is_stopping():
            with contextlib.suppress(TimeoutError):
                return entering.result(POLL_S)
            self._network.check()
        entering.cancel()
        self._network.say(f"node {self._settings.name} stopped while waiting to join")
        raise StoppedWaiting(is_last=False)

    @property
    def view(self) -> View:
        """The nodes that train together now."""
        with self._network.changes:
            member = self._member
            return View(member.view.number, member.view.members, member.own.id)

    @property
    def num_missing(self) -> int:
        """How many more nodes there must be before a step begins."""
        with self._network.changes:
            member = self._network.member
            if member is None or not member.plan.is_hold:
                return 0
            return max(0, self._settings.min_nodes - len(member.view.members))

    @property
    def _member(self) -> Membership:
        member = self._network.member
        assert member, "enter the group first"
        return member

    def _check(self) -> None:
        self._network.check()
        if self._member.end:
            raise LeftBehind(self._member.end)

    def begin_step(
        self, step: int, snapshot: Callable[[], bytes], is_stopping: Callable[[], bool] = never
    ) -> list[Range]:
        """The ranges that this node computes, perhaps none. Waits while fewer than min_nodes are there.

        snapshot: called in this thread where this node sends its state, as of before `step`, to nodes that join.
        is_stopping: looked at while it waits. Raises LeftBehind, StoppedWaiting.
        """
        changes = self._network.changes
        while True:
            with changes:
                self._check()
                member = self._member
                member.is_waiting = True
                is_serving = bool(member.newcomers.to_serve())
                if not is_serving and member.begin():
                    member.is_waiting = False
                    self._turn = member.turn
                    return member.missing()
                if not is_serving:
                    member.wants_to_leave = is_stopping()
                    self._check_left(member)
                    changes.wait(POLL_S)
            if is_serving:
                data = snapshot()
                with changes:
                    member.newcomers.serve(step, data)

    def _check_left(self, member: Membership) -> None:
        record = member.record
        if record and record.plan.is_hold and member.own.id in record.leaving:
            raise StoppedWaiting(is_last=len(record.leaving) == len(record.plan.members))

    def deliver(self, step: int, pieces: Mapping[Range, bytes], own: OwnReport | None = None) -> None:
        """Send sums of ranges to all nodes, without waiting. May be called as they are made.

        own: with the last of the ranges that `begin_step` returned, and only then.
        """
        with self._network.changes:
            if self._member.turn == self._turn:  # else this node was left behind
                self._member.deliver(pieces, own)

    def wait(self, step: int) -> Todo:
        """Wait until the step is complete, or until this node has more to compute because others were lost.

        Raises LeftBehind.
        """
        changes = self._network.changes
        with changes:
            while True:
                member = self._member
                if member.completed and member.completed.record.plan.turn == self._turn:
                    self._completed = member.completed
                    return Todo()
                self._check()
                if redo := member.missing():
                    return Todo(tuple(redo))
                changes.wait(POLL_S)

    def cover(self, step: int) -> dict[Range, bytes]:
        """The sums that cover all blocks of a complete step, in order; the same bytes on every node."""
        assert self._completed
        return self._completed.cover

    def end_step(self, step: int) -> Agreed:
        """What follows from the reports of a complete step. Does not wait."""
        assert self._completed
        return agreed(self._completed, step, self._member.own.id)

    def leave(self) -> None:
        """Leave after a step in which this node was among those leaving, or while it waited to join.

        Waits a moment until the others have what they need of this node.
        """
        changes = self._network.changes
        with changes:
            member = self._network.member
            if member is None:
                return
            member.leave()
            end = time.monotonic() + self._settings.limits.silent_s
            while member.watch.is_needed() and time.monotonic() < end:
                changes.wait(POLL_S / 4)

    def finish(self, write: Callable[[], None]) -> None:
        """End the group after the last step, or after one with which all leave. Every node calls it.

        write: what the writer of each run folder does before anybody goes; where it is lost meanwhile, the next writer
        does it. Raises LeftBehind.
        """
        changes = self._network.changes
        has_written = False
        while True:
            with changes:
                self._check()
                member = self._member
                if member.is_over:
                    break
                is_writing = member.is_in_force and self.view.is_writer and not has_written
                if not is_writing:
                    if member.is_in_force and (has_written or member.has_final_report(self.view.writer)):
                        member.deliver_final()
                    changes.wait(POLL_S / 4)
            if is_writing:
                write()
                has_written = True
        self.leave()
        self._network.run(self._network.claim_end(self._member.view.number + 1)).result()


def agreed(completed: Completed, step: int, own_id: str) -> Agreed:
    record = completed.record
    plan = record.plan
    owners: dict[str, list[Range]] = {}
    for piece, node in plan.owners:
        owners.setdefault(node, []).append(piece)
    keys = ("seconds", "leaving", "digest", "kind", "decisions", "extra")
    is_last = len(record.leaving) == len(plan.members)
    return Agreed(
        step,
        completed.view_number,
        plan.members,
        {node: OwnReport(**{key: record.reports[node][key] for key in keys}) for node in plan.ids},
        {node: tuple(pieces) for node, pieces in owners.items()},
        joining=tuple(member for member in completed.following.members if member.id not in plan.ids),
        leaving=tuple(member for member in plan.members if member.id in record.leaving),
        is_leaving=own_id in record.leaving,
        is_last=is_last,
    )


def build_rendezvous(network: Network) -> Rendezvous:
    """A folder, or `host:port`."""
    where = network.settings.rendezvous
    if isinstance(where, Path):
        return FolderRendezvous(where, network.say)
    return ServerRendezvous(where, network.identity, network.contexts, network.say, network.settings.limits.mistake_s)
