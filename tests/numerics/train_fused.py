"""`train_many.py` with every module of a base fused, however small: by the functions as written, for a CPU's sake.

Leaves `num_kernel_calls` in every run.
"""

from pathlib import Path
from typing import Any

import torch

import ptune_dist.loop
from ptune_dist.base import fused_kernels
from tests.numerics.train_many import main

num_calls = 0


def count_calls() -> None:
    call = fused_kernels.Kernel.__call__
    train = ptune_dist.loop.train

    def counted(self: fused_kernels.Kernel, *arguments: Any) -> Any:
        global num_calls
        num_calls += 1
        return call(self, *arguments)

    def train_and_note(config: Any) -> None:
        before = num_calls
        train(config)
        Path(config.output_dir, "num_kernel_calls").write_text(str(num_calls - before))

    fused_kernels.Kernel.__call__ = counted
    ptune_dist.loop.train = train_and_note


if __name__ == "__main__":
    fused_kernels.MIN_CPU_ELEMENTS = 0
    torch.compiler.set_stance("force_eager")
    count_calls()
    main()
