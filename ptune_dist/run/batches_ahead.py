"""The micro-batches of one step after another: the next one is prepared in a thread while this one computes.

What a step reads is a pure function of its number and of the members that train, so it can be planned before the step
before it is done, in the same order and with the same result as without the thread.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ptune_dist.data.batches import Batch, Plan, Unit, collate
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World
from ptune_dist.nodes.blocks import Range
from ptune_dist.zero.engine import Engine


@dataclass(frozen=True)
class StepPlan:
    """What an optimizer step reads: the examples of each live member, in how many micro-batches.

    divisors: what each member's loss is divided by, over all ranks. blocks: where the step is cut into blocks, those of
    this rank in order, each with the number of its micro-batches; what follows them are idle passes, of which the other
    ranks have need.
    """

    step: int
    examples: dict[str, list[int]]
    divisors: dict[str, float]
    num_micro_batches: int
    blocks: tuple[tuple[int, int], ...] = ()


class Share(NamedTuple):
    """Where a step is cut into blocks: how many there are, and the subtrees of them that each rank here computes."""

    num_blocks: int
    of_ranks: tuple[tuple[Range, ...], ...]

    def blocks_of(self, rank: int) -> list[int]:
        return [block for own in self.of_ranks[rank] for block in range(own.lo, own.hi)]


class MicroBatch(NamedTuple):
    """`batch` is None of a step of which no rank here has a part."""

    plan: StepPlan
    batch: Batch | None


@dataclass(frozen=True)
class StepSource:
    """Everything that the batches of a step follow from, besides its number and the live members."""

    engine: Engine
    rows: TrainingRows
    world: World
    micro_batch_tokens: int
    pad_id: int

    def plan(self, step: int, live: Sequence[str], share: Share | None = None) -> tuple[StepPlan, Iterator[Batch]]:
        """A step and this rank's micro-batches of it, which are prepared as they are taken.

        With `share`, of those blocks of the step alone.
        """
        engine = self.engine
        rows = self.rows
        examples = rows.of_step(step, live)
        divisors = {name: engine.divisor(name, rows.examples.num_targets[own]) for name, own in examples.items()}
        plan, blocks = self._micro_batches(rows.units(examples, engine.members), share)
        batches = (engine.prepare(collate(rows.examples, shares, self.world.rank, self.pad_id)) for shares in plan)
        return StepPlan(step, examples, divisors, len(plan), blocks), batches

    def _micro_batches(self, units: list[Unit], share: Share | None) -> tuple[Plan, tuple[tuple[int, int], ...]]:
        """Of all ranks, and this rank's blocks, each with the number of its micro-batches."""
        examples = self.rows.examples
        if share is None:
            return self.engine.plan(units, examples, self.micro_batch_tokens), ()
        cut = self.engine.cut(units, examples, share.num_blocks)
        blocks = [
            {block: self.engine.plan_block(cut[block], examples, self.micro_batch_tokens) for block in own}
            for own in map(share.blocks_of, range(self.world.size))
        ]
        of_ranks = [[some for micro_batches in own.values() for some in micro_batches] for own in blocks]
        num_passes = max(map(len, of_ranks))
        plan = [[own[i] if i < len(own) else [] for own in of_ranks] for i in range(num_passes)]
        return plan, tuple((block, len(found)) for block, found in blocks[self.world.rank].items())

    def most_positions(self, step: int, live: Sequence[str], share: Share | None = None) -> int:
        """Of the largest micro-batch that any rank has in a step."""
        engine = self.engine
        units = self.rows.units(self.rows.of_step(step, live), engine.members)
        plan, _ = self._micro_batches(units, share)
        return max(engine.model.count_positions(share, self.rows.examples) for shares in plan for share in shares)

    def steps(self, first: int, live: Sequence[str], share: Share | None = None) -> Iterator[MicroBatch]:
        """The micro-batches of all steps from `first` on."""
        step = first
        while True:
            plan, batches = self.plan(step, live, share)
            if not plan.num_micro_batches:
                yield MicroBatch(plan, None)
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
        self._wanted: tuple[int, tuple[str, ...], Share | None] | None = None  # the step that `_next` begins
        self._items: Iterator[MicroBatch] = iter(())
        self._next: Future[MicroBatch] | None = None

    def __enter__(self) -> "BatchesAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def most_positions(self, step: int, live: Sequence[str], share: Share | None = None) -> int:
        """Of the largest micro-batch that any rank has in a step."""
        return self._source.most_positions(step, live, share)

    def resize(self, micro_batch_tokens: int) -> None:
        """Have the next step's micro-batches be of this size."""
        self._source = replace(self._source, micro_batch_tokens=micro_batch_tokens)
        self._next = None

    def of_step(self, step: int, live: Sequence[str], share: Share | None = None) -> tuple[StepPlan, Iterator[Batch]]:
        """A step's plan and this rank's micro-batches, all of which must be taken; with `share`, of those blocks.

        What was prepared for other members, because some have ended since, or for another share is dropped.
        """
        if self._next is None or self._wanted != (step, tuple(live), share):
            self._items = self._source.steps(step, live, share)
            self._next = self._thread.submit(next, self._items)
        first = self._take()
        self._wanted = (step + 1, tuple(live), share)
        return first.plan, self._batches(first)

    def _batches(self, first: MicroBatch) -> Iterator[Batch]:
        found = first
        for number in range(first.plan.num_micro_batches):
            found = found if number == 0 else self._take()
            assert found.batch is not None, "a step with micro-batches has them"
            yield found.batch

    def _take(self) -> MicroBatch:
        assert self._next is not None, "the first micro-batch of a step is asked for with the step"
        found = self._next.result()
        self._next = self._thread.submit(next, self._items)
        return found


def use_device(device: torch.device) -> Callable[[], None]:
    """What a thread calls before it pins memory: without it the thread would begin to use the first GPU."""
    return lambda: torch.cuda.set_device(device) if device.type == "cuda" else None
