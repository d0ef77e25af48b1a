"""The micro-batches of one step after another: the next one is prepared in a thread while this one computes.

What a step reads is a pure function of its number and of the members that train, so it can be planned before the step
before it is done, in the same order and with the same result as without the thread.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ptune_dist.data.batches import Batch, collate
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World
from ptune_dist.zero.engine import Engine


@dataclass(frozen=True)
class StepPlan:
    """What an optimizer step reads: the examples of each live member, in how many micro-batches.

    divisors: what each member's loss is divided by, over all ranks.
    """

    step: int
    examples: dict[str, list[int]]
    divisors: dict[str, float]
    num_micro_batches: int


class MicroBatch(NamedTuple):
    plan: StepPlan
    batch: Batch


@dataclass(frozen=True)
class StepSource:
    """Everything that the batches of a step follow from, besides its number and the live members."""

    engine: Engine
    rows: TrainingRows
    world: World
    micro_batch_tokens: int
    pad_id: int

    def plan(self, step: int, live: Sequence[str]) -> tuple[StepPlan, Iterator[Batch]]:
        """A step and this rank's micro-batches of it, which are prepared as they are taken."""
        engine = self.engine
        rows = self.rows
        examples = rows.of_step(step, live)
        divisors = {name: engine.divisor(name, rows.examples.num_targets[own]) for name, own in examples.items()}
        plan = engine.plan(rows.units(examples, engine.members), rows.examples, self.micro_batch_tokens)
        batches = (engine.prepare(collate(rows.examples, shares, self.world.rank, self.pad_id)) for shares in plan)
        return StepPlan(step, examples, divisors, len(plan)), batches

    def most_positions(self, step: int, live: Sequence[str]) -> int:
        """Of the largest micro-batch that any rank has in a step."""
        engine = self.engine
        units = self.rows.units(self.rows.of_step(step, live), engine.members)
        plan = engine.plan(units, self.rows.examples, self.micro_batch_tokens)
        return max(engine.model.count_positions(share, self.rows.examples) for shares in plan for share in shares)

    def steps(self, first: int, live: Sequence[str]) -> Iterator[MicroBatch]:
        """The micro-batches of all steps from `first` on."""
        step = first
        while True:
            plan, batches = self.plan(step, live)
            for batch in batches:
                yield MicroBatch(plan, batch)
            step += 1


class BatchesAhead:
    """Steps with their micro-batches, one of which is always being prepared. A context manager, which ends its thread.

    An error of the thread is raised where the micro-batch would be taken.
    """

    def __init__(self, source: StepSource):
        self._source = source
        self._thread = ThreadPoolExecutor(1, "prepare", initializer=use_device(source.world.device))
        self._wanted: tuple[int, tuple[str, ...]] | None = None  # the step that `_next` begins, and its members
        self._items: Iterator[MicroBatch] = iter(())
        self._next: Future[MicroBatch] | None = None

    def __enter__(self) -> "BatchesAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def most_positions(self, step: int, live: Sequence[str]) -> int:
        """Of the largest micro-batch that any rank has in a step."""
        return self._source.most_positions(step, live)

    def resize(self, micro_batch_tokens: int) -> None:
        """Have the next step's micro-batches be of this size."""
        self._source = replace(self._source, micro_batch_tokens=micro_batch_tokens)
        self._next = None

    def of_step(self, step: int, live: Sequence[str]) -> tuple[StepPlan, Iterator[Batch]]:
        """A step's plan and this rank's micro-batches, all of which must be taken.

        What was prepared for other members, because some have ended since, is dropped.
        """
        if self._next is None or self._wanted != (step, tuple(live)):
            self._items = self._source.steps(step, live)
            self._next = self._thread.submit(next, self._items)
        first = self._take()
        self._wanted = (step + 1, tuple(live))
        return first.plan, self._batches(first)

    def _batches(self, first: MicroBatch) -> Iterator[Batch]:
        yield first.batch
        for _ in range(1, first.plan.num_micro_batches):
            yield self._take().batch

    def _take(self) -> MicroBatch:
        assert self._next is not None, "the first micro-batch of a step is asked for with the step"
        found = self._next.result()
        self._next = self._thread.submit(next, self._items)
        return found


def use_device(device: torch.device) -> Callable[[], None]:
    """What a thread calls before it pins memory: without it the thread would begin to use the first GPU."""
    return lambda: torch.cuda.set_device(device) if device.type == "cuda" else None
