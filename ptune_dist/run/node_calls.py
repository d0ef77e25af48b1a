"""Calls of the group of nodes, which only rank 0 has: all ranks of the node wait for them, and get what they return."""

import queue
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from typing import Any, NamedTuple, TypeVar

from ptune_dist.distributed.world import World, broadcast_from_main, sum_over_ranks
from ptune_dist.errors import RunFault, UserError
from ptune_dist.nodes.agreement import LeftBehind, StoppedWaiting
from ptune_dist.nodes.group import NodeGroup
from ptune_dist.run.batches_ahead import use_device
from ptune_dist.run.shared_pen import Log, SharedLog
from ptune_dist.run.watch import Watch

T = TypeVar("T")
Lines = queue.SimpleQueue[str]
SLICE_S = 2.0  # of a wait, after which the ranks report that they are alive


class OutOfPatience(Exception):
    """This node is asked to stop, and a call takes too long for that."""


class Answer(NamedTuple):
    """What rank 0 tells the others of a call of the group: nothing yet, what it has returned, or its error."""

    is_there: bool
    value: Any = None
    error: Exception | None = None


class NodeCalls:
    """The group is on rank 0 alone; `lines` are those that it writes, which go to `log`. Methods are collective."""

    def __init__(self, group: NodeGroup | None, world: World, watch: Watch, lines: Lines):
        self.log: Log | None = None
        self._group = group
        self._world = world
        self._watch = watch
        self._lines = lines
        self._is_asked = False  # any rank of this node, to stop
        # Calls of the group wait for other nodes, so they are made in a thread, always the same one.
        self._thread = ThreadPoolExecutor(1, "nodes", initializer=use_device(world.device))

    def close(self) -> None:
        if self._group:
            self._group.__exit__(None, None, None)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def ask(
        self, call: Callable[[NodeGroup], T], patience_s: float, while_waiting: Callable[[NodeGroup], None] | None
    ) -> T:
        """What a call of the group returns, on all ranks, which report that they are alive while it waits.

        while_waiting: called on rank 0 now and then. Raises what the call raises, and OutOfPatience where this node is
        asked to stop and the call takes longer than `patience_s`.
        """
        future = self._thread.submit(call, self._group) if self._group else None
        began = time.monotonic()
        while True:
            answer: Answer = broadcast_from_main(find_answer(future) if future else None, self._world)
            self._watch.beat()
            self._show_lines()
            if answer.error is not None:
                raise (future.exception() if future else None) or answer.error
            if answer.is_there:
                return answer.value
            if self._group and while_waiting:
                while_waiting(self._group)
            is_late = future is not None and time.monotonic() - began > patience_s
            if self.is_asked_here() and sum_over_ranks([float(is_late)], self._world)[0]:
                raise OutOfPatience

    def is_asked_here(self) -> bool:
        """Whether any rank of this node is asked to stop."""
        self._is_asked = sum_over_ranks([float(self._watch.requested)], self._world)[0] > 0
        return self._is_asked

    def is_stopping(self) -> bool:
        """In the group's thread, while it waits for other nodes."""
        return self._is_asked or self._watch.requested

    def _show_lines(self) -> None:
        """Write what the group has told since the last time."""
        while self._group and not self._lines.empty():
            line = self._lines.get()
            if isinstance(self.log, SharedLog):
                self.log.tell(line)
            else:
                print(line, flush=True)


def find_answer(future: Future[Any]) -> Answer:
    """What has come of a call, after a moment."""
    try:
        return Answer(True, future.result(SLICE_S))
    except StillWaiting:
        return Answer(False)
    except (UserError, RunFault, LeftBehind, StoppedWaiting) as error:
        return Answer(True, error=error)
    except Exception as error:  # it may not travel
        return Answer(True, error=RuntimeError("".join(traceback.format_exception(error))))
