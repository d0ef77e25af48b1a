"""Forward and backward of a step's micro-batches, of half the size where `auto` chose them too large."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ptune_dist.data.batches import Batch
from ptune_dist.data.blocks import RunningSums
from ptune_dist.distributed.world import World, to_device, write
from ptune_dist.errors import RunFault
from ptune_dist.nodes.blocks import Range
from ptune_dist.run.batches_ahead import BatchesAhead, Share, StepPlan
from ptune_dist.run.job import Job
from ptune_dist.run.micro_batch import NUM_FIRST_STEPS, describe_shortage, has_any_failed, is_out_of_memory

T = TypeVar("T")
Accumulated = tuple[StepPlan, torch.Tensor]  # a step's plan, and each member's summed loss [K] on this rank
# A step's plan, and of this rank's subtrees of blocks the sums of gradients and losses, as `Engine.take_sums` has them.
BlockSums = tuple[StepPlan, dict[Range, torch.Tensor]]


@dataclass
class Accumulator:
    """Computes one step after another. `beat` tells that this rank is alive, `say` writes to the run's log."""

    job: Job
    batches: BatchesAhead
    world: World
    beat: Callable[[], None]
    say: Callable[[str], None]
    num_steps: int = 0

    def __call__(self, step: int, live: Sequence[str]) -> Accumulated:
        """`accumulate`; where its micro-batches do not fit, once more with half of what `auto` chose. Collective.

        Raises as `fit` does.
        """
        return self.fit(lambda: self.accumulate(step, live), step, live)

    def sum_blocks(self, step: int, live: Sequence[str], share: Share) -> BlockSums:
        """`accumulate_blocks`, once more with half of what `auto` chose where it does not fit. Collective."""
        return self.fit(lambda: self.accumulate_blocks(step, live, share), step, live, share)

    def fit(self, work: Callable[[], T], step: int, live: Sequence[str], share: Share | None = None) -> T:
        """What `work` returns, which makes the passes of a step. Collective.

        Raises RunFault where there is nothing to halve. Under ZeRO-3 the other ranks wait in the middle of a pass, so
        the job has to start again, by a launcher or a user: raises RuntimeError, with the halved size stored.
        """
        size = self.job.micro_batch
        may_halve = size.may_halve and self.num_steps < NUM_FIRST_STEPS
        self.num_steps += 1
        found: T | None = None
        try:
            found = work()
        except Exception as error:  # it holds tensors, which are freed with it
            if not is_out_of_memory(error):
                raise
            if not may_halve:
                raise RunFault(f"{describe_shortage(size, step)}: set a smaller one") from error
            if self.job.engine.is_sharded:
                size.halved(self.batches.most_positions(step, live, share)).store(self.run_dir, self.world.rank)
                raise RuntimeError(f"{describe_shortage(size, step)}: the next start takes half of it") from error
        if may_halve and not self.job.engine.is_sharded and has_any_failed(found is None, self.world):
            self.halve(step, live, share)
            return self.fit(work, step, live, share)
        assert found is not None, "a rank whose pass did not fit has raised, or halves with the others"
        return found

    @property
    def run_dir(self) -> Path:
        return Path(self.job.config.output_dir)

    def halve(self, step: int, live: Sequence[str], share: Share | None = None) -> None:
        """Continue with half of what `auto` chose, from the beginning of a step. Collective."""
        before = self.job.micro_batch
        size = before.halved(self.batches.most_positions(step, live, share))
        self.job.micro_batch = size
        self.job.engine.drop_gradients()
        self.batches.resize(size.tokens)
        write(self.world, lambda: size.store(self.run_dir))
        self.say(f"{describe_shortage(before, step)}: continuing with {size.tokens}")

    def accumulate(self, step: int, live: Sequence[str]) -> Accumulated:
        """Forward and backward of all micro-batches of a step. Collective.

        Nothing waits for the device: its numbers are read once, when the members move.
        """
        engine = self.job.engine
        plan, batches = self.batches.of_step(step, live)
        scales = self._scales(plan)
        engine.model.begin_step(step)
        return plan, self._accumulate(batches, scales)

    def accumulate_blocks(self, step: int, live: Sequence[str], share: Share) -> BlockSums:
        """Forward and backward of this rank's blocks of a step, whose sums are kept apart. Collective.

        The step has been begun: where a node is lost, its blocks are computed by others in a second call.
        """
        engine = self.job.engine
        plan, batches = self.batches.of_step(step, live, share)
        scales = self._scales(plan)
        sums = RunningSums(share.of_ranks[self.world.rank])
        for block, num_micro_batches in plan.blocks:
            totals = self._accumulate(itertools.islice(batches, num_micro_batches), scales)
            sums.add(block, engine.take_sums(list(plan.examples), totals))
        self._accumulate(batches, scales)  # the passes of which other ranks have need
        engine.prompts.clear_gradients()
        return plan, sums.found

    def _scales(self, plan: StepPlan) -> torch.Tensor:
        """1 / the divisor of each member [K]."""
        members = self.job.engine.members
        scales = torch.tensor([1 / plan.divisors[name] if name in plan.divisors else 0.0 for name in members])
        return to_device(scales, self.world.device)

    def _accumulate(self, batches: Iterator[Batch], scales: torch.Tensor) -> torch.Tensor:
        """Each member's summed loss [K] in some micro-batches, of which gradients are added to what is there."""
        totals = torch.zeros(len(self.job.engine.members), device=self.world.device)
        for batch in batches:
            totals += self.job.engine.accumulate(batch, scales=scales)
            self.beat()
        return totals
