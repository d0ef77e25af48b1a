"""The process group and what ranks do together: reductions, broadcasts, errors that all raise.

Rank and world size come from torchrun's variables; with none set it is a world of one, on the same code path.
"""

import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ptune_dist.cluster.devices import count_promised_gpus, describe_missing_gpus
from ptune_dist.cluster.processes import signal_on_parent_death
from ptune_dist.cluster.rank_files import NODE_NAME, node_folder
from ptune_dist.common.files import describe_os_error
from ptune_dist.common.progress_line import BusyLine
from ptune_dist.common.writes import Write, write_now
from ptune_dist.errors import NodeFault, RunFault, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all.

    pen: called on rank 0 with what writes into the run's folder; where nodes train as replicas, one of them writes.
    """

    rank: int
    size: int
    device: torch.device
    pen: Callable[[Write], None] = write_now

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_distributed() -> World:
    """Join the process group: NCCL with a GPU per local rank, gloo without. Collective: every rank must call.

    Raises NodeFault if the node has GPUs that torch does not see.
    """
    is_alone = "RANK" not in os.environ or ("MASTER_ADDR" not in os.environ and os.environ.get("WORLD_SIZE") == "1")
    if is_alone:  # also at the second call of one process
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    if "TORCHELASTIC_RUN_ID" in os.environ and node_folder() is None:  # no rank continues alone
        signal_on_parent_death(signal.SIGTERM)
    device = find_device()
    if not dist.is_initialized():
        with BusyLine("waiting for the other ranks"):
            start_process_group(device, is_alone=is_alone)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def find_device() -> torch.device:
    """This rank's GPU, which becomes the current one; the CPU on a node without GPUs. Raises NodeFault."""
    node = os.environ.get(NODE_NAME) or socket.gethostname()
    if not torch.cuda.is_available():
        num_gpus = count_promised_gpus()
        if num_gpus:
            text = describe_missing_gpus(num_gpus, torch.__version__, torch.version.cuda)
            raise NodeFault(f"node {node} has {text}", node)
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        num_ranks = os.environ.get("LOCAL_WORLD_SIZE", number + 1)
        raise NodeFault(f"node {node} has {found} GPUs for {num_ranks} ranks: set PTUNE_PROCS={found}", node)
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def start_process_group(device: torch.device, *, is_alone: bool = False) -> None:
    """Join the default process group. A collective that waits longer than DEEPSPEED_TIMEOUT minutes, by default 10,
    fails, as it does in a process group that DeepSpeed starts. Collective.

    `is_alone`: without a launcher. Such a process needs no port, which another job could take first.
    """
    timeout = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 10)))
    if is_alone:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = cast(Any, dist).HashStore()  # documented, but not among the names that torch's types export
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif device.type != "cuda":
        dist.init_process_group("gloo", timeout=timeout)
    elif int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:  # bound to a device, torch would build every later group by splitting this one, which has no peers
        dist.init_process_group("nccl", timeout=timeout)


def is_pinned_for(device: torch.device) -> bool:
    """Whether copies to a device are to start in pinned memory, as those to a GPU must to return at once."""
    return device.type == "cuda" and torch.cuda.is_available()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device, without waiting for the copy."""
    if is_pinned_for(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Sums of `values` over all ranks, in float64. Collective: every rank must call."""
    total = to_device(torch.tensor(values, dtype=torch.float64), world.device)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: float, world: World) -> float:
    """The largest `value` of any rank. Collective: every rank must call."""
    largest = torch.tensor([value], dtype=torch.float64, device=world.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def gather_from_ranks(value: Any, world: World) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. Collective: every rank must call."""
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_from_main(value: Any, world: World) -> Any:
    """Rank 0's `value`, on every rank. Collective: every rank must call."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_together(error: Exception | None, world: World) -> None:
    """Raise the first rank's error on every rank, so that none waits for one that gave up. Collective.

    A rank that has an error of its own raises that, with its traceback; of an unexpected one the others get the text.
    """
    line = describe_os_error(error) if isinstance(error, OSError) else None
    error = RunFault(line) if line else error
    is_ours = isinstance(error, (UserError, RunFault))
    sent = error if is_ours or error is None else RuntimeError("".join(traceback.format_exception(error)))
    for found in gather_from_ranks(sent, world):
        if found is not None:
            raise error or found


def together(world: World, function: Callable[[], T]) -> T:
    """Call `function`, which must not communicate, on every rank; if it raises on one, raise on all. Collective."""
    error: Exception | None = None
    result: T | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    raise_together(error, world)
    return cast(T, result)  # nothing was raised, so the function has returned


def from_main(world: World, function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank; if it raises, all raise. Collective.

    For what is read from the run: on a shared disk another node may still see an older state.
    """
    return broadcast_from_main(together(world, lambda: function() if world.is_main else None), world)


def write(world: World, function: Write) -> None:
    """Have `function` write into the run's folder, which one process does; if it raises, all raise. Collective."""
    together(world, lambda: world.pen(function) if world.is_main else None)
