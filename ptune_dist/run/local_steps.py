"""Periods of `train.sync_every` local steps between two exchanges of nodes (DiLoCo, arXiv:2311.08105), for slow links.

A worker is a part of the algorithm, not a machine: the run has `train.num_workers` of them, and nodes divide them as
they divide the blocks of a step. Each worker reads its part of every step's rows, which are dealt in turn, and takes an
optimizer step of its own. All begin a period from the same prompts and the same optimizer's state, and it ends with
their mean, by numbers of rows, added up in the fixed tree over workers. So what a worker does follows from the last
exchange alone: any node can compute it, the workers of a lost node are computed again by others from the beginning of
the period, and the result is bitwise the same whatever nodes there are. Where all continue from is also what a
checkpoint holds and what a node that joins gets.

That is why the inner optimizer's states are averaged too, where DiLoCo leaves them with the workers: with AdamW an
exchange has three times the numbers of a gradient, once in `sync_every` steps. Within a node the gradients of each
local step are summed over its ranks. An evaluation, a checkpoint or a stop that falls into a period waits for its end.
The last period is shorter where `max_steps` is no multiple of `sync_every`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ptune_dist.data.blocks import RunningSums, divide
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World
from ptune_dist.nodes.blocks import Range
from ptune_dist.optim.block_sums import sum_in_world
from ptune_dist.optim.local_steps import begin_state, move_to_mean, read_moves, read_state, spoil, write_state
from ptune_dist.optim.optimizer import learning_rate_at
from ptune_dist.optim.prompt_state import Measured
from ptune_dist.run.accumulate import Accumulator
from ptune_dist.run.batches_ahead import Share
from ptune_dist.run.job import Job
from ptune_dist.run.progress import Progress
from ptune_dist.run.replicas import Replicas
from ptune_dist.run.shared_pen import Log
from ptune_dist.run.step_lines import Taken


class Ended(NamedTuple):
    """A period that all nodes have ended: its steps in order, the members whose numbers failed, and where first."""

    steps: list[Taken]
    faults: dict[str, str]
    fault_step: int


@dataclass
class LocalSteps:
    """Takes one period after another."""

    job: Job
    rows: TrainingRows
    accumulate: Accumulator
    nodes: Replicas
    world: World

    def take(self, progress: Progress, log: Log | None) -> Ended | None:
        """The next period, after which the members are where all continue. Collective.

        None where the others have continued without this node, which is where they are then.
        """
        period = Period(self, find_period(self.job, progress.step), progress.live)
        total = self.nodes.take_turn(progress, log, period.length, period.compute)
        return None if total is None else period.end(total)


def find_period(job: Job, step: int) -> range:
    """The steps after `step` until the next exchange: after a multiple of `sync_every`, or the last step."""
    train = job.config.train
    end = min((step // train.sync_every + 1) * train.sync_every, train.max_steps)
    return range(step + 1, end + 1)


class Period:
    """The local steps of the workers that this node computes, and what follows from those of all."""

    def __init__(self, of: LocalSteps, steps: range, names: list[str]):
        """names: the members that take the steps."""
        self._of = of
        self._steps = steps
        self._names = names
        self._engine = of.job.engine
        self._members = [of.job.engine.prompts.members[name] for name in names]
        for member in self._members:
            begin_state(member)
        self._starts = [read_state(member) for member in self._members]
        self._read = [of.rows.of_step(step, names) for step in steps]
        # The sums over workers: of each member what `read_moves` gives; losses; norms, both [steps, members].
        self._sizes = [len(start) for start in self._starts]
        self.length = sum(self._sizes) + 2 * len(steps) * len(names)

    def compute(self, ranges: Sequence[Range]) -> dict[Range, torch.Tensor]:
        """The sums over each of these runs of workers. Collective."""
        sums: RunningSums[torch.Tensor] = RunningSums(ranges)
        for own in ranges:
            for worker in range(own.lo, own.hi):
                sums.add(worker, self._run_worker(worker))
        self._begin_again()
        return sums.found

    def _begin_again(self) -> None:
        """The members as all nodes have them; they are so too while this node waits, since it may have to save then."""
        for member, start in zip(self._members, self._starts, strict=True):
            write_state(member, start)

    def _run_worker(self, worker: int) -> torch.Tensor:
        """A worker's part of the sums. Collective."""
        self._begin_again()
        measured = [self._take_step(worker, step) for step in self._steps]
        weights = [self._weight(name, worker) for name in self._names]
        places = [self._engine.members.index(name) for name in self._names]
        losses = [one.losses[place] for one in measured for place in places]
        norms = [
            weight * one.norms[name] for one in measured for name, weight in zip(self._names, weights, strict=True)
        ]
        moves = [
            weight * read_moves(member, start)
            for member, start, weight in zip(self._members, self._starts, weights, strict=True)
        ]
        return torch.cat([*moves, torch.tensor(losses + norms, device=self._of.world.device)])

    def _take_step(self, worker: int, step: int) -> Measured:
        """One step of a worker, of which the node's ranks compute a part each. Collective."""
        nodes = self._of.nodes
        world = self._of.world
        self._engine.model.begin_step(step)
        of_ranks = divide([Range(0, nodes.blocks_of_worker)], world.size)
        share = Share(nodes.blocks_of_worker, tuple(map(tuple, of_ranks)), (worker, nodes.num_blocks))
        _, sums = self._of.accumulate.sum_blocks(step, self._names, share)
        length = self._engine.count_sums(self._names)
        measured = self._engine.measure_sums(
            self._names, sum_in_world(sums, of_ranks, nodes.blocks_of_worker, length, world)
        )
        faults = self._engine.step(self._rates(step), measured.norms)
        for name in faults:
            spoil(self._engine.prompts.members[name])
        return measured

    def _rates(self, step: int) -> dict[str, float]:
        return {name: learning_rate_at(step, self._of.job.members[name].train) for name in self._names}

    def _weight(self, name: str, worker: int) -> float:
        """A worker's part of the rows that a member reads in the period."""
        counts = [len(read[name]) for read in self._read]
        return sum(len(range(worker, count, self._of.nodes.num_blocks)) for count in counts) / sum(counts)

    def end(self, total: torch.Tensor) -> Ended:
        """Move the members to where all continue. One whose numbers are not finite keeps those that it had."""
        *means, numbers = total.split([*self._sizes, self.length - sum(self._sizes)])
        losses, norms = numbers.view(2, len(self._steps), len(self._names)).tolist()
        faults: dict[str, str] = {}
        for name, mean in zip(self._names, means, strict=True):
            if not self._move(name, mean):
                faults[name] = "the prompt is not finite after the local steps of a worker"
        failed = [step for step, own in zip(self._steps, losses, strict=True) if not all(map(math.isfinite, own))]
        found = zip(self._steps, self._read, losses, norms, strict=True)
        steps = [self._taken(step, read, own, of_gradients) for step, read, own, of_gradients in found]
        return Ended(steps, faults, failed[0] if failed else self._steps[-1])

    def _move(self, name: str, mean: torch.Tensor) -> bool:
        """Whether a member has moved by the workers' mean."""
        number = self._names.index(name)
        member = self._members[number]
        train = self._of.job.members[name].train
        if mean.isfinite().all():
            move_to_mean(member, self._starts[number], mean, train.outer_lr, train.outer_momentum)
            if member.is_finite():
                return True
        write_state(member, self._starts[number])
        return False

    def _taken(self, step: int, read: dict[str, list[int]], losses: list[float], norms: list[float]) -> Taken:
        num_targets = self._of.rows.examples.num_targets
        means = {
            name: loss / self._engine.divisor(name, num_targets[read[name]])
            for name, loss in zip(self._names, losses, strict=True)
        }
        return Taken(read, means, self._rates(step), dict(zip(self._names, norms, strict=True)))
