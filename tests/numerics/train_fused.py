"""`train_many.py` with every module of a base fused, however small: by the functions as written, for a CPU's sake."""

import torch

from ptune_dist.base import fused_kernels
from tests.numerics.train_many import main

if __name__ == "__main__":
    fused_kernels.MIN_CPU_ELEMENTS = 0
    torch.compiler.set_stance("force_eager")
    main()
