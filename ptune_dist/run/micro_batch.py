"""What `train.micro_batch_tokens: auto` is in a run: stored in its folder, and halved once where it was too much.

The loss curve does not depend on it. What is stored is taken again when the run is resumed, so that a resume is exact.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ptune_dist.common.files import fault_on_failed_write
from ptune_dist.distributed.world import World, max_over_ranks
from ptune_dist.run.folder import write_json
from ptune_dist.run.watch import CPU_MEMORY_MESSAGES, GPU_MEMORY_MESSAGES, names_any

FILE = "micro_batch.json"
NUM_FIRST_STEPS = 3  # of this process: later ones need no more memory, but for longer rows


@dataclass(frozen=True)
class MicroBatchSize:
    """`tokens`: the most positions of a micro-batch. `may_halve`: `auto` chose them, and they have not been halved."""

    tokens: int
    may_halve: bool = False

    def halved(self, most: int) -> "MicroBatchSize":
        """Half of what did not fit, where the largest micro-batch of the step had `most` positions."""
        return MicroBatchSize(max(1, min(self.tokens, most) // 2))

    def store(self, run_dir: Path, rank: int = 0) -> None:
        """Keep what `auto` is in this run. Several ranks may call at once. Raises RunFault."""
        own = run_dir / f"{FILE}.{rank}"
        write_json(own, {"tokens": self.tokens, "may_halve": self.may_halve})
        with fault_on_failed_write(run_dir / FILE):
            os.replace(own, run_dir / FILE)


def read_stored(run_dir: Path) -> MicroBatchSize | None:
    """What `auto` is in a run, or None where it has not begun."""
    try:
        return MicroBatchSize(**json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def describe_shortage(size: MicroBatchSize, step: int) -> str:
    return f"a micro-batch did not fit in memory at step {step}, with train.micro_batch_tokens {size.tokens}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed because a tensor did not fit on its device or host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and names_any(str(error), CPU_MEMORY_MESSAGES + GPU_MEMORY_MESSAGES)


def has_any_failed(failed: bool, world: World) -> bool:
    """Whether a pass did not fit on some rank. Collective: every rank must call."""
    return max_over_ranks(float(failed), world) > 0
