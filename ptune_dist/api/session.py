"""A process group for one call: a notebook's process must be afterwards what it was before."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptune_dist.distributed.world import World

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # which joining a process group sets where no launcher has


@contextlib.contextmanager
def process_group() -> "Iterator[World]":
    """The default process group for the body; it is left after it, and the process is as it was.

    One that the caller has joined is used and stays. Raises RunFault.
    """
    import torch.distributed as dist

    from ptune_dist.distributed.world import init_distributed

    is_ours = not dist.is_initialized()
    variables = {name: os.environ.get(name) for name in VARIABLES}
    hook = sys.excepthook  # torch has errors begin with the rank
    try:
        yield init_distributed()
    finally:
        if is_ours:
            if dist.is_initialized():
                dist.destroy_process_group()
            sys.excepthook = hook
            restore(variables)


def restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
