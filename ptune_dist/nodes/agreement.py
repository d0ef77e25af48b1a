"""What nodes tell each other in a step, and what follows from it for all of them alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptune_dist.nodes.blocks import Range


class LeftBehind(Exception):
    """The other nodes continue without this one: it stalled, or its network was cut.

    The node keeps its base. It calls `NodeGroup.enter` again, takes over the snapshot that this returns, and continues
    with `Joined.step`.
    """


class StoppedWaiting(Exception):
    """This node was asked to stop while it waited for others, and has left.

    is_last: all members have been asked to; the loop calls `NodeGroup.finish`.
    """

    def __init__(self, is_last: bool):
        super().__init__()
        self.is_last = is_last


@dataclass(frozen=True)
class Member:
    """One node of a view. `id` is new each time that the node enters; `name` is for people."""

    id: str
    name: str
    address: str  # host:port at which the others reach it
    folder: str  # nodes with the same value share a run folder


@dataclass(frozen=True)
class View:
    """The nodes that train together, the longest present first. Each change of them has a number of its own."""

    number: int
    members: tuple[Member, ...]
    own_id: str

    @property
    def own_index(self) -> int:
        return [member.id for member in self.members].index(self.own_id)

    @property
    def own(self) -> Member:
        return self.members[self.own_index]

    @property
    def is_writer(self) -> bool:
        """Whether this node writes the run folder. One that leaves does not, once there is a view without it."""
        return any(member.id == self.own_id for member in self.members) and self.writer == self.own_id

    @property
    def writer(self) -> str:
        """The id of the member that writes this node's run folder: the first of those that share it."""
        return next(member.id for member in self.members if member.folder == self.own.folder)


@dataclass(frozen=True)
class OwnReport:
    """What a node tells the others once in a step. It is the same on all of them when the step is complete."""

    seconds: float = 0.0  # that its blocks of this step took, without waiting; the shares follow it
    leaving: bool = False  # the node wants to leave after this step
    digest: str = (
        ""  # of its state at the beginning of the step: who differs from most is left behind; "" is not compared
    )
    extra: Mapping[str, Any] = field(default_factory=dict)  # JSON for the loop itself, such as a request to stop
    kind: str = ""  # nodes of one kind have the same digest, those of others round differently: marks are compared
    decisions: str = ""  # what is equal on nodes of all kinds
    marks: tuple[tuple[float, ...], ...] = ()  # of parts of the state, each its size first; () is not compared


@dataclass(frozen=True)
class Joined:
    """How a node came into the group.

    Without a snapshot it is the first: it begins with the newest checkpoint or anew. With one it continues from there
    with step `step`.
    """

    snapshot: bytes | None = None
    step: int | None = None


@dataclass(frozen=True)
class Todo:
    """What `wait` returns: ranges that this node computes in place of a lost one; none where the step is complete."""

    redo: tuple[Range, ...] = ()

    @property
    def is_complete(self) -> bool:
        return not self.redo


@dataclass(frozen=True)
class Agreed:
    """What follows from the reports of a complete step. All nodes that complete it get the same, `is_leaving` apart.

    members: those whose reports these are. owners: who computed which blocks, by the members' names, for metrics.jsonl.
    joining and leaving: who is there from the next step on, and who is not.
    """

    step: int
    view_number: int
    members: tuple[Member, ...]
    reports: Mapping[str, OwnReport]  # by the id of the member
    owners: Mapping[str, tuple[Range, ...]]  # by the id of the member; lost ones too, where their sums had arrived
    joining: tuple[Member, ...] = ()
    leaving: tuple[Member, ...] = ()
    is_leaving: bool = False  # this node is among those leaving: it calls `leave` now
    is_last: bool = False  # nobody trains after this step: the writer saves a checkpoint
