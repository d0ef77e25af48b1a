"""DeepSpeed in this process: quiet, without kernels that nothing uses, and on the process group that torch has."""

import gc
import os
import warnings
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import logger


def quiet_deepspeed() -> None:
    """Leave to DeepSpeed's own log what is wrong; PTUNE_DEEPSPEED_LOG=INFO shows all of it."""
    logger.setLevel(os.environ.get("PTUNE_DEEPSPEED_LOG", "ERROR"))
    # DeepSpeed still calls collectives by the names they had before torch 2.13, thousands of times a run.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\..* is deprecated")


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group, which must exist. Later calls change nothing."""
    quiet_deepspeed()
    if deepspeed.comm.is_initialized():
        return
    if not torch.cuda.is_available():
        # DeepSpeed's shared-memory all-reduce takes 40 s to compile and treats hosts of the same name as one host.
        # Nothing here needs its other CPU kernels either, and looking for a compiler for them takes 0.2 s.
        cast(Any, deepspeed.ops).__compatible_ops__ = {}
    gc.freeze()  # imported modules are not garbage: DeepSpeed's own collection at each start spends 0.4 s on them
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
