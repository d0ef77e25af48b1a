"""A step's sums where the ranks of all nodes are one world."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, sum_over_ranks
from ptune_dist.errors import RunFault
from ptune_dist.optim.prompt_state import Measured
from ptune_dist.run.accumulate import Accumulator
from ptune_dist.run.batches_ahead import StepPlan
from ptune_dist.run.job import Job
from ptune_dist.run.progress import Progress, restore
from ptune_dist.run.shared_pen import Log
from ptune_dist.run.watch import Watch


class StepSums(NamedTuple):
    """A step's plan and its numbers; the gradients of the whole step are in place."""

    plan: StepPlan
    measured: Measured


@dataclass
class OneWorld:
    """What `run.replicas.Replicas` is where nodes train as replicas. Every method is collective."""

    job: Job
    world: World
    watch: Watch

    def __enter__(self) -> "OneWorld":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, rows: TrainingRows) -> Progress:
        """Where the run stands. Raises UserError."""
        return restore(self.job, rows, self.world)

    def sum_step(self, accumulate: Accumulator, progress: Progress, metrics: Log | None) -> StepSums:
        """The next step's sums over all ranks."""
        plan, totals = accumulate(progress.step + 1, progress.live)
        return StepSums(plan, self.job.engine.measure(list(plan.examples), totals))

    def is_asked(self, metrics: Log | None) -> bool:
        """Whether to stop after this step."""
        return agree_on_stop(self.watch, metrics, self.world)

    @property
    def has_left(self) -> bool:
        """Whether the run is continued without this node."""
        return False

    def facts(self) -> dict[str, Any]:
        """What metrics.jsonl has of the last step beside the usual."""
        return {}

    def end(self, *, is_done: bool) -> None:
        """This process is about to end, and has written what it had to."""


def agree_on_stop(watch: Watch, metrics: Log | None, world: World) -> bool:
    """Whether any rank is asked to stop. Raises RunFault on every rank where rank 0 cannot write. Collective."""
    failed = metrics.failure if metrics else None
    num_asked, num_failed = sum_over_ranks([float(watch.requested), float(failed is not None)], world)
    if num_failed:
        raise failed or RunFault("rank 0 cannot write its metrics")
    return num_asked > 0
