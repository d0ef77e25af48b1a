"""Train with less memory than `train.micro_batch_tokens: auto` takes: rank 1 may have so many MiB more than it has.

usage: halve_many.py CONFIG MIB [override ...]
"""

import ctypes
import resource
import sys
from pathlib import Path

import torch.distributed as dist

from ptune_dist.config.load import load_config
from ptune_dist.loop import train
from ptune_dist.run.accumulate import Accumulated, Accumulator

MIB = 1 << 20
M_ARENA_MAX = -8  # mallopt(3)


def limit_memory(num_bytes: int) -> None:
    """A limit of the kernel's, in bytes beyond what this process has mapped."""
    # No arenas for threads: each would map 64 MiB, which no tensor uses.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + num_bytes, resource.RLIM_INFINITY))


def main() -> None:
    config, room = load_config(sys.argv[1], sys.argv[3:]), int(sys.argv[2]) * MIB
    accumulate = Accumulator.accumulate
    limited: list[bool] = []

    def accumulate_limited(self: Accumulator, step: int, live: list[str]) -> Accumulated:
        if dist.get_rank() == 1 and room and not limited:
            limited.append(True)
            limit_memory(room)
        return accumulate(self, step, live)

    Accumulator.accumulate = accumulate_limited
    sys.exit(train(config))


if __name__ == "__main__":
    main()
