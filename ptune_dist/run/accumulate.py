"""Forward and backward of a step's micro-batches, of half the size where `auto` chose them too large."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ptune_dist.distributed.world import World, to_device, together
from ptune_dist.errors import RunFault
from ptune_dist.run.batches_ahead import BatchesAhead, StepPlan
from ptune_dist.run.job import Job
from ptune_dist.run.micro_batch import NUM_FIRST_STEPS, describe_shortage, has_any_failed, is_out_of_memory

Accumulated = tuple[StepPlan, torch.Tensor]  # a step's plan, and each member's summed loss [K] on this rank


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

        Raises RunFault where there is nothing to halve. Under ZeRO-3 the other ranks wait in the middle of a pass, so
        the job has to start again, by a launcher or a user: raises RuntimeError, with the halved size stored.
        """
        size = self.job.micro_batch
        may_halve = size.may_halve and self.num_steps < NUM_FIRST_STEPS
        self.num_steps += 1
        found: Accumulated | None = None
        try:
            found = self.accumulate(step, live)
        except Exception as error:  # it holds tensors, which are freed with it
            if not is_out_of_memory(error):
                raise
            if not may_halve:
                raise RunFault(f"{describe_shortage(size, step)}: set a smaller one") from error
            if self.job.engine.is_sharded:
                size.halved(self.batches.most_positions(step, live)).store(self.run_dir, self.world.rank)
                raise RuntimeError(f"{describe_shortage(size, step)}: the next start takes half of it") from error
        if may_halve and not self.job.engine.is_sharded and has_any_failed(found is None, self.world):
            self.halve(step, live)
            return self(step, live)
        assert found is not None, "a rank whose pass did not fit has raised, or halves with the others"
        return found

    @property
    def run_dir(self) -> Path:
        return Path(self.job.config.output_dir)

    def halve(self, step: int, live: Sequence[str]) -> None:
        """Continue with half of what `auto` chose, from the beginning of a step. Collective."""
        before = self.job.micro_batch
        size = before.halved(self.batches.most_positions(step, live))
        self.job.micro_batch = size
        self.job.engine.drop_gradients()
        self.batches.resize(size.tokens)
        together(self.world, lambda: size.store(self.run_dir) if self.world.is_main else None)
        self.say(f"{describe_shortage(before, step)}: continuing with {size.tokens}")

    def accumulate(self, step: int, live: Sequence[str]) -> Accumulated:
        """Forward and backward of all micro-batches of a step. Collective.

        Nothing waits for the device: its numbers are read once, when the members move.
        """
        engine = self.job.engine
        plan, batches = self.batches.of_step(step, live)
        scales = torch.tensor([1 / plan.divisors[name] if name in plan.divisors else 0.0 for name in engine.members])
        scales = to_device(scales, self.world.device)
        engine.model.begin_step(step)
        totals = torch.zeros(len(engine.members), device=self.world.device)
        for batch in batches:
            totals += engine.accumulate(batch, scales=scales)
            self.beat()
        return plan, totals
