"""A step's sums where each node trains in a world of its own, and nodes exchange sums of blocks of the step's rows.

All nodes have the same prompts, optimizers and progress at every step. Rank 0 of a node, its leader, is in the group of
nodes (`nodes.group`); what the group answers it tells the other ranks, so that all make the same passes.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ptune_dist.data.blocks import divide
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, from_main, to_device, together
from ptune_dist.nodes.agreement import Agreed, Joined, LeftBehind, OwnReport, StoppedWaiting
from ptune_dist.nodes.blocks import Range
from ptune_dist.nodes.group import NodeGroup
from ptune_dist.optim.block_sums import add_pieces, gather_blocks, to_pieces
from ptune_dist.run.accumulate import Accumulator
from ptune_dist.run.batches_ahead import Share, StepPlan
from ptune_dist.run.checkpoint import load_newest_checkpoint, pack_snapshot, unpack_snapshot
from ptune_dist.run.folder import is_finished
from ptune_dist.run.job import Job
from ptune_dist.run.joining import enter_first
from ptune_dist.run.node_calls import Lines, NodeCalls, OutOfPatience
from ptune_dist.run.node_history import History
from ptune_dist.run.node_state import StateReports
from ptune_dist.run.one_world import StepSums, agree_on_stop
from ptune_dist.run.progress import Progress, checkpoint, continue_from, restore, take_snapshot
from ptune_dist.run.shared_pen import Log, SharedLog, SharedPen
from ptune_dist.run.status import mark_node_running, mark_running
from ptune_dist.run.waiting import Waiting
from ptune_dist.run.watch import StopAgreed, Watch

T = TypeVar("T")
# Of subtrees of blocks, their sums on rank 0. Called again where a node is lost, for what this one computes instead.
Compute = Callable[[Sequence[Range]], dict[Range, torch.Tensor]]
PATIENCE_S = 15.0  # for the end of a step, of a node that is asked to stop


class FinishedByOthers(Exception):
    """The other nodes have finished the run without this one; `summary` is what they have written."""

    def __init__(self, summary: dict[str, Any]):
        super().__init__("the other nodes have finished the run without this one")
        self.summary = summary


class Replicas:
    """This node among those that train together. A context manager. Its methods are collective."""

    def __init__(
        self,
        job: Job,
        world: World,
        watch: Watch,
        group: NodeGroup | None,
        num_blocks: int,
        lines: Lines,
        blocks_of_worker: int = 1,
    ):
        """`group`: on rank 0 alone, entered by `begin`; `lines` are those that it writes. The world's pen is shared.

        num_blocks: what nodes divide, the blocks of a step; with `train.sync_every` above 1 the workers of a period, in
        each of whose steps the ranks of a node divide `blocks_of_worker`.
        """
        assert isinstance(world.pen, SharedPen), "which node writes is decided here"
        self._job = job
        self._world = world
        self._watch = watch
        self._group = group
        self.num_blocks = num_blocks
        self.blocks_of_worker = blocks_of_worker
        self._pen = world.pen
        self._rows: TrainingRows | None = None
        self._progress: Progress | None = None
        self._agreed: Agreed | None = None  # after the last step
        self._has_left = False  # as it waited for more nodes, which continue to wait
        self._is_stuck = False  # a call of the group did not return in time
        self._is_last = False  # all nodes have left as they waited for more
        self._total = torch.zeros(0)  # on rank 0: the sums of the step
        self._waiting = Waiting(Path(job.config.output_dir), world.pen, lines.put)
        self.history = History()
        self._calls = NodeCalls(group, world, watch, lines)
        self._states = StateReports(job, world.device, lines.put)

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.close()

    def begin(self, rows: TrainingRows) -> Progress:
        """Where the run stands, by its newest checkpoint or by the nodes that are training it. Raises UserError."""
        self._rows = rows
        found, is_writer = self._enter()
        self._hold_pen(is_writer)
        self._progress = found or restore(self._job, rows, self._world)
        run_dir = Path(self._job.config.output_dir)
        together(self._world, lambda: mark_node_running(run_dir) if self._group else None)
        return self._progress

    def _enter(self) -> tuple[Progress | None, bool]:
        """Become a member: where the others stand, None where there are none, and whether this node writes."""
        assert self._rows is not None, "begin comes first"
        self._agreed = None
        snapshot, is_writer = self._ask(self._enter_group)
        found = None if snapshot is None else continue_from(unpack_snapshot(snapshot), self._job, self._rows)
        return found, is_writer

    def _enter_group(self, group: NodeGroup) -> tuple[bytes | None, bool]:
        def enter(group: NodeGroup) -> Joined:
            return group.enter(self.num_blocks, self._calls.is_stopping)

        config = self._job.config
        if self._progress is None:
            joined = enter_first(group, enter, Path(config.output_dir), config.train.sync_every)
        else:
            joined = enter(group)
        return joined.snapshot, group.view.is_writer

    def sum_step(self, accumulate: Accumulator, progress: Progress, log: Log | None) -> StepSums | None:
        """The next step's sums over all nodes. None as of `take_turn`."""
        step = progress.step + 1
        engine = self._job.engine
        length = engine.count_sums(progress.live)
        plan: StepPlan | None = None

        def compute(ranges: Sequence[Range]) -> dict[Range, torch.Tensor]:
            nonlocal plan
            if plan is None:
                engine.model.begin_step(step)
            share = Share(self.num_blocks, tuple(map(tuple, divide(ranges, self._world.size))))
            plan, sums = accumulate.sum_blocks(step, progress.live, share)
            return gather_blocks(sums, share.of_ranks, length, self._world)

        total = self.take_turn(progress, log, length, compute)
        if total is None or plan is None:
            return None
        return StepSums(plan, engine.measure_sums(list(plan.examples), total))

    def take_turn(self, progress: Progress, log: Log | None, length: int, compute: Compute) -> torch.Tensor | None:
        """The sum of a turn's blocks over all nodes [length], on every rank. Collective.

        None where the others have continued without this node: it is back then, with their prompts and `progress`.
        """
        self._calls.log = log
        try:
            return self._take_turn(progress, length, compute)
        except LeftBehind:
            self._come_back(progress)
            return None

    def _take_turn(self, progress: Progress, length: int, compute: Compute) -> torch.Tensor:
        step = progress.step + 1
        ranges = self._begin_step(step)
        report: OwnReport | None = self._states.report(progress) if self._group else OwnReport()
        while True:
            began = time.perf_counter()
            parts = compute(ranges)
            pieces = to_pieces(ranges, parts) if self._group else {}
            if report is not None:
                self.history.blocks_s = time.perf_counter() - began
                report = replace(report, seconds=self.history.blocks_s, leaving=self._calls.is_asked_here())
            ranges = self._exchange(step, pieces, report)
            if self._agreed is not None:
                return self._share_total(length)
            report = None

    def _begin_step(self, step: int) -> Sequence[Range]:
        """The blocks of a step that this node computes. Waits while there are fewer nodes than `train.min_nodes`."""
        self._agreed = None
        self.history.begin()
        ranges, is_writer = self._ask(
            lambda group: (group.begin_step(step, self._snapshot, self._calls.is_stopping), group.view.is_writer),
            while_waiting=lambda group: self._waiting.look(group.num_missing),
        )
        self._hold_pen(is_writer)
        if self._group:
            self._waiting.end()
        return ranges

    def _snapshot(self) -> bytes:
        """This node's state, for one that joins. Called while all ranks wait."""
        assert self._progress is not None, "begin comes first"
        return pack_snapshot(take_snapshot(self._job, self._progress))

    def _exchange(self, step: int, pieces: dict[Range, bytes], report: OwnReport | None) -> Sequence[Range]:
        """Send this node's sums and wait for the others': more blocks to compute, or none and `_agreed` is set."""
        began = time.perf_counter()
        redo, self._agreed, is_writer = self._ask(
            lambda group: self._exchange_with(group, step, pieces, report), patience_s=PATIENCE_S
        )
        self.history.seconds += time.perf_counter() - began
        self._hold_pen(is_writer)
        if self._agreed is not None:
            self._pen.forget()
            self.history.count(self._agreed)
            if self._group:
                self._states.note_kinds(self._agreed)
        return redo

    def _exchange_with(
        self, group: NodeGroup, step: int, pieces: dict[Range, bytes], report: OwnReport | None
    ) -> tuple[Sequence[Range], Agreed | None, bool]:
        """In the group's thread: what is left to compute or what is agreed, and whether this node writes."""
        self.history.num_bytes += sum(map(len, pieces.values())) * (len(group.view.members) - 1)
        group.deliver(step, pieces, report)
        todo = group.wait(step)
        is_writer = group.view.is_writer
        if not todo.is_complete:
            return todo.redo, None, is_writer
        cover = group.cover(step)
        if any(cover.values()):
            self._total = add_pieces(self.num_blocks, cover)
        agreed = group.end_step(step)
        if not agreed.is_leaving:
            return (), agreed, group.view.is_writer
        own = next(member for member in agreed.members if member.id == group.view.own_id)
        stay = [member for member in (*agreed.members, *agreed.joining) if member not in agreed.leaving]
        return (), agreed, is_writer and all(member.folder != own.folder for member in stay)

    def _share_total(self, length: int) -> torch.Tensor:
        """The sums of the step, on every rank."""
        device = self._world.device
        total = to_device(self._total, device) if self._group else torch.empty(length, device=device)
        if self._world.size > 1:
            dist.broadcast(total, 0)
        return total

    def _hold_pen(self, is_writer: bool) -> None:
        """Have this node write, or not. Raises RunFault on all ranks where what it takes over cannot be written."""

        def change() -> None:
            if is_writer and not self._pen.is_writer:
                run_dir = Path(self._job.config.output_dir)
                if self._calls.log is not None:  # in the middle of the run
                    mark_running(run_dir)
                self._pen.take()
            elif self._pen.is_writer and not is_writer:
                self._pen.pass_on()
                if isinstance(self._calls.log, SharedLog):
                    self._calls.log.close()

        if is_writer != self._pen.is_writer:
            together(self._world, change)

    def _come_back(self, progress: Progress) -> None:
        """The others have continued without this node: take over their state, without loading the base again."""
        self._job.engine.drop_gradients()
        self._hold_pen(False)
        found, is_writer = self._enter()
        if found is None:
            if summary := from_main(self._world, lambda: is_finished(self._job.config)):
                self._pen.pass_on()  # nothing of it is to be written
                raise FinishedByOthers(summary)
            found = self._find_later(progress)
        if found is not None:
            self._pen.pass_on()  # others have written what this node has kept, and what came later
            progress.take_over(found)
            if isinstance(self._calls.log, SharedLog):
                self._calls.log.continue_from(progress.step)
        self._hold_pen(is_writer)

    def _find_later(self, progress: Progress) -> Progress | None:
        """The others are gone: what they have saved since."""
        assert self._rows is not None, "begin comes first"
        folder = Path(self._job.config.output_dir) / "checkpoints"
        newest = from_main(self._world, lambda: load_newest_checkpoint(folder, print))
        if newest is None or newest.step <= progress.step:
            return None
        return continue_from(newest, self._job, self._rows, saved_step=newest.step)

    def is_asked(self, log: Log | None) -> bool:
        """Whether this node stops after this step."""
        is_asked = agree_on_stop(self._watch, log, self._world)
        return self._agreed.is_leaving if self._agreed is not None else is_asked

    @property
    def has_left(self) -> bool:
        """Whether the others continue without this node, by its own wish."""
        return self._has_left or (self._agreed is not None and self._agreed.is_leaving and not self._agreed.is_last)

    def facts(self) -> dict[str, Any]:
        """What metrics.jsonl has of the last step beside the usual."""
        return self.history.facts()

    def end(self, *, is_done: bool) -> None:
        """This node is about to end, and has written what it had to.

        Where all end, it waits until they have: another node writes where the writer is lost.
        """
        if self._is_stuck:  # it leaves without a word
            return
        is_last = is_done or self._is_last or (self._agreed is not None and self._agreed.is_last)
        with contextlib.suppress(LeftBehind, StopAgreed):  # the others write
            self._ask(lambda group: group.finish(self._write_end) if is_last else group.leave(), patience_s=PATIENCE_S)

    def _write_end(self) -> None:
        """In the group's thread, on the node that writes: it has, or it has kept what the lost one had to write."""
        if not self._pen.is_writer:
            self._pen.take()
            if isinstance(self._calls.log, SharedLog):
                self._calls.log.close()

    def _ask(
        self,
        call: Callable[[NodeGroup], T],
        *,
        patience_s: float = math.inf,
        while_waiting: Callable[[NodeGroup], None] | None = None,
    ) -> T:
        """As `NodeCalls.ask`, but for StopAgreed where this node stops as it waits, after saving where it writes."""
        try:
            return self._calls.ask(call, patience_s, while_waiting)
        except StoppedWaiting as stopped:
            self._is_last = stopped.is_last
            self._has_left = not stopped.is_last
        except OutOfPatience:
            self._is_stuck = True
        if self._progress is not None and self._progress.step:
            checkpoint(self._job, self._progress, self._world)
        raise StopAgreed
